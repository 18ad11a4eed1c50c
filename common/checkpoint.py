"""Checkpoint directories: read strictly, written so that a reader only ever sees a whole one.

A directory holds config.json, model.safetensors, resonance.safetensors (the head), tokenizer files,
training.json and README.md. Nothing is unpickled.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, listed

MODEL_FILE = "model.safetensors"
HEAD_FILE = "resonance.safetensors"
CONFIG_FILE = "config.json"
TRAINING_FILE = "training.json"
EXPORT_FILE = "export.json"  # beside ONNX_FILE: what was exported, and how it was verified
ONNX_FILE = "model.onnx"
GGUF_FILE = "model.gguf"

Shape = tuple[int, ...]


def surviving(directory: str | Path) -> Path:
    """The directory, or its previous version when a crash fell between the two renames of a save."""
    directory = Path(directory)
    previous = _previous(directory)
    return previous if not directory.exists() and previous.is_dir() else directory


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file; UserError when the file is missing, unreadable, broken or another value."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; a checkpoint directory needs it.") from None
    except NotADirectoryError:
        raise UserError(f"{path.parent}: a file; name the folder that holds {path.name}.") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}). Copy or download the file again."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}). Copy or download the file again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, expected a JSON object.")
    return value


def read_config(directory: str | Path) -> dict[str, Any]:
    """The directory's config.json."""
    return read_json(surviving(directory) / CONFIG_FILE)


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file, or of the model in a directory (one file or indexed shards).

    float32, float16, bfloat16 (as ml_dtypes) and integers keep their type. UserError names a missing,
    truncated or corrupt file.
    """
    path = surviving(path)
    tensors: dict[str, np.ndarray] = {}
    for file in _tensor_files(path):
        tensors |= _read_file(file)
    return tensors


def _tensor_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    index = path / f"{MODEL_FILE}.index.json"
    if (path / MODEL_FILE).exists() or not index.exists():
        return [path / MODEL_FILE]
    return [path / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]


def _read_file(path: Path) -> dict[str, np.ndarray]:
    import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a mapping
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: truncated or corrupt, cannot be read as safetensors ({error}). "
            "Copy or download the file again, or use another checkpoint of the run."
        ) from None


def check_keys(
    expected: Mapping[str, Shape],
    found: Mapping[str, Shape],
    *,
    optional: Sequence[str] = (),
    droppable: Sequence[str] = (),
    where: object,
) -> None:
    """Compare a model's tensors with a checkpoint's; UserError lists all missing, unexpected and misshaped.

    `optional` (may be missing) and `droppable` (may be left over) are regular expressions for whole keys.
    """
    problems = [
        f"missing: {key} {list(shape)}"
        for key, shape in expected.items()
        if key not in found and not _matches(key, optional)
    ]
    problems += [
        f"unexpected: {key} {list(shape)}"
        for key, shape in found.items()
        if key not in expected and not _matches(key, droppable)
    ]
    problems += [
        f"wrong shape: {key} is {list(found[key])}, the model needs {list(shape)}"
        for key, shape in expected.items()
        if key in found and tuple(found[key]) != tuple(shape)
    ]
    if problems:
        raise UserError(
            f"{where}: the tensors do not fit the model in config.json:\n{listed(problems, 200)}\n"
            "Use the config.json that was saved with these weights, or another checkpoint."
        )


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(re.fullmatch(pattern, key) for pattern in patterns)


def write_checkpoint(
    directory: str | Path,
    *,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    resonance: Mapping[str, np.ndarray] | None,
    training: Mapping[str, Any],
    tokenizer_save: Callable[[Path], None],
    card: str,
) -> None:
    """Write a checkpoint directory, replacing an earlier one only once the new one is whole and on disk.

    On a full disk, or any other failure, the earlier directory stays as it was and the partial one is
    removed; the UserError names the path and the remedy. A directory that is no checkpoint is never replaced.
    """

    def fill(folder: Path) -> None:
        _save_tokenizer(tokenizer_save, folder)
        _write(folder / CONFIG_FILE, to_json(config))
        _write(folder / MODEL_FILE, _tensor_bytes(tensors))
        if resonance is not None:
            _write(folder / HEAD_FILE, _tensor_bytes(resonance))
        _write(folder / TRAINING_FILE, to_json(training))
        _write(folder / "README.md", card.encode())

    write_directory(directory, fill)


def write_directory(directory: str | Path, fill: Callable[[Path], None]) -> None:
    """What `fill` writes into an empty folder, put in the place of `directory` once it is whole and on disk.

    When `fill` fails, or the disk is full, the earlier directory stays as it was, as in `write_checkpoint`. A
    directory with neither training.json nor export.json is never replaced.
    """
    directory = Path(os.path.abspath(directory))
    _refuse_foreign(directory)
    temporary = directory.with_name(f".{directory.name}.tmp-{os.getpid()}")
    try:
        _clear_remains(directory)
        temporary.mkdir(parents=True)
        fill(temporary)
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        _replace(temporary, directory)
    except OSError as error:
        raise UserError(_save_failed(directory, error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def json_numbers(values: Mapping[str, float]) -> dict[str, float | None]:
    """Numbers as JSON has them: null where one is not finite."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def to_json(value: Mapping[str, Any]) -> bytes:
    """Indented JSON; NumPy scalars become numbers, paths become text, NaN is refused (ValueError)."""

    def plain(item: object) -> object:
        if isinstance(item, np.ndarray | np.generic):
            return item.tolist()
        if isinstance(item, Path):
            return str(item)
        raise TypeError(f"{type(item).__name__} has no place in a JSON file")

    return (json.dumps(value, indent=2, ensure_ascii=False, default=plain, allow_nan=False) + "\n").encode()


def write_file(path: Path, data: bytes) -> None:
    """Write a single file whole or not at all: temporary sibling, fsync, rename. Raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        _write(temporary, data)
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raise the UserError of a file that could not be written, with its folders, before the work for it."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        place = next(folder for folder in path.absolute().parents if folder.exists())
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}). Choose another place, or mend this one."
        ) from error


def _tensor_bytes(tensors: Mapping[str, np.ndarray]) -> bytes:
    from safetensors.numpy import save

    # The writer takes raw memory, so a transposed view is copied first; transformers asks for "pt".
    return save(
        {key: np.array(value, order="C") for key, value in tensors.items()}, metadata={"format": "pt"}
    )


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def _save_tokenizer(save: Callable[[Path], None], directory: Path) -> None:
    """Call the tokenizer's writer; its native library reports a full disk as a plain Exception."""
    try:
        save(directory)
    except OSError:
        raise
    except Exception as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def sync(path: Path) -> None:
    """Wait until a file, or what a folder lists, lies on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _previous(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.old")


def _replace(new: Path, directory: Path) -> None:
    """Put `new` in the directory's place; the old one waits beside it until that has happened."""
    previous = _previous(directory)
    if directory.exists():
        directory.rename(previous)
    try:
        new.rename(directory)
    except OSError:
        if previous.exists():
            previous.rename(directory)
        raise
    sync(directory.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _clear_remains(directory: Path) -> None:
    """Undo what a killed save left behind: bring the previous version back, remove dead partial ones."""
    previous = _previous(directory)
    if previous.exists():
        if directory.exists():
            shutil.rmtree(previous)
        else:
            previous.rename(directory)
    for partial in directory.parent.glob(f".{directory.name}.tmp-*"):
        writer = partial.name.rpartition("-")[2]
        if writer == str(os.getpid()) or not alive(writer):
            shutil.rmtree(partial)


def alive(process: str) -> bool:
    """Whether a process of this number runs here."""
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _refuse_foreign(directory: Path) -> None:
    if not directory.exists() or any((directory / name).exists() for name in (TRAINING_FILE, EXPORT_FILE)):
        return
    if directory.is_dir() and not any(directory.iterdir()):
        return
    raise UserError(
        f"{directory}: exists and is no checkpoint of this project (no {TRAINING_FILE}); it is not replaced. "
        "Choose another directory, or remove this one."
    )


def _save_failed(directory: Path, error: OSError) -> str:
    kept = "The previous checkpoint there is untouched. " if directory.exists() else ""
    message = f"could not save the checkpoint {directory}: {error.strerror or error}. {kept}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        place = next(parent for parent in directory.parents if parent.exists())
        free = shutil.disk_usage(place).free / 2**20
        return (
            message
            + f"The disk of {place} has {free:.0f} MiB free: free some space and run the command again."
        )
    return message + "Check the path and its permissions, then run the command again."
