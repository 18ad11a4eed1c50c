"""Qwen3, which mlx-lm computes: loaded strictly, adapted by LoRA, stacked, fused.

Source: mlx-lm's models/qwen3.py and tuner/lora.py; Hu et al. 2021, arXiv:2106.09685. An adapter directory is
mlx-lm's: adapters.safetensors and adapter_config.json. No twin: JAX has the shared decoder.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.lora import LoRALinear

from common.checkpoint import CONFIG_FILE, check_keys, read_config, read_json, surviving
from common.errors import UserError
from common.expansion.config import TINY_REMEDY, LoraConfig
from common.hub import resolve_model

ADAPTER_FILE = "adapters.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
GROUP_SIZE = 64  # weights that share a scale in a quantised base
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


@dataclass(frozen=True)
class Origin:
    """What an adapter stands on: a base, how it was loaded, and the adapters below it, lowest first."""

    base: Path
    name: str = ""  # as the user wrote it, where that is a name on the hub
    bits: int = 0  # 4 or 8: the base was quantised after loading
    dtype: str = "auto"
    below: tuple[Path, ...] = ()


@dataclass
class LanguageModel:
    """A Qwen3 of mlx-lm with the config.json of its base, and where it came from."""

    model: Any
    config: dict[str, Any]
    origin: Origin

    @property
    def quantised(self) -> bool:
        """Whether any layer is quantised."""
        return any(isinstance(m, nn.QuantizedLinear) for m in self.model.modules())


def resolve_base(name: str, say: Callable[[str], None] = print) -> Path:
    """The directory of a base; UserError names `--base tiny` where neither hub nor path has it."""
    return resolve_model(name, say=say, remedy=TINY_REMEDY)


def load_base(origin: Origin) -> LanguageModel:
    """The base of `origin`, frozen. UserError: another architecture, tensors that do not fit, a bad
    tokenizer.
    """
    from mlx_lm.utils import load_model

    directory = surviving(origin.base)
    config = read_config(directory)
    if config.get("model_type") != "qwen3":
        raise UserError(
            f"{directory / CONFIG_FILE}: model_type is {config.get('model_type')!r}; this command trains "
            "qwen3 (Qwen/Qwen3-0.6B, -1.7B, -4B and their fine-tunes)."
        )
    try:
        model, _ = load_model(directory, lazy=True)
        mx.eval(model.parameters())
    except (ValueError, RuntimeError, FileNotFoundError, TypeError) as error:
        raise UserError(
            f"{directory}: cannot be loaded as Qwen3 ({str(error).strip()[:600]}). Copy or download it again."
        ) from error
    if origin.dtype != "auto" or mx.default_device() == mx.Device(mx.cpu):
        model.set_dtype(DTYPES.get(origin.dtype, mx.float32))
    if origin.bits:
        nn.quantize(model, GROUP_SIZE, origin.bits, class_predicate=_divides)
    model.freeze()
    return LanguageModel(model, config, origin)


def check_vocabulary(loaded: LanguageModel, tokenizer: Any) -> None:
    """UserError where the tokenizer has tokens that the model has not; a padded vocabulary is fine."""
    size = loaded.config["vocab_size"]
    if len(tokenizer) > size:
        raise UserError(
            f"{loaded.origin.base}: the tokenizer has {len(tokenizer)} tokens and the model a vocabulary of "
            f"{size}; they do not belong together. Copy the tokenizer files of the model's own base."
        )


def add_lora(loaded: LanguageModel, lora: LoraConfig, seed: int) -> list[str]:
    """Put fresh adapters on every linear layer named in `lora.target_modules`, above any that are there.

    They start at zero output; they alone learn, and the embeddings where `lora.train_embeddings`. Returns the
    layers' paths. mlx-lm's scale is alpha / rank.
    """
    model = loaded.model
    model.freeze()
    mx.random.seed(seed)
    kinds = (nn.Linear, nn.QuantizedLinear, LoRALinear)
    chosen = [
        (path, module)
        for path, module in sorted(model.named_modules(), key=lambda named: named[0])
        if path.rpartition(".")[2] in lora.target_modules and isinstance(module, kinds)
    ]
    wrapped = [(path, _wrapped(module, lora)) for path, module in chosen]
    model.update_modules(tree_unflatten(wrapped))
    for _, adapter in wrapped:
        adapter.unfreeze(recurse=False, keys=["lora_a", "lora_b"])
    if lora.train_embeddings:
        model.model.embed_tokens.unfreeze()
        if not loaded.config.get("tie_word_embeddings"):
            model.lm_head.unfreeze()
    mx.eval(model.parameters())
    return [path for path, _ in wrapped]


def hidden_states(
    model: Any, ids: mx.array, rows: mx.array | None = None, *, checkpoint: bool = False
) -> mx.array:
    """What the head reads of ids [B, S]: [B, S, D], causal; with `rows` [B, S] a token sees those of its own
    row's number alone. With `checkpoint` a layer's activations are computed again in the backward pass.
    """
    mask: Any = "causal"
    if rows is not None:
        mask = ((rows[:, :, None] == rows[:, None, :]) & causal(ids.shape[1]))[:, None]  # [B, 1, S, S]
    hidden = model.model.embed_tokens(ids)
    for layer in model.layers:
        hidden = _applied(layer, lambda layer, hidden: layer(hidden, mask, None), checkpoint)(hidden)
    return model.model.norm(hidden)


def continued_states(
    model: Any,
    prompts: mx.array,
    padding: mx.array,
    rows: mx.array,
    ids: mx.array,
    *,
    checkpoint: bool = False,
) -> mx.array:
    """What the head reads of ids [N, T], each after row `rows` [N] of prompts [P, S]: [N, T, D].

    `padding` [P] counts what stands in a row before its prompt. A prompt is computed once for all that
    continue it; gradients flow through it. `checkpoint` as in `hidden_states`.
    """
    length, new = prompts.shape[1], ids.shape[1]
    places = mx.arange(length)
    read = places >= padding[:, None]  # [P, S]
    above = causal(length) & (read[:, None] | (places[:, None] == places))  # padding sees itself: no NaN
    masks = (
        above[:, None],
        mx.concatenate(
            [
                mx.broadcast_to(read[rows][:, None], (len(rows), new, length)),
                mx.broadcast_to(causal(new), (len(rows), new, new)),
            ],
            axis=-1,
        )[:, None],
    )

    def both(layer: Any, prompt: mx.array, hidden: mx.array) -> tuple[mx.array, mx.array]:
        shared = _LayerCache(-padding)
        prompt = layer(prompt, masks[0], shared)
        return prompt, layer(hidden, masks[1], _LayerCache((length - padding)[rows], shared, rows))

    prompt, hidden = model.model.embed_tokens(prompts), model.model.embed_tokens(ids)
    for layer in model.layers:
        prompt, hidden = _applied(layer, both, checkpoint)(prompt, hidden)
    return model.model.norm(hidden)


def causal(length: int) -> mx.array:
    """[S, S]: whether a place sees another."""
    places = mx.arange(length)
    return places[:, None] >= places


class _LayerCache:
    """One layer's keys and values, as a cache that mlx-lm's attention asks: those of this pass, after the
    `rows` of those `before`.
    """

    def __init__(
        self, offset: mx.array, before: _LayerCache | None = None, rows: mx.array | None = None
    ) -> None:
        self.offset, self.before, self.rows = offset, before, rows

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys, self.values = keys, values
        if self.before is None:
            return keys, values
        return (
            mx.concatenate([self.before.keys[self.rows], keys], axis=2),
            mx.concatenate([self.before.values[self.rows], values], axis=2),
        )


def _applied(layer: Any, function: Callable[..., Any], checkpoint: bool) -> Callable[..., Any]:
    """`function` of the layer and arrays, as a function of the arrays."""
    if not checkpoint:
        return partial(function, layer)

    def inner(parameters: Any, *arrays: mx.array) -> Any:
        layer.update(parameters)
        return function(layer, *arrays)

    return partial(mx.checkpoint(inner), layer.trainable_parameters())


def head(model: Any, hidden: mx.array) -> mx.array:
    """Logits [..., V] of hidden states [..., D]."""
    tied = model.args.tie_word_embeddings
    return model.model.embed_tokens.as_linear(hidden) if tied else model.lm_head(hidden)


def without_adapter(model: Any) -> AbstractContextManager[None]:
    """The model as it is below its topmost adapters, inside the block."""
    return _exchanged(model, lambda adapter: adapter.linear if _learns(adapter) else adapter)


def with_fused_adapters(loaded: LanguageModel) -> AbstractContextManager[None]:
    """The model with its adapters added into copies of the weights inside the block, where it is fastest to
    generate; as it is where the base is quantised.
    """
    return nullcontext() if loaded.quantised else _exchanged(loaded.model, _fused)


@contextmanager
def _exchanged(model: Any, function: Callable[[LoRALinear], nn.Module]) -> Iterator[None]:
    adapters = _adapters(model)
    model.update_modules(tree_unflatten([(path, function(adapter)) for path, adapter in adapters]))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(list(adapters)))


def _adapters(model: Any) -> list[tuple[str, LoRALinear]]:
    """The topmost adapters by their paths."""
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, LoRALinear)]
    return [(path, module) for path, module in found if not path.endswith(".linear")]


def load_adapter(loaded: LanguageModel, directory: Path) -> None:
    """Put the adapter of a directory on the model, frozen, without dropout; trained embeddings replace the
    base's.

    UserError when a tensor of it does not fit.
    """
    directory = surviving(directory)
    settings = read_json(directory / ADAPTER_CONFIG)
    parameters = settings.get("lora_parameters")
    if settings.get("fine_tune_type", "lora") != "lora" or not isinstance(parameters, dict):
        raise UserError(f"{directory / ADAPTER_CONFIG}: not a LoRA adapter; expected `lora_parameters`.")
    numbers = [parameters.get("rank"), parameters.get("scale")]
    if not parameters.get("keys") or not all(isinstance(x, int | float) and x > 0 for x in numbers):
        raise UserError(
            f"{directory / ADAPTER_CONFIG}: `lora_parameters` is {parameters}; expected `keys`, the names of "
            "the adapted layers, and a `rank` and a `scale` above 0."
        )
    targets = tuple(sorted({key.rpartition(".")[2] for key in parameters["keys"]}))
    lora = LoraConfig(parameters["rank"], parameters["rank"] * parameters["scale"], 0.0, targets)
    try:
        tensors = mx.load(str(directory / ADAPTER_FILE))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{directory / ADAPTER_FILE}: truncated or missing ({error}). Copy it again."
        ) from None
    assert isinstance(tensors, dict)
    whole = ("model.embed_tokens.weight", "lm_head.weight")
    add_lora(loaded, lora, seed=0)
    expected = dict(_flat(loaded.model.trainable_parameters()))
    there = dict(_flat(loaded.model.parameters()))
    expected |= {key: there[key] for key in whole if key in tensors and key in there}
    check_keys(
        {key: tuple(value.shape) for key, value in expected.items()},
        {key: tuple(value.shape) for key, value in tensors.items()},
        where=f"{directory / ADAPTER_FILE}, on the base {loaded.origin.base}",
    )
    loaded.model.load_weights(list(tensors.items()), strict=False)
    loaded.model.freeze()
    mx.eval(loaded.model.parameters())


def read_origin(directory: Path, base: str | None = None, say: Callable[[str], None] = print) -> Origin:
    """What the adapter of a directory stands on, as written there; `base` names another place of the base."""
    settings = read_json(surviving(directory) / ADAPTER_CONFIG)
    written = settings.get("resonance", {})
    name = base or settings.get("model")
    if not name:
        raise UserError(f"{directory / ADAPTER_CONFIG}: does not name its base; give it with --base.")
    below = tuple(_beside(directory, Path(path)) for path in written.get("below", ()))
    found = resolve_base(name, say)
    return Origin(found, _hub_name(name), written.get("bits", 0), written.get("dtype", "auto"), below)


def _hub_name(name: str) -> str:
    return "" if Path(name).expanduser().exists() else name


def _beside(directory: Path, path: Path) -> Path:
    """A path that was written relative to the adapter's directory."""
    return path if path.is_absolute() else (directory / path).resolve()


def find_adapter(path: Path) -> Path | None:
    """The adapter directory that a path means, a run's folder standing for its best/; None for a whole
    model.
    """
    path = surviving(path.expanduser())
    for place in (path, surviving(path / "best")):
        if (place / ADAPTER_CONFIG).exists():
            return place
    return None


def load_trained(
    name: str, base: str | None = None, say: Callable[[str], None] = print, dtype: str = "auto"
) -> LanguageModel:
    """A model as trained: an adapter or run with all that it stands on, or a whole checkpoint, in evaluation
    mode.

    Adapters of a base that is not quantised are fused into it. `base` replaces the recorded base's place,
    `dtype` ("auto": as recorded) the type of its weights.
    """
    directory = find_adapter(Path(name))
    if directory is None:
        loaded = load_base(Origin(resolve_base(name, say), dtype=dtype))
    else:
        origin = read_origin(directory, base, say)
        origin = origin if dtype == "auto" else replace(origin, dtype=dtype)
        loaded = load_base(origin)
        for adapter in (*origin.below, directory):
            load_adapter(loaded, adapter)
            if not loaded.quantised:
                fuse(loaded)
        loaded.origin = replace(origin, below=(*origin.below, directory.resolve()))
    loaded.model.eval()
    return loaded


def fuse(loaded: LanguageModel, *, dequantise: bool = False) -> None:
    """Add the adapters into the weights, in place; with `dequantise` every quantised layer becomes plain."""
    from mlx_lm.utils import dequantize_model

    fused = [(path, _fused(adapter)) for path, adapter in _adapters(loaded.model)]
    loaded.model.update_modules(tree_unflatten(fused))
    if dequantise:
        dequantize_model(loaded.model)
    loaded.model.freeze()
    mx.eval(loaded.model.parameters())


def adapter_tensors(loaded: LanguageModel) -> dict[str, mx.array]:
    """What learns, by the names of mlx-lm's adapter files."""
    return dict(_flat(loaded.model.trainable_parameters()))


def adapter_config(loaded: LanguageModel, lora: LoraConfig) -> dict[str, Any]:
    """adapter_config.json in mlx-lm's schema; `resonance` says what the adapter stands on."""
    origin, layers = loaded.origin, loaded.model.layers
    keys = [path for path, _ in _adapters(layers[0])]
    return {
        "fine_tune_type": "lora",
        "model": origin.name or str(origin.base.resolve()),
        "num_layers": len(layers),
        "lora_parameters": {
            "rank": lora.rank,
            "scale": lora.alpha / lora.rank,
            "dropout": lora.dropout,
            "keys": sorted(key for key in keys if key.rpartition(".")[2] in lora.target_modules),
        },
        "resonance": {
            "bits": origin.bits,
            "dtype": origin.dtype,
            "below": [str(path) for path in origin.below],
            "train_embeddings": lora.train_embeddings,
        },
    }


def fused_tensors(loaded: LanguageModel) -> dict[str, mx.array]:
    """Every weight by its Hugging Face name, of a model without adapters."""
    return dict(_flat(loaded.model.parameters()))


def write_tensors(file: Path, tensors: Mapping[str, mx.array]) -> None:
    """A safetensors file of MLX arrays, bfloat16 too. Raises OSError when it cannot be written."""
    try:
        mx.save_safetensors(str(file), dict(tensors), metadata={"format": "pt"})
    except (RuntimeError, ValueError) as error:
        free = shutil.disk_usage(file.parent).free
        size = sum(value.nbytes for value in tensors.values())
        code = errno.ENOSPC if free < size else errno.EIO
        raise OSError(code, f"{os.strerror(code)} ({error})") from error


def _wrapped(linear: Any, lora: LoraConfig) -> LoRALinear:
    scale = lora.alpha / lora.rank
    if not isinstance(linear, LoRALinear):
        return LoRALinear.from_base(linear, r=lora.rank, dropout=lora.dropout, scale=scale)
    inputs, outputs = linear.lora_a.shape[0], linear.lora_b.shape[1]
    above = LoRALinear(inputs, outputs, r=lora.rank, dropout=lora.dropout, scale=scale)
    below: Any = linear  # frozen, and without dropout: load_adapter
    above.linear = below
    return above


def _fused(layer: LoRALinear) -> Any:
    below = layer.linear
    try:
        if isinstance(below, LoRALinear):
            layer.linear = _fused(below)
        return layer.fuse(dequantize=True)
    finally:
        layer.linear = below


def _learns(module: LoRALinear) -> bool:
    return "lora_a" in module.trainable_parameters()


def _divides(path: str, module: nn.Module) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % GROUP_SIZE == 0


def _flat(tree: Any) -> list[tuple[str, Any]]:
    found: Any = tree_flatten(tree)
    return sorted(found)
