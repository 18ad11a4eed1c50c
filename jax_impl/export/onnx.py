"""Rerankers and sentence encoders of the BERT family as ONNX, written with onnxruntime's fused operators.

The graph is emitted node by node from a checkpoint's tensors: what a converter would have to find again and
fuse (attention, residual with normalisation, bias with GELU) is written as one operator of `com.microsoft`.
Rows and tokens are dynamic. MLX checkpoints are the same files, so there is no twin; mlx_impl/export writes
GGUF.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.checkpoint import read_config, surviving
from common.config import RerankerConfig
from common.errors import UserError
from common.export.onnx_scoring import onnx_feed
from common.export.verification import Exported, Precision
from common.keymap import FAMILIES
from common.reranker.loading import longest_input
from common.text import PASSAGE, QUERY, Encoded, PairTokenizer
from jax_impl.loading import load_bi_encoder, load_cross_encoder, model_tensors

OPSET, IR_VERSION = 20, 10  # read by onnxruntime from 1.18 on
FUSED = "com.microsoft"
LARGEST = 2**31 - 2**24  # bytes of weights, with room for the graph: protobuf's limit
EPSILON = 1e-12  # of the projector, inside every root
CALIBRATION_ROWS = 8
SMOOTHING = 0.8  # the part of a channel's range that goes from int8's activations into its weights
HEADS = ("resonance", "real", "real_part", "root_fidelity", "overlap", "cls")  # model.head that is exported
Arrays = Mapping[str, np.ndarray]
Outputs = dict[str, tuple[str, list[Any]]]  # name -> what computes it and its shape


def export_cross_encoder(
    directory: Path,
    precision: Precision,
    score: Literal["full", "portable"] = "full",
    *,
    reduce_range: bool = False,
    calibration: Sequence[tuple[str, str]] = (),
) -> Exported:
    """The reranker in a directory, as `common.export.verification.write_export` writes it.

    Full: (input_ids, sides) [N, S] int64 -> score, portable, resonance, overlap, coherence, each [N].
    Portable: (input_ids, attention_mask, token_type_ids when the passage has segment 1) -> logits [N, 1].
    `calibration`: (query, passage) pairs on which int8 sees the ranges of its activations; see Graph.
    Raises UserError for a family or a head that is not exported.
    """
    directory, recipe = surviving(directory), RerankerConfig()
    _check_family(directory)
    loaded = load_cross_encoder(directory, recipe.model, seed=recipe.train.seed)
    limits = {key: getattr(recipe.data, key) for key in ("max_query_tokens", "max_passage_tokens")}
    settings = {**limits, **loaded.settings}
    if score == "full" and settings["head"] not in HEADS:
        raise UserError(
            f"{directory}: its head is {settings['head']!r}; exported are {', '.join(HEADS)}. Export its "
            "portable score (--score portable)."
        )
    if score == "portable":  # both were chosen for the full score
        settings |= {"fusion_weight": 0.0, "confidence": None}
    tensors = model_tensors(loaded.model)
    tokenizer = PairTokenizer(directory, settings["max_query_tokens"], settings["max_passage_tokens"])
    segment = int(settings["passage_segment"])

    def build(graph: Graph) -> Outputs:
        return (_full if score == "full" else _portable)(graph, tensors, loaded.config, settings)

    about: dict[str, Any] = {"kind": "cross-encoder", "score": score, "precision": precision}
    ranges: Arrays = {}
    if precision == "int8" and calibration:
        rows = tokenizer.encode_pairs(*([pair[side] for pair in calibration] for side in (0, 1)))
        ranges, about["calibrated_on"] = _ranges(build, tokenizer, rows, segment), len(rows)
    graph = Graph(precision, reduce_range, ranges)
    model = graph.model(build(graph))
    config = {key: value for key, value in loaded.config.items() if not key.startswith("_")}
    config |= {"resonance": settings, "onnx": about}
    return Exported(model, config, lambda place: tokenizer.save(place, segment), graph.errors)


def export_bi_encoder(
    directory: Path, precision: Precision, *, reduce_range: bool = False, calibration: Sequence[str] = ()
) -> Exported:
    """The sentence encoder in a directory: (input_ids, attention_mask) [N, S] int64 -> sentence_embedding
    [N, D], of unit length. `calibration`: texts, as above. Raises UserError as above."""
    directory = surviving(directory)
    _check_family(directory)
    tensors = model_tensors(load_bi_encoder(directory).encoder)
    config = read_config(directory)
    tokenizer, longest = PairTokenizer(directory), longest_input(directory)

    def build(graph: Graph) -> Outputs:
        ids, mask = graph.input("input_ids"), graph.input("attention_mask")
        real = graph.node("Cast", [mask], to=1)  # [N, S] float32
        hidden = _encoder(graph, tensors, config, "", ids, real)
        pooled = graph.node("Squeeze", [_means(graph, hidden, [real]), graph.axes(1)])  # [N, D]
        unit = graph.node("Div", [pooled, graph.root(graph.sum(graph.square(pooled)), EPSILON)])
        return {"sentence_embedding": (unit, ["rows", int(config["hidden_size"])])}

    about: dict[str, Any] = {"kind": "bi-encoder", "precision": precision, "max_tokens": longest}
    ranges: Arrays = {}
    if precision == "int8" and calibration:
        rows = tokenizer.encode_texts(list(calibration), longest)
        ranges, about["calibrated_on"] = _ranges(build, tokenizer, rows), len(rows)
    graph = Graph(precision, reduce_range, ranges)
    model = graph.model(build(graph))
    config = {key: value for key, value in config.items() if not key.startswith("_")} | {"onnx": about}
    return Exported(model, config, tokenizer.save, graph.errors)


class Graph:
    """Nodes and weights of a model under construction; every method returns the name of what it made.

    `precision` says how the encoder's matrices and its word embeddings are kept: fp32; fp16 (half the size,
    computed in float32); int8 (symmetric, a scale for each output).
    `reduce_range` keeps int8 weights within 7 bits, for processors without VNNI, where sums of products may
    overflow. `errors` gets the relative error of each quantized matrix.

    `ranges`: the least and the largest value of each channel that a matrix reads, [2, D] by key. int8
    quantizes its activations in that range; without, in the range of each batch, so that a score depends on
    its neighbours. A few channels are far larger than the others, and all have one scale: each is divided by
    range^SMOOTHING and its weights grow by as much (SmoothQuant: Xiao et al. 2022, arXiv:2211.10438).
    """

    def __init__(
        self, precision: Precision, reduce_range: bool = False, ranges: Arrays | None = None
    ) -> None:
        self.precision, self.largest = precision, 63 if reduce_range else 127
        self.ranges: Arrays = ranges or {}
        self.read: dict[str, tuple[str, int]] = {}  # of each matrix: what it reads, of which size
        self.errors: dict[str, float] = {}
        self._nodes: list[Any] = []
        self._weights: dict[str, np.ndarray] = {}
        self._inputs: list[tuple[str, str, Sequence[int | str]]] = []
        self._made = 0

    def input(self, name: str, shape: Sequence[int | str] = ("rows", "tokens"), kind: str = "INT64") -> str:
        """Of a shape with names for dynamic sizes; `kind` is INT64 or FLOAT."""
        self._inputs.append((name, kind, shape))
        return name

    def weight(self, name: str, value: np.ndarray) -> str:
        if name not in self._weights:
            self._weights[name] = np.array(value, order="C")
        elif not np.array_equal(self._weights[name], value):
            raise ValueError(f"{name}: two weights of one name")
        return name

    def constant(self, value: float) -> str:
        return self.weight(f"float {value!r}", np.asarray(value, np.float32))

    def axes(self, *values: int) -> str:
        return self.weight(f"axes {values}", np.asarray(values, np.int64))

    def node(self, operator: str, inputs: Sequence[str], domain: str = "", **attributes: Any) -> str:
        return self.nodes(operator, inputs, 1, domain, **attributes)[0]

    def nodes(
        self, operator: str, inputs: Sequence[str], outputs: int, domain: str = "", **attributes: Any
    ) -> list[str]:
        from onnx import helper

        self._made += 1
        name = f"{operator}_{self._made}"
        made = [f"{name}:{number}" for number in range(outputs)]
        self._nodes.append(helper.make_node(operator, inputs, made, name=name, domain=domain, **attributes))
        return made

    def choice(
        self, condition: str, yes: Callable[[], Sequence[str]], no: Callable[[], Sequence[str]]
    ) -> list[str]:
        """What `yes` makes where the scalar `condition` is true, else what `no` makes: as many float32
        arrays. Only one of the two is computed."""
        branches = {"then_branch": self._branch(yes), "else_branch": self._branch(no)}
        return self.nodes("If", [condition], len(branches["then_branch"].output), **branches)

    def sum(self, x: str) -> str:
        """Over the last axis, which stays with length 1."""
        return self.node("ReduceSum", [x, self.axes(-1)])

    def square(self, x: str) -> str:
        return self.node("Mul", [x, x])

    def root(self, x: str, inside: float) -> str:
        """sqrt(x + inside)."""
        return self.node("Sqrt", [self.node("Add", [x, self.constant(inside)])])

    def product(self, x: str, key: str, weight: np.ndarray, bias: np.ndarray | None = None) -> str:
        """x [..., D] times weight [F, D] transposed, in the graph's precision, plus bias [F]."""
        self.read[key] = x, weight.shape[1]
        matrix = np.ascontiguousarray(weight.T, np.float32)
        if self.precision != "int8":
            y = self.node("MatMul", [x, self._stored(key, matrix)])
            return y if bias is None else self.node("Add", [y, self.weight(f"{key}.bias", bias)])
        if key in self.ranges:
            return self._calibrated(x, key, matrix, bias)
        quantized, scale, zero, *rest = self._integers(key, matrix, bias)
        return self.node("DynamicQuantizeMatMul", [x, quantized, scale, zero, *rest], FUSED)

    def _calibrated(self, x: str, key: str, matrix: np.ndarray, bias: np.ndarray | None) -> str:
        """x [..., D] times matrix [D, F] with the activations quantized in the range that calibration saw."""
        low, high = self.ranges[key]
        seen = np.maximum(np.abs(low), np.abs(high))
        seen = np.maximum(seen, 0.01 * seen.max() + 1e-5)  # what was silent may speak
        largest = np.maximum(np.abs(matrix).max(axis=1), 1e-5)
        factor = (seen**SMOOTHING / largest ** (1 - SMOOTHING)).astype(np.float32)  # [D]
        least, most = min(0.0, float((low / factor).min())), max(1e-5, float((high / factor).max()))
        step = np.asarray((most - least) / 255, np.float32)
        unit = self.weight(f"{key}.step", step)
        origin = self.weight(f"{key}.origin", np.asarray(np.rint(-least / step), np.uint8))
        smooth = self.node("Mul", [x, self.weight(f"{key}.smooth", 1 / factor)])
        read = self.node("QuantizeLinear", [smooth, unit, origin])
        quantized, scale, zero, *rest = self._integers(key, matrix * factor[:, None], bias)
        inputs = [read, quantized, unit, scale, origin, zero, *rest]
        return self.node("MatMulIntegerToFloat", inputs, FUSED)

    def _integers(self, key: str, matrix: np.ndarray, bias: np.ndarray | None) -> list[str]:
        """A matrix [D, F] as int8, its scales and zero points, and the bias where there is one."""
        quantized, scale = self._quantized(key, matrix)
        return [
            self.weight(f"{key}.int8", quantized),
            self.weight(f"{key}.scale", scale[0]),
            self.weight(f"{key}.zero", np.zeros(matrix.shape[1], np.int8)),
            *([] if bias is None else [self.weight(f"{key}.bias", bias)]),
        ]

    def embedding(self, ids: str, key: str, table: np.ndarray, *, tied: bool = False) -> str:
        """Rows of the table [V, D], in the graph's precision: int8 has a scale for each row.

        `tied` reads what `product` stores of the same key and table, which then lies in the file once.
        """
        if tied:
            return self._tied(ids, key, table)
        if self.precision != "int8":
            return self.node("Gather", [self._stored(key, np.asarray(table, np.float32)), ids])
        quantized, scale = self._quantized(key, np.asarray(table, np.float32).T)
        rows = self.node("Gather", [self.weight(f"{key}.int8", quantized.T), ids])
        scales = self.node("Gather", [self.weight(f"{key}.scale", scale.T), ids])  # [N, S, 1]
        return self.node("Mul", [self.node("Cast", [rows], to=1), scales])

    def linear(self, x: str, key: str, weight: np.ndarray, bias: np.ndarray | None = None) -> str:
        """x [..., D] to [..., F] in float32 whatever the precision: for the small layers that make the
        score."""
        y = self.node("MatMul", [x, self.weight(key, np.asarray(weight, np.float32).T)])
        return y if bias is None else self.node("Add", [y, self.weight(f"{key}.bias", bias)])

    def model(self, outputs: Mapping[str, tuple[str, list[Any]]]) -> bytes:
        """The whole model; `outputs`: name -> what computes it and its shape. UserError for one over 2 GiB,
        which a file of ONNX does not hold."""
        from onnx import TensorProto, checker, helper, numpy_helper

        size = sum(value.nbytes for value in self._weights.values())
        if size > LARGEST:
            raise UserError(
                f"the weights in {self.precision} have {size / 2**30:.1f} GiB, and a file of ONNX holds 2: "
                "choose a smaller --precision, fp16 or int8"
            )
        for name, (made, _) in outputs.items():
            self._nodes.append(helper.make_node("Identity", [made], [name], name=f"output {name}"))
        graph = helper.make_graph(
            self._nodes,
            "resonance",
            [
                helper.make_tensor_value_info(name, TensorProto.DataType.Value(kind), shape)
                for name, kind, shape in self._inputs
            ],
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, size)
                for name, (_, size) in outputs.items()
            ],
            [numpy_helper.from_array(value, name) for name, value in self._weights.items()],
        )
        versions = [helper.make_opsetid("", OPSET), helper.make_opsetid(FUSED, 1)]
        model = helper.make_model(
            graph, opset_imports=versions, ir_version=IR_VERSION, producer_name="resonance"
        )
        checker.check_model(model)
        return bytes(model.SerializeToString())

    def _branch(self, make: Callable[[], Sequence[str]]) -> Any:
        """What `make` adds, as a graph of its own; its weights stay with the whole."""
        from onnx import TensorProto, helper

        outer, self._nodes = self._nodes, []
        results = [self.node("Identity", [made]) for made in make()]
        infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in results]
        made = helper.make_graph(self._nodes, f"branch {results[0]}", [], infos)
        self._nodes = outer
        return made

    def _tied(self, ids: str, key: str, table: np.ndarray) -> str:
        matrix = np.ascontiguousarray(table.T, np.float32)  # [D, V]
        if self.precision != "int8":
            columns = self.node("Gather", [self._stored(key, matrix), ids], axis=1)  # [D, N, S]
            return self.node("Transpose", [columns], perm=[1, 2, 0])
        quantized, scale = self._quantized(key, matrix)
        columns = self.node("Gather", [self.weight(f"{key}.int8", quantized), ids], axis=1)
        rows = self.node("Transpose", [self.node("Cast", [columns], to=1)], perm=[1, 2, 0])
        scales = self.node("Gather", [self.weight(f"{key}.scale", scale[0]), ids])  # [N, S]
        return self.node("Mul", [rows, self.node("Unsqueeze", [scales, self.axes(-1)])])

    def _stored(self, key: str, value: np.ndarray) -> str:
        if self.precision == "fp16":
            return self.node(
                "Cast", [self.weight(key, value.astype(np.float16))], to=1
            )  # folded when it is loaded
        return self.weight(key, value)

    def _quantized(self, key: str, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int8 [D, F] and float32 [1, F] with matrix = int8 * scale, rounded."""
        scale = np.maximum(np.abs(matrix).max(axis=0, keepdims=True), 1e-12) / self.largest
        quantized = np.clip(np.rint(matrix / scale), -self.largest, self.largest).astype(np.int8)
        error = np.linalg.norm(matrix - quantized * scale) / max(float(np.linalg.norm(matrix)), 1e-30)
        self.errors[key] = float(error)
        return quantized, scale.astype(np.float32)


def _ranges(
    build: Callable[[Graph], Outputs], tokenizer: PairTokenizer, rows: Sequence[Encoded], segment: int = 0
) -> dict[str, np.ndarray]:
    """Of the fp32 graph over some rows: `ranges` of Graph."""
    import onnxruntime

    graph = Graph("fp32")
    outputs = build(graph)
    seen: Outputs = {
        f"{key} reads": (name, ["rows", "tokens", size]) for key, (name, size) in graph.read.items()
    }
    session = onnxruntime.InferenceSession(graph.model(outputs | seen), providers=["CPUExecutionProvider"])
    asked = [given.name for given in session.get_inputs()]
    found = {key: np.zeros((2, size), np.float32) for key, (_, size) in graph.read.items()}
    for at in range(0, len(rows), CALIBRATION_ROWS):
        feed = onnx_feed(tokenizer, rows[at : at + CALIBRATION_ROWS], segment)
        values = session.run(list(seen), {name: feed[name] for name in asked})
        for key, value in zip(found, values, strict=True):
            real = value[feed["attention_mask"] > 0]  # [tokens, D]
            low, high = found[key]
            found[key] = np.stack([np.minimum(low, real.min(axis=0)), np.maximum(high, real.max(axis=0))])
    return found


def _check_family(directory: Path) -> None:
    family = read_config(directory).get("model_type")
    if family != "bert":
        others = ", ".join(sorted(set(FAMILIES) - {"bert"}))
        raise UserError(
            f"{directory}: a {family} model; exported to ONNX is bert (MiniLM is one), not {others}. For "
            "those, transformers' own exporter (optimum) writes the portable score."
        )


def _full(
    graph: Graph, tensors: Arrays, config: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, tuple[str, list[Any]]]:
    """The five outputs of a reranker with its head."""
    ids, sides = graph.input("input_ids"), graph.input("sides")
    masks = []
    for side in (QUERY, PASSAGE):
        equal = graph.node("Equal", [sides, graph.weight(f"side {side}", np.asarray(side, np.int64))])
        masks.append(graph.node("Cast", [equal], to=1))  # [N, S]
    segments = graph.node("Cast", [masks[1]], to=7) if settings["passage_segment"] else None
    real = graph.node("Add", masks)
    hidden = _encoder(graph, tensors, config, "bert.", ids, real, segments)
    states = _states(graph, tensors, settings, _means(graph, hidden, masks))
    pooled = _pooled(graph, tensors, hidden)
    resonance, overlap, coherence = _compared(graph, settings["head"], states)  # [N, 1] each
    linear = graph.linear(pooled, "u", tensors["resonance.u"][None])
    weighted = graph.node("Mul", [resonance, graph.weight("gamma", tensors["resonance.gamma"].reshape(1, 1))])
    both = graph.node("Add", [linear, weighted])
    score = graph.node("Add", [both, graph.weight("b", tensors["resonance.b"].reshape(1, 1))])
    portable = graph.linear(pooled, "classifier", tensors["classifier.weight"], tensors["classifier.bias"])
    found = {"score": score, "portable": portable, "resonance": resonance}
    found |= {"overlap": overlap, "coherence": coherence}
    return {name: (graph.node("Squeeze", [x, graph.axes(1)]), ["rows"]) for name, x in found.items()}


def _portable(
    graph: Graph, tensors: Arrays, config: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, tuple[str, list[Any]]]:
    """What `transformers` calls logits: the classifier of the pooled [CLS]."""
    ids, mask = graph.input("input_ids"), graph.input("attention_mask")
    segments = graph.input("token_type_ids") if settings["passage_segment"] else None
    hidden = _encoder(graph, tensors, config, "bert.", ids, graph.node("Cast", [mask], to=1), segments)
    pooled = _pooled(graph, tensors, hidden)
    logits = graph.linear(pooled, "classifier", tensors["classifier.weight"], tensors["classifier.bias"])
    return {"logits": (logits, ["rows", 1])}


def _encoder(
    graph: Graph,
    tensors: Arrays,
    config: Mapping[str, Any],
    prefix: str,
    ids: str,
    real: str,
    segments: str | None = None,
) -> str:
    """Hidden states [N, S, D] of the last layer; `real` [N, S] is 1.0 at tokens, which padding follows."""
    x = _embedded(graph, tensors, config, prefix, ids, segments)
    length = graph.node(
        "ReduceSum", [graph.node("Cast", [real], to=6), graph.axes(1)], keepdims=0
    )  # [N] int32
    for number in range(int(config["num_hidden_layers"])):
        x = _layer(graph, tensors, config, f"{prefix}encoder.layer.{number}.", x, length)
    return x


def _embedded(
    graph: Graph, tensors: Arrays, config: Mapping[str, Any], prefix: str, ids: str, segments: str | None
) -> str:
    at = f"{prefix}embeddings."
    words = graph.embedding(ids, f"{at}word_embeddings", tensors[f"{at}word_embeddings.weight"])
    table, types = (tensors[f"{at}{kind}_embeddings.weight"] for kind in ("position", "token_type"))
    places = graph.weight(f"{at}places", table if segments else table + types[:1])  # segment 0 throughout
    tokens = graph.node("Shape", [ids], start=1, end=2)
    x = graph.node("Add", [words, graph.node("Slice", [places, graph.axes(0), tokens, graph.axes(0)])])
    if segments:
        x = graph.node("Add", [x, graph.node("Gather", [graph.weight(f"{at}types", types), segments])])
    norm = [graph.weight(f"{at}{part}", tensors[f"{at}LayerNorm.{part}"]) for part in ("weight", "bias")]
    return graph.node("LayerNormalization", [x, *norm], axis=-1, epsilon=_norm_epsilon(config))


def _layer(graph: Graph, tensors: Arrays, config: Mapping[str, Any], at: str, x: str, length: str) -> str:
    own = {key.removeprefix(at): value for key, value in tensors.items() if key.startswith(at)}
    parts = [f"attention.self.{name}" for name in ("query", "key", "value")]
    together = np.concatenate([own[f"{part}.weight"] for part in parts])  # [3D, D]
    bias = graph.weight(f"{at}qkv.bias", np.concatenate([own[f"{part}.bias"] for part in parts]))
    qkv = graph.product(x, f"{at}qkv", together)
    split = graph.nodes("Split", [qkv], 3, axis=-1, num_outputs=3)
    heads = int(config["num_attention_heads"])
    context = graph.node("MultiHeadAttention", [*split, bias, length], FUSED, num_heads=heads)
    dense = [own[f"attention.output.dense.{part}"] for part in ("weight", "bias")]
    y = graph.product(context, f"{at}attention", *dense)
    x = _residual(graph, own, config, at, "attention.output", y, x)
    inner = graph.product(x, f"{at}intermediate", own["intermediate.dense.weight"])
    inner = _activated(graph, config, inner, graph.weight(f"{at}inner.bias", own["intermediate.dense.bias"]))
    y = graph.product(inner, f"{at}output", *(own[f"output.dense.{part}"] for part in ("weight", "bias")))
    return _residual(graph, own, config, at, "output", y, x)


def _residual(
    graph: Graph, own: Arrays, config: Mapping[str, Any], at: str, part: str, y: str, x: str
) -> str:
    """LayerNorm(y + x). onnxruntime's operator for both takes ten times as long on a CPU as the two apart;
    common/export/onnx_scoring.py keeps it from fusing them.
    """
    weights = [
        graph.weight(f"{at}{part}.{name}", own[f"{part}.{name}"])
        for name in ("LayerNorm.weight", "LayerNorm.bias")
    ]
    added = graph.node("Add", [y, x])
    return graph.node("LayerNormalization", [added, *weights], axis=-1, epsilon=_norm_epsilon(config))


def _activated(graph: Graph, config: Mapping[str, Any], x: str, bias: str) -> str:
    kind = config.get("hidden_act") or "gelu"
    if kind == "relu":
        return graph.node("Relu", [graph.node("Add", [x, bias])])
    return graph.node("BiasGelu" if kind == "gelu" else "FastGelu", [x, bias], FUSED)


def _norm_epsilon(config: Mapping[str, Any]) -> float:
    return float(config.get("layer_norm_eps") or 1e-12)


def _pooled(graph: Graph, tensors: Arrays, hidden: str) -> str:
    """tanh of the pooler over [CLS], [N, D]."""
    first = graph.node("Gather", [hidden, graph.weight("first", np.asarray(0, np.int64))], axis=1)
    dense = [tensors[f"bert.pooler.dense.{part}"] for part in ("weight", "bias")]
    return graph.node("Tanh", [graph.linear(first, "pooler", *dense)])


def _means(graph: Graph, hidden: str, masks: Sequence[str]) -> str:
    """Mean of hidden [N, S, D] over each mask [N, S] -> [N, masks, D]; zero where one is empty."""
    stacked = [graph.node("Unsqueeze", [mask, graph.axes(1)]) for mask in masks]
    weights = graph.node("Concat", stacked, axis=1) if len(stacked) > 1 else stacked[0]
    count = graph.node("Max", [graph.sum(weights), graph.constant(1.0)])  # [N, masks, 1]
    return graph.node("Div", [graph.node("MatMul", [weights, hidden]), count])


def _states(graph: Graph, tensors: Arrays, settings: Mapping[str, Any], means: str) -> tuple[str, str]:
    """The projector: means [N, 2, D] -> (re, im), each [N, 2, C], together of unit length."""
    kind = "real" if settings["head"] == "real" else settings["parameterisation"]
    re, im = amplitudes(graph, tensors, "resonance.projector.", kind, means)
    length = graph.root(graph.sum(graph.node("Add", [graph.square(re), graph.square(im)])), EPSILON)
    return graph.node("Div", [re, length]), graph.node("Div", [im, length])


def amplitudes(graph: Graph, tensors: Arrays, at: str, kind: str, hidden: str) -> tuple[str, str]:
    """A projector's (re, im) of hidden [..., D], each [..., C], not normalised; jax_impl/models/projector."""

    def layer(name: str) -> str:
        bias = tensors.get(f"{at}{name}.bias")
        return graph.linear(hidden, f"{at}{name}", tensors[f"{at}{name}.weight"], bias)

    if kind == "real":
        re, im = graph.nodes("Split", [layer("proj")], 2, axis=-1, num_outputs=2)
    elif kind == "polar":
        magnitude = graph.node("Softplus", [layer("magnitude")])
        phase = graph.node("Mul", [graph.node("Tanh", [layer("phase")]), graph.constant(float(np.pi))])
        re, im = (graph.node("Mul", [magnitude, graph.node(part, [phase])]) for part in ("Cos", "Sin"))
    else:
        re, im = layer("proj_re"), layer("proj_im")
    return re, im


def _compared(graph: Graph, head: str, states: tuple[str, str]) -> tuple[str, str, str]:
    """(the head's number, overlap, coherence) of the two sides' states, each [N, 1];
    common.reference.projector."""
    place = [graph.weight(f"place {number}", np.asarray(number, np.int64)) for number in (0, 1)]
    (a, b), (c, d) = (
        [graph.node("Gather", [part, place[side]], axis=1) for part in states] for side in (0, 1)
    )  # re and im of the query, of the passage: [N, C]

    def inner(operator: str, *pairs: tuple[str, str]) -> str:
        return graph.sum(graph.node(operator, [graph.node("Mul", list(pair)) for pair in pairs]))

    re, im = inner("Add", (a, c), (b, d)), inner("Sub", (a, d), (b, c))
    magnitudes = [
        graph.root(graph.node("Add", [graph.square(x), graph.square(y)]), EPSILON)
        for x, y in ((a, b), (c, d))
    ]
    overlap = graph.sum(graph.node("Mul", magnitudes))
    amplitude = graph.root(graph.node("Add", [graph.square(re), graph.square(im)]), EPSILON**2)
    nothing = graph.node("Mul", [re, graph.constant(0.0)])
    number = {"overlap": overlap, "root_fidelity": amplitude, "cls": nothing}.get(head, re)
    return number, overlap, graph.node("Div", [amplitude, overlap])
