"""Language models as ONNX: decoder (Llama, Qwen3), Indra, Infinito with its memory; past in, present out.

One graph reads a prompt and goes on token by token: rows, tokens and past are dynamic. Inputs and outputs are
named as common/export/onnx_generation.py says, those of the cache as Hugging Face's exports name them. There
is no twin: MLX checkpoints are the same files.

Letters: N rows, S tokens of a call, P of the past, T = P + S, D width, H heads, G heads of keys and values, R
heads that share one, K head width, M slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.checkpoint import read_config, surviving
from common.errors import UserError
from common.export.onnx_generation import KIND, Shape, model_inputs, past_inputs, present_name
from common.export.verification import Exported, Precision
from common.language.architectures import (
    DecoderConfig,
    IndraConfig,
    InfinitoConfig,
    LanguageModelConfig,
    language_config,
)
from common.language.text import load_tokenizer
from jax_impl.export.onnx import FUSED, Arrays, Graph, amplitudes
from jax_impl.language import language_tensors, load_language_model
from jax_impl.models.memory import EMPTY

HIDDEN = -1e9  # added to the logits of what is not seen
END = np.iinfo(np.int64).max


def export_language_model(directory: Path, precision: Precision, *, reduce_range: bool = False) -> Exported:
    """The language model in a directory, as `common.export.verification.write_export` writes it.

    Its inputs are `model_inputs` and `past_inputs` of common.export.onnx_generation; its outputs logits [N,
    kept, V] and the presents. Raises UserError for an LSTM, for weights that do not fit config.json, and for
    more than a file of ONNX holds.
    """
    directory = surviving(directory)
    source = read_config(directory)
    if getattr(language_config(source, directory), "architecture", None) == "lstm":
        raise UserError(
            f"{directory}: an LSTM; exported to ONNX are llama, qwen3, indra, and infinito with its control "
            "transformer"
        )
    model, config = load_language_model(directory)
    graph = Graph(precision, reduce_range)
    outputs = _outputs(graph, language_tensors(model), config)
    tokenizer = load_tokenizer(directory)
    about = {
        "kind": KIND,
        "precision": precision,
        "context": config.context,
        "segmented": model.segmented,
        "end": tokenizer.end,
    }
    kept = {key: value for key, value in source.items() if not key.startswith("_")}
    return Exported(graph.model(outputs), kept | {"onnx": about}, tokenizer.save, graph.errors)


class _Around(NamedTuple):
    """What the blocks of one call share."""

    bias: str  # [N, 1, S, T], or [N, 1, 1, S, T] where heads share keys
    places: str  # [N, S] int64
    rotation: tuple[str, str]  # cosines and sines [context, K/2]
    shapes: tuple[str, str]  # [N, G, R, S, T] and [N, G, R S, T]


def _outputs(
    graph: Graph, tensors: Arrays, config: LanguageModelConfig
) -> dict[str, tuple[str, list[int | str]]]:
    """The whole model; name -> what computes it and its shape."""
    for name, shape in model_inputs(config).items():
        graph.input(name, shape)
    shapes = past_inputs(config)
    past = {name: graph.input(name, shape, "FLOAT") for name, shape in shapes.items()}
    blocks = config if isinstance(config, DecoderConfig) else config.blocks()
    root = "model." if isinstance(config, DecoderConfig) else ""
    tied, table = config.tie_word_embeddings, tensors[f"{root}embed_tokens.weight"]
    present: dict[str, str] = {}
    memory = _memory(graph, tensors, config, past) if _remembers(config) else {}
    around = _surroundings(graph, blocks, bool(memory))
    x = graph.embedding("input_ids", "embed_tokens", table, tied=tied)  # [N, S, D]
    if isinstance(config, IndraConfig) and config.projector != "none":
        x = _projected(graph, tensors, config, "projector", "mix", x)
    for number in range(blocks.num_hidden_layers):
        if memory and isinstance(config, InfinitoConfig) and number == config.reads_at:
            x, states = _recalled(graph, tensors, config, memory, x)
            present["past_states"] = graph.node("Concat", [past["past_states"], states], axis=1)
        own = {
            key.removeprefix(at): a
            for key, a in tensors.items()
            if key.startswith(at := f"{root}layers.{number}.")
        }
        names = [f"past_key_values.{number}.{part}" for part in ("key", "value")]
        x, *after = _layer(graph, own, blocks, number, x, around, [past[name] for name in names])
        present |= dict(zip(names, after, strict=True))
    x = _normalised(graph, blocks, "norm", tensors[f"{root}norm.weight"], _last(graph, x))  # [N, kept, D]
    if isinstance(config, IndraConfig) and config.projector != "none":
        x = _projected(graph, tensors, config, "state_projector", "recombine", x)
    head = graph.product(
        x, "embed_tokens" if tied else "lm_head", table if tied else tensors["lm_head.weight"]
    )
    made: dict[str, tuple[str, list[int | str]]] = {"logits": (head, ["rows", "kept", config.vocab_size])}
    return made | {present_name(n): ((memory | present)[n], _grown(shapes[n])) for n in shapes}


def _remembers(config: LanguageModelConfig) -> bool:
    return isinstance(config, InfinitoConfig) and config.remembers


def _grown(shape: Shape) -> list[int | str]:
    return ["past + tokens" if size == "past" else size for size in shape]


def _surroundings(graph: Graph, blocks: DecoderConfig, renews: bool) -> _Around:
    """Who sees whom, and where: a token sees the real ones up to itself, of its own segment."""
    tokens = graph.node("Shape", ["input_ids"], start=1, end=2)  # [1]
    total = graph.node("Shape", ["attention_mask"], start=1, end=2)
    before = graph.node("Sub", [total, tokens])
    zero, one, stop, first = (
        graph.weight("zero", np.asarray(0, np.int64)),
        graph.weight("one", np.asarray(1, np.int64)),
        graph.node("Squeeze", [total]),
        graph.node("Squeeze", [before]),
    )
    columns = graph.node("Range", [zero, stop, one])  # [T]
    queries = graph.node("Unsqueeze", [graph.node("Range", [first, stop, one]), graph.axes(1)])  # [S, 1]
    seen = graph.node("Unsqueeze", [_true(graph, "attention_mask"), graph.axes(1)])  # [N, 1, T]
    if renews:
        old = graph.node("Unsqueeze", [_true(graph, "new_segment"), graph.axes(1, 2)])  # [N, 1, 1]
        hidden = graph.node("And", [old, graph.node("Less", [columns, before])])
        seen = graph.node("And", [seen, graph.node("Not", [hidden])])
    visible = graph.node("And", [seen, graph.node("LessOrEqual", [columns, queries])])  # [N, S, T]
    bias = graph.node("Where", [visible, graph.constant(0.0), graph.constant(HIDDEN)])
    groups, share = blocks.key_value_heads, blocks.num_attention_heads // blocks.key_value_heads
    bias = graph.node("Unsqueeze", [bias, graph.axes(1, 2) if share > 1 else graph.axes(1)])
    rows = graph.node("Shape", ["input_ids"], start=0, end=1)
    apart = graph.node("Concat", [rows, graph.axes(groups), graph.axes(share), tokens, total], axis=0)
    joined = graph.node("Concat", [rows, graph.axes(groups), graph.axes(-1), total], axis=0)
    frequencies = np.asarray(blocks.inverse_frequencies(), np.float32)
    angles = np.arange(blocks.context, dtype=np.float32)[:, None] * frequencies  # [context, K/2]
    rotation = graph.weight("cosines", np.cos(angles)), graph.weight("sines", np.sin(angles))
    return _Around(bias, "position_ids", rotation, (apart, joined))


def _true(graph: Graph, integers: str) -> str:
    return graph.node("Cast", [integers], to=9)


def _last(graph: Graph, x: str) -> str:
    """The last `num_logits_to_keep` columns of x [N, S, D], all for 0."""
    start = graph.node("Unsqueeze", [graph.node("Neg", ["num_logits_to_keep"]), graph.axes(0)])
    return graph.node("Slice", [x, start, graph.axes(END), graph.axes(1)])


def _normalised(graph: Graph, blocks: DecoderConfig, key: str, weight: np.ndarray, x: str) -> str:
    """x / sqrt(mean x^2 + eps) * weight over the last axis, as nodes that onnxruntime fuses."""
    square = graph.node("Pow", [x, graph.constant(2.0)])
    mean = graph.node("ReduceMean", [square, graph.axes(-1)])
    unit = graph.node("Div", [x, graph.root(mean, blocks.rms_norm_eps)])
    return graph.node("Mul", [unit, graph.weight(f"{key}.weight", weight)])


def _split(graph: Graph, x: str, sizes: list[int]) -> list[str]:
    """The last axis in parts."""
    return graph.nodes("Split", [x, graph.axes(*sizes)], len(sizes), axis=-1)


def _heads(graph: Graph, x: str, heads: int, width: int) -> str:
    """[N, S, H K] -> [N, S, H, K]."""
    return graph.node("Reshape", [x, graph.axes(0, 0, heads, width)])


def _first(graph: Graph, x: str) -> str:
    """[N, S, H, K] -> [N, H, S, K], or back."""
    return graph.node("Transpose", [x], perm=[0, 2, 1, 3])


def _projection(graph: Graph, own: Arrays, at: str, names: list[str], x: str) -> str:
    """Several linear layers of x as one product, their outputs one behind the other."""
    key = f"{at}{'+'.join(names)}"
    y = graph.product(x, key, np.concatenate([own[f"{name}.weight"] for name in names]))
    if f"{names[0]}.bias" not in own:
        return y
    bias = np.concatenate([own[f"{name}.bias"] for name in names])
    return graph.node("Add", [y, graph.weight(f"{key}.bias", bias)])


def _layer(
    graph: Graph, own: Arrays, blocks: DecoderConfig, number: int, x: str, around: _Around, past: list[str]
) -> tuple[str, str, str]:
    """States [N, S, D] after a block, and its keys and values [N, G, T, K]."""
    at = f"layers.{number}."
    hidden = _normalised(graph, blocks, f"{at}input_layernorm", own["input_layernorm.weight"], x)
    added, key, value = _attention(graph, own, blocks, at, hidden, around, past)
    x = graph.node("Add", [x, added])
    norm = "post_attention_layernorm"
    hidden = _normalised(graph, blocks, f"{at}{norm}", own[f"{norm}.weight"], x)
    inner = _projection(graph, own, at, ["mlp.gate_proj", "mlp.up_proj"], hidden)
    gate, up = _split(graph, inner, [blocks.intermediate_size] * 2)
    gated = graph.node("Mul", [graph.node("Mul", [gate, graph.node("Sigmoid", [gate])]), up])
    return graph.node("Add", [x, _projection(graph, own, at, ["mlp.down_proj"], gated)]), key, value


def _attention(
    graph: Graph, own: Arrays, blocks: DecoderConfig, at: str, x: str, around: _Around, past: list[str]
) -> tuple[str, str, str]:
    heads, groups, width = blocks.num_attention_heads, blocks.key_value_heads, blocks.head_width
    names = [f"self_attn.{part}_proj" for part in "qkv"]
    together = _projection(graph, own, at, names, x)
    parts = _split(graph, together, [heads * width, groups * width, groups * width])
    turned = []
    for part, count, norm in zip(parts[:2], (heads, groups), ("q_norm", "k_norm"), strict=True):
        part = _heads(graph, part, count, width)
        if blocks.family == "qwen3":
            part = _normalised(graph, blocks, f"{at}{norm}", own[f"self_attn.{norm}.weight"], part)
        inputs = [_first(graph, part), around.places, *around.rotation]
        turned.append(graph.node("RotaryEmbedding", inputs, FUSED))  # [N, H or G, S, K]
    query = graph.node("Mul", [turned[0], graph.constant(width**-0.5)])
    key = graph.node("Concat", [past[0], turned[1]], axis=2)  # [N, G, T, K]
    value = _first(graph, _heads(graph, parts[2], groups, width))
    value = graph.node("Concat", [past[1], value], axis=2)
    shared = groups < heads
    if shared:  # heads that share keys stand one after the other: no key is copied
        query = graph.node("Reshape", [query, graph.axes(0, groups, -1, width)])  # [N, G, R S, K]
    scores = graph.node("MatMul", [query, graph.node("Transpose", [key], perm=[0, 1, 3, 2])])
    if shared:
        scores = graph.node("Reshape", [scores, around.shapes[0]])  # [N, G, R, S, T]
    weights = graph.node("Softmax", [graph.node("Add", [scores, around.bias])], axis=-1)
    if shared:
        weights = graph.node("Reshape", [weights, around.shapes[1]])
    context = graph.node("MatMul", [weights, value])  # [N, H, S, K] or [N, G, R S, K]
    if shared:
        context = graph.node("Reshape", [context, graph.axes(0, heads, -1, width)])
    context = graph.node("Reshape", [_first(graph, context), graph.axes(0, 0, heads * width)])
    return _projection(graph, own, at, ["self_attn.o_proj"], context), key, value


def _projected(graph: Graph, tensors: Arrays, config: IndraConfig, name: str, mix: str, x: str) -> str:
    """Indra's projector and what makes [.., D] of its state."""
    parts = amplitudes(graph, tensors, f"{name}.", config.projector, x)
    return graph.product(graph.node("Concat", list(parts), axis=-1), mix, tensors[f"{mix}.weight"])


def _memory(
    graph: Graph, tensors: Arrays, config: LanguageModelConfig, past: Mapping[str, str]
) -> dict[str, str]:
    """The memory that this call reads: with what the past of rows with a new segment leaves in it."""
    assert isinstance(config, InfinitoConfig)
    names = [name for name in past if name.startswith(("past_memory.", "past_recalled."))]
    some = graph.node("ReduceMax", ["new_segment"], keepdims=0)
    begins = graph.node("Greater", [some, graph.weight("zero", np.asarray(0, np.int64))])

    def renewed() -> list[str]:
        written = _written(graph, tensors, config, past)
        rows = graph.node("Shape", [written[0]], start=0, end=1)
        shape = graph.node("Concat", [rows, graph.axes(1), graph.axes(config.hidden_size)], axis=0)
        null = graph.node("Expand", [graph.weight("memory.null", tensors["memory.null"]), shape])
        slots = graph.node("Concat", [written[0], null], axis=1)  # [N, M + 1, D]
        heads = config.num_attention_heads
        width = config.hidden_size // heads
        for part in ("k_proj", "v_proj"):
            known = graph.product(slots, f"memory.{part}", tensors[f"memory.{part}.weight"])
            written.append(_first(graph, _heads(graph, known, heads, width)))  # [N, H, M + 1, K]
        return written

    made = graph.choice(begins, renewed, lambda: [past[name] for name in names])
    return dict(zip(names, made, strict=True))


def _written(graph: Graph, tensors: Arrays, config: InfinitoConfig, past: Mapping[str, str]) -> list[str]:
    """(slots, importance, age) after the past's states, as jax_impl.models.memory.SlotMemory.write; rows
    without a new segment have no real state, which changes nothing."""
    writes = config.memory_writes
    slots, importance, age = (past[f"past_memory.{part}"] for part in ("slots", "importance", "age"))
    before = graph.node("Shape", [past["past_states"]], start=1, end=2)
    mask = graph.node("Slice", ["attention_mask", graph.axes(0), before, graph.axes(1)])
    begins = graph.node("Unsqueeze", [_true(graph, "new_segment"), graph.axes(1)])  # [N, 1]
    real = graph.node("And", [_true(graph, mask), begins])  # [N, P]
    # as many places without a token behind them, so that there are enough to choose from
    states = graph.node("Pad", [past["past_states"], graph.axes(0, 0, 0, 0, writes, 0)])  # [N, P + W, D]
    real = _true(graph, graph.node("Pad", [graph.node("Cast", [real], to=6), graph.axes(0, 0, 0, writes)]))
    layer = [tensors[f"memory.importance.{part}"] for part in ("weight", "bias")]
    found = graph.node("Sigmoid", [graph.linear(states, "memory.importance", *layer)])
    found = graph.node("Squeeze", [found, graph.axes(-1)])  # [N, P + W]
    order = graph.node("Where", [real, graph.node("Neg", [found]), graph.constant(1.0)])
    chosen = _smallest(graph, order, graph.axes(writes))  # [N, W]
    active = graph.node("Cast", [real], to=1)
    active = _true(graph, graph.node("ReduceMax", [active, graph.axes(1)]))  # [N, 1]
    faded = graph.node("Mul", [importance, graph.constant(config.memory_decay)])
    old = graph.node("Where", [active, faded, importance])  # [N, M]
    count = graph.axes(config.memory_slots)
    ranks = _smallest(graph, _smallest(graph, old, count), count)  # [N, M]
    bound = graph.weight("writes", np.asarray(writes, np.int64))
    last = graph.weight("last write", np.asarray(writes - 1, np.int64))
    source = graph.node("GatherElements", [chosen, graph.node("Min", [ranks, last])], axis=1)
    replaced = graph.node(
        "And", [graph.node("Less", [ranks, bound]), graph.node("GatherElements", [real, source], axis=1)]
    )
    new = graph.node("GatherND", [states, graph.node("Unsqueeze", [source, graph.axes(-1)])], batch_dims=1)
    filled = graph.node("And", [active, graph.node("Greater", [old, graph.constant(0.0)])])
    older = graph.node("Add", [age, graph.node("Cast", [filled], to=1)])
    own = graph.node("GatherElements", [found, source], axis=1)
    return [
        graph.node("Where", [graph.node("Unsqueeze", [replaced, graph.axes(-1)]), new, slots]),
        graph.node("Where", [replaced, own, old]),
        graph.node("Where", [replaced, graph.constant(0.0), older]),
    ]


def _smallest(graph: Graph, x: str, count: str) -> str:
    """Places of the smallest of each row, smallest first, the first of equal ones first."""
    return graph.nodes("TopK", [x, count], 2, axis=1, largest=0, sorted=1)[1]


def _recalled(
    graph: Graph, tensors: Arrays, config: InfinitoConfig, memory: Mapping[str, str], x: str
) -> tuple[str, str]:
    """x [N, S, D] with what the memory adds, and the states [N, S, D] that may be written."""
    blocks, heads = config.blocks(), config.num_attention_heads
    width = config.hidden_size // heads
    states = _normalised(graph, blocks, "memory.norm", tensors["memory.norm.weight"], x)
    query = graph.product(states, "memory.q_proj", tensors["memory.q_proj.weight"])
    query = _first(graph, _heads(graph, query, heads, width))
    query = graph.node("Mul", [query, graph.constant(width**-0.5)])
    key = graph.node("Transpose", [memory["past_recalled.key"]], perm=[0, 1, 3, 2])
    importance = memory["past_memory.importance"]
    filled = graph.node("Greater", [importance, graph.constant(0.0)])
    log = graph.node("Log", [graph.node("Where", [filled, importance, graph.constant(1.0)])])
    bias = graph.node("Where", [filled, log, graph.constant(EMPTY)])
    bias = graph.node("Pad", [bias, graph.axes(0, 0, 0, 1)])  # the null slot's importance is 1
    bias = graph.node("Unsqueeze", [bias, graph.axes(1, 2)])  # [N, 1, 1, M + 1]
    scores = graph.node("Add", [graph.node("MatMul", [query, key]), bias])
    read = graph.node("MatMul", [graph.node("Softmax", [scores], axis=-1), memory["past_recalled.value"]])
    read = graph.node("Reshape", [_first(graph, read), graph.axes(0, 0, config.hidden_size)])
    added = graph.product(read, "memory.o_proj", tensors["memory.o_proj.weight"])
    gated = graph.node("Mul", [added, graph.weight("memory.gate", tensors["memory.gate"])])
    return graph.node("Add", [x, gated]), states
