"""The one lazy resolver: a model's name or directory -> an Encoder or Scorer of an installed backend."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from common.checkpoint import EXPORT_FILE, ONNX_FILE, TRAINING_FILE, surviving
from common.config import RerankerConfig
from common.errors import UserError
from common.hub import DEFAULT_MODEL, packaged_model, resolve_model
from common.processes import Launch, Processes, launch

# backend -> the framework that must be installed, the module that loads models, what to install
_BACKENDS = {
    "jax": ("jax", "jax_impl.scoring", "pip install -e ."),
    "mlx": ("mlx", "mlx_impl.scoring", "pip install -e '.[mlx]'"),
    "onnx": ("onnxruntime", "common.export.onnx_scoring", "pip install -e '.[serve]'"),
}
# What the scores of a checkpoint depend on; the card and the training log do not count.
_CONTENT = ("*.safetensors", "*.onnx", "*.json", "*.txt", "*.model")
_NOT_CONTENT = {TRAINING_FILE, EXPORT_FILE}


@dataclass(frozen=True)
class Scores:
    """Of N pairs, each float32 [N]: full score, portable score, resonance in [-1, 1] and its two factors, the
    overlap of the magnitudes and the coherence of the phases, in [0, 1]."""

    score: NDArray[np.float32]
    portable: NDArray[np.float32]
    resonance: NDArray[np.float32]
    overlap: NDArray[np.float32]
    coherence: NDArray[np.float32]


SCORES = tuple(field.name for field in fields(Scores))  # their names, in order


class Encoder(Protocol):
    """A bi-encoder. `identity` changes whenever its vectors may: caches are keyed by it."""

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> str: ...
    @property
    def dim(self) -> int: ...
    def encode(
        self, texts: Sequence[str], *, kind: Literal["query", "passage"]
    ) -> NDArray[np.float32]: ...  # [N, D], unit norm


class Scorer(Protocol):
    """A cross-encoder. `fusion_weight` is its omega >= 0; `identity` changes whenever its scores may, and is
    empty for a model that lives in memory only: its scores are never cached."""

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> str: ...
    @property
    def fusion_weight(self) -> float: ...
    def score(
        self,
        queries: Sequence[str],
        passages: Sequence[str],
        on_batch: Callable[[int], None] | None = None,  # told how many more pairs are done
    ) -> Scores: ...


def load_encoder(
    path_or_name: str | Path, backend: str = "auto", *, say: Callable[[str], None] = print
) -> Encoder:
    """The bi-encoder in a directory or of a name that `common.hub` finds; exports by onnxruntime. Raises
    UserError."""
    directory = resolve_model(path_or_name, say=say)
    encoder: Encoder = _module(_fitting(backend, directory)).load_encoder(directory)
    return encoder


def load_scorer(
    path_or_name: str | Path,
    backend: str = "auto",
    *,
    recipe: RerankerConfig | None = None,
    say: Callable[[str], None] = print,
) -> Scorer:
    """The cross-encoder in a directory or of a name that `common.hub` finds. Raises UserError.

    A base that was never trained scores as `recipe` would start it (the default recipe when absent). What
    `scripts/export.py` wrote is scored by onnxruntime.
    """
    directory = resolve_model(path_or_name, say=say)
    scorer: Scorer = _module(_fitting(backend, directory)).load_scorer(directory, recipe)
    return scorer


def load_trainer(backend: str = "auto") -> Callable[..., Any]:
    """The Trainer of a backend: Trainer(config, prepared, say=print).run(folder) returns a summary."""
    if backend == "onnx":
        raise UserError("backend onnx does not train; use jax or mlx and export the checkpoint")
    package = _module(backend).__name__.partition(".")[0]
    trainer: Callable[..., Any] = importlib.import_module(f"{package}.training.loop").Trainer
    return trainer


def load_language_trainer(backend: str = "auto") -> Callable[..., Any]:
    """The LanguageTrainer of a backend: as load_trainer's, of a language model's recipe."""
    trainer: Callable[..., Any] = language_module(backend, "training.language").LanguageTrainer
    return trainer


def language_module(backend: str, name: str, directory: Path | None = None) -> Any:
    """A backend's module about language models, by its path in the package: `generation`, `language_scoring`,
    `training.language`. For a directory that holds an export it is onnxruntime's. Raises UserError."""
    if directory is not None:
        backend = _fitting(backend, directory)
    package = _module(backend).__name__.partition(".")[0]
    if backend != "onnx":
        return importlib.import_module(f"{package}.{name}")
    if directory is None:
        raise UserError("backend onnx does not train; use jax or mlx and export the checkpoint")
    return importlib.import_module(f"common.export.onnx_{name}")


def backend_name(backend: str = "auto") -> str:
    """The backend that `auto` stands for here, or the one that is named. UserError when not installed."""
    _module(backend)
    return _preferred() if backend == "auto" else backend


def accelerator(backend: str = "auto") -> str | None:
    """The devices that a backend computes on, in words; None for the CPU."""
    found: str | None = _module(backend).accelerator()
    return found


def join_processes(backend: str, given: Launch) -> Processes:
    """The other processes of a run: as flags, environment or cluster say, and usually none. Raises UserError.

    Before anything is computed: afterwards a process stays alone.
    """
    found = launch(given)
    if found is None:
        return Processes()
    name = f"{_module(backend).__name__.partition('.')[0]}.training.parallel"
    if importlib.util.find_spec(name) is None:
        raise UserError("several processes train one run on JAX so far: add --backend jax")
    processes: Processes = importlib.import_module(name).join(found)
    return processes


def checkpoint_name(directory: Path) -> str:
    """What a table calls a checkpoint: its folder, behind its parent's name where it is a part of a run or an
    export's precision."""
    name, parent = directory.absolute().name, directory.absolute().parent
    if name in ("best", "final", "fp32", "fp16", "int8"):
        return f"{parent.name}/{name}"
    if parent.name == "snapshots":  # of the hub's cache: models--owner--name/snapshots/<commit>
        return parent.parent.name.rpartition("--")[2]
    return DEFAULT_MODEL.rpartition("/")[2] if directory.absolute() == packaged_model() else name


def checkpoint_identity(directory: str | Path, *settings: object) -> str:
    """16 hex digits of the SHA-256 of a checkpoint's tensors, configs and tokenizer, and of what else the
    caller says its output depends on (lengths, precision). Names and places of directories do not count."""
    directory = surviving(directory)
    digest = hashlib.sha256(repr(settings).encode())
    files = {path for pattern in _CONTENT for path in directory.glob(pattern)}
    for path in sorted(file for file in files if file.name not in _NOT_CONTENT):
        digest.update(f"{path.name}:{path.stat().st_size}\n".encode())
        with open(path, "rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]


def _fitting(backend: str, directory: Path) -> str:
    """`onnx` for an exported directory, else the backend as asked. UserError when the two do not go
    together."""
    exported = (surviving(directory) / ONNX_FILE).exists() and not any(directory.glob("*.safetensors"))
    if exported and backend not in ("auto", "onnx"):
        raise UserError(
            f"{directory}: an ONNX export, which backend {backend} does not read; leave it to `auto`"
        )
    if backend == "onnx" and not exported:
        raise UserError(
            f"{directory}: backend onnx reads what `python scripts/export.py {directory} --out FOLDER` "
            "writes, and this is not it. Export it, or name another backend."
        )
    return "onnx" if exported else backend


def _module(backend: str) -> Any:
    if backend == "auto":
        backend = _preferred()
    if backend not in _BACKENDS:
        raise UserError(f"unknown backend {backend!r}; allowed: auto, {', '.join(_BACKENDS)}")
    if not _installed(backend):
        raise UserError(
            f"backend {backend!r} is not installed here; install it with `{_BACKENDS[backend][2]}`"
        )
    return importlib.import_module(_BACKENDS[backend][1])


def _preferred() -> str:
    """On Apple Silicon MLX first, elsewhere JAX first."""
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    for backend in ("mlx", "jax") if apple else ("jax", "mlx"):
        if _installed(backend):
            return backend
    choices = "; ".join(f"{name}: `{install}`" for name, (_, _, install) in _BACKENDS.items())
    raise UserError(f"no backend is installed; install one of them. {choices}")


def _installed(backend: str) -> bool:
    framework, module, _ = _BACKENDS[backend]
    # in this order: looking for a submodule imports its package
    return all(importlib.util.find_spec(name) for name in (framework, module.split(".")[0], module))
