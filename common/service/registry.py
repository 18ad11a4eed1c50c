"""Model versions on disk: added whole, verified by their content, promoted and rolled back in one rename.

    ROOT/NAME/3/manifest.json   when and from where version 3 came, size and SHA-256 of each file
    ROOT/NAME/3/NAME-3/         the checkpoint or export itself, as every command takes it
    ROOT/NAME/history.json      what was promoted and rolled back, in order; the last line counts
    ROOT/NAME/.lock             held by who writes

A version appears by one rename, a promotion by another: a crash at any moment leaves the state before.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from common.checkpoint import CONFIG_FILE, read_json, sync, to_json, write_file
from common.errors import UserError, listed

MANIFEST, HISTORY = "manifest.json", "history.json"
_WEIGHTS = (".safetensors", ".onnx", ".gguf")
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"


@dataclass(frozen=True)
class Version:
    """A version of a model. `path` is the directory to load; `digest` the SHA-256 of all it holds, in 16 hex
    digits; `added` is in UTC, ISO 8601; `bytes` its size."""

    name: str
    number: int  # from 1
    path: Path
    digest: str
    added: str
    source: str
    note: str
    bytes: int


@dataclass(frozen=True)
class Change:
    """What made a version the current one, and when (UTC, ISO 8601)."""

    action: Literal["promote", "rollback"]
    number: int
    at: str


class Registry:
    """The models under a folder, which is made by the first `add`. Threads and processes may share it: one
    writes a model at a time, and readers see the state before or after."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def names(self) -> list[str]:
        """The models that have a version, sorted."""
        folders = [folder for folder in self.root.iterdir() if folder.is_dir()] if self.root.is_dir() else []
        return sorted(folder.name for folder in folders if self._numbers(folder))

    def versions(self, name: str) -> list[Version]:
        """All versions of a model, oldest first; none for an unknown name."""
        return [self._version(name, number) for number in self._numbers(self._folder(name))]

    def history(self, name: str) -> list[Change]:
        """Promotions and rollbacks, oldest first."""
        path = self._folder(name) / HISTORY
        if not path.exists():
            return []
        try:
            return [Change(**change) for change in read_json(path)["changes"]]
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not a history of this version ({error!r}). Bring it back from a copy."
            ) from None

    def current_version(self, name: str) -> Version | None:
        """The version that was promoted, None before the first promotion. Cheap, for those who look often: no
        file of the model is read."""
        promoted = _promoted(self.history(name))
        return self._version(name, promoted[-1]) if promoted else None

    def current(self, name: str) -> Path:
        """The directory of the promoted version, every byte of it verified.

        Raises UserError when nothing was promoted, and when the version is damaged.
        """
        version = self.current_version(name)
        if version is None:
            raise UserError(self._nothing(name))
        self.verify(name, version.number)
        return version.path

    def add(self, name: str, source: str | Path, *, note: str = "", link: bool = False) -> Version:
        """Take a checkpoint or an export in as the next version; what is there already keeps its number.

        The copy is read back and held to the source. `link` makes hard links instead, where both lie on one
        file system: no space is taken, and a file that is changed in place changes in both. Raises UserError
        for a directory without model, a source that changes meanwhile, and a full disk.
        """
        source = Path(source)
        files = _model_files(source)
        with self._writing(name) as folder:
            partial = folder / f".adding-{os.getpid()}"
            try:
                digests = {part: _digest(source / part) for part in files}
                known = [version for version in self.versions(name) if version.digest == _total(digests)]
                if known:
                    self.verify(name, known[0].number)
                    return known[0]
                number = max(self._numbers(folder), default=0) + 1
                _take(source, partial / f"{name}-{number}", digests, link)
                about = {"number": number, "digest": _total(digests), "added": _now(), "note": note}
                about |= {"source": str(source.absolute()), "files": digests}
                write_file(partial / MANIFEST, to_json(about))
                sync(partial)
                partial.rename(folder / str(number))
                sync(folder)
            except OSError as error:
                raise UserError(_not_added(folder, source, error)) from error
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return self._version(name, number)

    def promote(self, name: str, number: int | None = None) -> Version:
        """Make a version (the newest when absent) the current one. UserError for an unknown or damaged
        one."""
        with self._writing(name) as folder:
            numbers = self._numbers(folder)
            if not numbers:
                raise UserError(
                    f"{self.root}: no model {name!r}; there are {', '.join(self.names()) or 'none'}"
                )
            number = numbers[-1] if number is None else number
            self.verify(name, number)
            self._record(folder, "promote", number)
        return self._version(name, number)

    def rollback(self, name: str) -> Version:
        """Make the version current that was before the last promotion; again, the one before that.

        UserError when there is none, or it is damaged: then the current one stays.
        """
        with self._writing(name) as folder:
            promoted = _promoted(self.history(name))
            if len(promoted) < 2:
                had = (
                    f"version {promoted[0]} is the only one that was promoted"
                    if promoted
                    else "nothing was promoted"
                )
                raise UserError(f"{name}: nothing to go back to, {had}. Promote another version instead.")
            self.verify(name, promoted[-2])
            self._record(folder, "rollback", promoted[-2])
        return self._version(name, promoted[-2])

    def verify(self, name: str, number: int) -> None:
        """Read a version; UserError that lists what is missing, added or changed since it came."""
        version, manifest = self._version(name, number), self._manifest(name, number)
        found = {str(path.relative_to(version.path)) for path in version.path.rglob("*") if path.is_file()}
        files: Mapping[str, str] = manifest["files"]
        problems = [f"{part}: missing" for part in sorted(files.keys() - found)]
        problems += [f"{part}: not of this version" for part in sorted(found - files.keys())]
        for part in sorted(files.keys() & found):
            if _digest(version.path / part) != files[part]:
                problems.append(f"{part}: other content than when it was added")
        if problems:
            raise UserError(
                f"{version.path}: damaged, it is not used:\n{listed(problems)}\n"
                "Roll back or promote another version, and add this one again from its source."
            )

    def _folder(self, name: str) -> Path:
        if not re.fullmatch(_NAME, name):
            raise UserError(
                f"model name {name!r}: allowed are up to 100 letters, digits, `.`, `_`, `-`, no mark first"
            )
        return self.root / name

    def _numbers(self, folder: Path) -> list[int]:
        if not folder.is_dir():
            return []
        return sorted(int(item.name) for item in folder.iterdir() if re.fullmatch(r"[1-9]\d*", item.name))

    def _manifest(self, name: str, number: int) -> dict[str, Any]:
        folder = self._folder(name)
        if number not in (numbers := self._numbers(folder)):
            raise UserError(
                f"{name}: no version {number}; there are {', '.join(map(str, numbers)) or 'none'}"
            )
        return read_json(folder / str(number) / MANIFEST)

    def _version(self, name: str, number: int) -> Version:
        about, folder = self._manifest(name, number), self._folder(name) / str(number)
        path = folder / f"{name}-{number}"
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        try:
            digest, added, source, note = (str(about[key]) for key in ("digest", "added", "source", "note"))
        except KeyError as error:
            raise UserError(
                f"{folder / MANIFEST}: lacks {error}. Add the model again from its source."
            ) from None
        return Version(name, number, path, digest, added, source, note, size)

    def _record(self, folder: Path, action: Literal["promote", "rollback"], number: int) -> None:
        changes = [vars(change) for change in self.history(folder.name)]
        changes.append({"action": action, "number": number, "at": _now()})
        write_file(folder / HISTORY, to_json({"changes": changes}))
        sync(folder)

    def _nothing(self, name: str) -> str:
        numbers = self._numbers(self._folder(name))
        if not numbers:
            return f"{self.root}: no model {name!r}; add one: python scripts/registry.py add {name} DIRECTORY"
        return f"{name}: no version was promoted; python scripts/registry.py promote {name} {numbers[-1]}"

    @contextmanager
    def _writing(self, name: str) -> Iterator[Path]:
        """The model's folder, locked; the system lets go when a process ends. What a crash left goes."""
        folder = self._folder(name)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise UserError(
                f"{folder}: cannot hold a model ({error.strerror}); name another folder."
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            for partial in folder.glob(".adding-*"):
                shutil.rmtree(partial)
            yield folder
        finally:
            os.close(descriptor)


def _promoted(changes: Sequence[Change]) -> list[int]:
    """The versions that lie on each other, the current one last: a rollback takes the upper one away."""
    stack: list[int] = []
    for change in changes:
        if change.action == "rollback":
            stack.pop()
        else:
            stack.append(change.number)
    return stack


def _model_files(source: Path) -> list[str]:
    """What a directory holds, by path from it. UserError when no model is there."""
    if not source.is_dir():
        raise UserError(f"{source}: no directory; name a checkpoint (runs/NAME/best) or an export.")
    files = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
    if CONFIG_FILE not in files or not any(file.endswith(_WEIGHTS) for file in files):
        raise UserError(
            f"{source}: holds no model; needed are {CONFIG_FILE} and weights ({', '.join(_WEIGHTS)})."
        )
    return files


def _take(source: Path, target: Path, digests: Mapping[str, str], link: bool) -> None:
    """Copy or link every file, read it back and hold it to what the source was."""
    for part, digest in digests.items():
        place = target / part
        place.parent.mkdir(parents=True, exist_ok=True)
        if link:
            os.link((source / part).resolve(), place)
        else:
            shutil.copyfile(source / part, place)
        sync(place)
        if _digest(place) != digest:
            raise UserError(f"{source / part}: changed while it was copied; add it once nobody writes there.")
    for folder in {place.parent for place in target.rglob("*")}:
        sync(folder)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _total(digests: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:16]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _not_added(folder: Path, source: Path, error: OSError) -> str:
    said = f"{source}: not added, nothing has changed ({error.strerror or error}). "
    if error.errno == errno.EXDEV:
        return said + f"Hard links need one file system, and {folder} lies on another: leave out --link."
    free = shutil.disk_usage(folder).free / 2**20
    return said + f"The disk of {folder} has {free:.0f} MiB free: free some space, or mend the folder."
