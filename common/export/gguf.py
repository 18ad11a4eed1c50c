"""Rerankers and sentence encoders of the BERT family as GGUF: llama.cpp's rank and embedding pooling.

Keys and tensors are those of llama.cpp's own converter, and with them the head that it leaves out: pooler ->
`cls`, classifier -> `cls.output`, so that rank pooling gives the portable score. Needs NumPy and the `gguf`
package. mlx_impl/export/gguf.py writes Qwen3, with the same types.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.checkpoint import CONFIG_FILE, read_config, read_tensors, surviving
from common.config import RerankerConfig
from common.errors import UserError, listed
from common.export.verification import Exported, Precision
from common.keymap import FAMILIES
from common.reranker.loading import check_pooling, longest_input
from common.text import PairTokenizer

KINDS: dict[Precision, str] = {"fp32": "F32", "fp16": "F16", "int8": "Q8_0"}
FILE_TYPES = {
    "F32": "ALL_F32",
    "F16": "MOSTLY_F16",
    "BF16": "MOSTLY_BF16",
    "Q8_0": "MOSTLY_Q8_0",
    "Q4_0": "MOSTLY_Q4_0",
}
_WHOLE = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
    "pooler.dense": "cls",
    "classifier": "cls.output",
}
_LAYER = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
_EXACT = ("position_embd", "token_types", "cls")  # small, and the score hangs on them: always float32
_SPECIAL = {"[CLS]": "bos", "[SEP]": "sep", "[PAD]": "pad", "[UNK]": "unk", "[MASK]": "mask"}


def export_cross_encoder(directory: Path, precision: Precision) -> Exported:
    """The portable score of the reranker in a directory, for `llama-server --reranking` (rank pooling).

    Raises UserError for another family, for a base that has no head yet, and for a tokenizer that llama.cpp
    would read otherwise.
    """
    directory, recipe = surviving(directory), RerankerConfig()
    config = _checked_config(directory)
    settings = dict(config.get("resonance") or {})
    if settings.get("passage_segment"):
        raise UserError(
            f"{directory}: its passages have segment 1, and llama.cpp knows segment 0 only. Train with "
            "--model.passage-segment 0."
        )
    tensors = {gguf_name(key): value for key, value in _tensors(directory).items()}
    missing = [name for name in ("cls", "cls.output") if f"{name}.weight" not in tensors]
    if missing:
        raise UserError(
            f"{directory}: no reranker yet, it has no {' and no '.join(missing)} (pooler, classifier). Train "
            "it first, or export it with --kind bi-encoder."
        )
    limits = {key: getattr(recipe.data, key) for key in ("max_query_tokens", "max_passage_tokens")}
    tokenizer = PairTokenizer(directory, **{key: settings.get(key) or limits[key] for key in limits})
    settings |= {"fusion_weight": 0.0, "confidence": None}  # both were chosen for the full score
    about = {"kind": "cross-encoder", "score": "portable", "precision": precision}
    config |= {"resonance": settings, "gguf": about}
    return _exported(directory, precision, config, tensors, tokenizer, "RANK")


def export_bi_encoder(directory: Path, precision: Precision) -> Exported:
    """The sentence encoder in a directory, for `llama-server --embedding` (mean pooling). Raises UserError as
    above."""
    directory = surviving(directory)
    config = _checked_config(directory)
    check_pooling(directory)
    tensors = {gguf_name(key): value for key, value in _tensors(directory).items()}
    tensors = {name: value for name, value in tensors.items() if not name.startswith("cls")}
    longest = longest_input(directory)
    config |= {"gguf": {"kind": "bi-encoder", "precision": precision, "max_tokens": longest}}
    return _exported(directory, precision, config, tensors, PairTokenizer(directory), "MEAN")


def gguf_name(key: str) -> str:
    """`bert.encoder.layer.0.output.dense.bias` -> `blk.0.ffn_down.bias`; UserError for a key that BERT has
    not."""
    stem, _, part = key.removeprefix("bert.").rpartition(".")
    found = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", stem)
    name = f"blk.{found[1]}.{_LAYER.get(found[2])}" if found and found[2] in _LAYER else _WHOLE.get(stem)
    if name is None or part not in ("weight", "bias"):
        raise UserError(f"tensor {key}: not of BERT's architecture; GGUF has no name for it.")
    return f"{name}.{part}"


def kind_of(kind: str, shape: Sequence[int]) -> str:
    """The type of a tensor in a file of type `kind`: vectors stay F32, and rows that the type's blocks do not
    divide become F16."""
    if len(shape) == 1:
        return "F32"
    return "F16" if kind in ("Q8_0", "Q4_0") and shape[-1] % 32 else kind


def announce(writer: Any, name: str, shape: Sequence[int], kind: str) -> None:
    """Tell a GGUFWriter of a tensor that will follow as `encoded` has it."""
    import gguf

    type_ = gguf.GGMLQuantizationType[kind]
    plain = {"F32": np.float32, "F16": np.float16}
    if kind in plain:
        size = int(np.prod(shape)) * np.dtype(plain[kind]).itemsize
        writer.add_tensor_info(name, shape, np.dtype(plain[kind]), size)
        return
    packed = gguf.quant_shape_to_byte_shape(shape, type_)
    writer.add_tensor_info(name, packed, np.dtype(np.uint8), int(np.prod(packed)), raw_dtype=type_)


def encoded(value: np.ndarray, kind: str) -> np.ndarray:
    """float32 values as a type of `FILE_TYPES` stores them."""
    import gguf

    if kind in ("F32", "F16"):
        return value.astype(np.float32 if kind == "F32" else np.float16)
    return gguf.quants.quantize(value, gguf.GGMLQuantizationType[kind])


def relative_error(read: np.ndarray, value: np.ndarray) -> float:
    """Root mean square of the difference, relative to that of `value`."""
    scale = float(np.sqrt(np.mean(np.square(value), dtype=np.float64)))
    return float(np.sqrt(np.mean(np.square(read - value), dtype=np.float64))) / max(scale, 1e-12)


def _checked_config(directory: Path) -> dict[str, Any]:
    config = {key: value for key, value in read_config(directory).items() if not key.startswith("_")}
    if (family := config.get("model_type")) != "bert":
        others = ", ".join(sorted(set(FAMILIES) - {"bert"}))
        raise UserError(
            f"{directory}: a {family} model; exported to GGUF is bert (MiniLM is one), not {others}. "
            "llama.cpp's own converter knows some of those."
        )
    if (config.get("hidden_act") or "gelu") != "gelu":
        raise UserError(
            f"{directory / CONFIG_FILE}: hidden_act is {config['hidden_act']!r}; llama.cpp's is gelu."
        )
    return config


def _tensors(directory: Path) -> dict[str, np.ndarray]:
    """The encoder's tensors, pooler and classifier in float32; what a pretraining head left behind is not."""
    left = re.compile(r"(bert\.)?embeddings\.position_ids|cls\..*")
    found = read_tensors(directory)
    return {key: value.astype(np.float32) for key, value in found.items() if not left.fullmatch(key)}


def _exported(
    directory: Path,
    precision: Precision,
    config: dict[str, Any],
    tensors: Mapping[str, np.ndarray],
    tokenizer: PairTokenizer,
    pooling: str,
) -> Exported:
    vocabulary = _vocabulary(directory, tokenizer, int(config["vocab_size"]))
    with tempfile.TemporaryDirectory(prefix="resonance-gguf-") as folder:
        file = Path(folder) / "model.gguf"
        _write(file, KINDS[precision], config, tensors, vocabulary, pooling)
        errors = _read_back(file, KINDS[precision], tensors)
        return Exported(file.read_bytes(), config, tokenizer.save, errors, "gguf")


def _write(
    file: Path,
    kind: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    vocabulary: tuple[list[str], list[int]],
    pooling: str,
) -> None:
    import gguf

    writer = gguf.GGUFWriter(file, "bert")
    try:
        writer.add_type("model")
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kind]])
        writer.add_block_count(int(config["num_hidden_layers"]))
        writer.add_context_length(int(config["max_position_embeddings"]))
        writer.add_embedding_length(int(config["hidden_size"]))
        writer.add_feed_forward_length(int(config["intermediate_size"]))
        writer.add_head_count(int(config["num_attention_heads"]))
        writer.add_layer_norm_eps(float(config.get("layer_norm_eps") or 1e-12))
        writer.add_causal_attention(False)
        writer.add_pooling_type(gguf.PoolingType[pooling])
        _add_tokenizer(writer, config, *vocabulary)
        kinds = {name: _tensor_kind(name, kind, value.shape) for name, value in tensors.items()}
        for name, value in tensors.items():
            announce(writer, name, value.shape, kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, value in tensors.items():
            writer.write_tensor_data(encoded(value, kinds[name]))
    finally:
        writer.close()


def _tensor_kind(name: str, kind: str, shape: Sequence[int]) -> str:
    return "F32" if name.startswith(_EXACT) else kind_of(kind, shape)


def _add_tokenizer(writer: Any, config: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> None:
    """WordPiece. A pair is [CLS] query [SEP] passage [SEP]: llama.cpp ends both sides with its end token."""
    writer.add_token_type_count(int(config.get("type_vocab_size") or 1))
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("bert-bge")
    writer.add_token_list(_phantom(tokens, kinds))
    writer.add_token_types(kinds)
    for token, role in _SPECIAL.items():
        getattr(writer, f"add_{role}_token_id")(tokens.index(token))
    writer.add_eos_token_id(tokens.index("[SEP]"))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)
    writer.add_add_sep_token(False)


def _phantom(tokens: Sequence[str], kinds: Sequence[int]) -> list[str]:
    """As llama.cpp keeps WordPiece: what begins a word has a mark before it, what goes on has none."""
    import gguf

    control = (gguf.TokenType.CONTROL, gguf.TokenType.UNUSED)
    return [
        token if kind in control else token[2:] if token.startswith("##") else "\u2581" + token
        for token, kind in zip(tokens, kinds, strict=True)
    ]


def _vocabulary(directory: Path, tokenizer: PairTokenizer, size: int) -> tuple[list[str], list[int]]:
    """Tokens and their kinds, filled up to the model's vocabulary. UserError for a tokenizer that llama.cpp
    would read otherwise."""
    import gguf

    described = tokenizer.described
    model, normalizer = described["model"], described.get("normalizer") or {}
    wanted = {"type": "BertNormalizer", "lowercase": True}
    wrong = [f"{k} is {normalizer.get(k)!r}" for k, v in wanted.items() if normalizer.get(k) != v]
    if normalizer.get("strip_accents") is False:
        wrong.append("it keeps accents")
    if model.get("type") != "WordPiece" or wrong:
        raise UserError(
            f"{directory}: llama.cpp's BERT tokenizer is WordPiece in lower case without accents, this is "
            f"{model.get('type')} ({'; '.join(wrong) or 'no WordPiece'}): llama.cpp would read other tokens."
        )
    ids = {number: (token, int(gguf.TokenType.NORMAL)) for token, number in model["vocab"].items()}
    for added in described["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        ids[added["id"]] = (added["content"], int(kind))
    for number, (token, _) in list(ids.items()):
        if token in _SPECIAL:
            ids[number] = (token, int(gguf.TokenType.CONTROL))
    missing = set(_SPECIAL) - {token for token, _ in ids.values()}
    if missing or max(ids) >= size:
        what = f"lacks {', '.join(sorted(missing))}" if missing else f"has token {max(ids)} of {size}"
        raise UserError(f"{directory}: the tokenizer {what}; it does not belong to this model.")
    filled = [ids.get(i, (f"[PAD{i}]", int(gguf.TokenType.UNUSED))) for i in range(size)]
    return [token for token, _ in filled], [kind for _, kind in filled]


def _read_back(file: Path, kind: str, tensors: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Hold every value of the file to the checkpoint; the relative error of each quantized tensor."""
    import gguf

    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    problems = [f"{name}: missing" for name in sorted(tensors.keys() - found.keys())]
    errors: dict[str, float] = {}
    for name, value in tensors.items():
        own = _tensor_kind(name, kind, value.shape)
        tensor = found.get(name)
        if tensor is None or encoded(value, own).tobytes() != tensor.data.tobytes():
            problems += [f"{name}: differs from the checkpoint"] if tensor is not None else []
        elif own != "F32":
            read = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(value.shape)
            errors[name] = relative_error(read, value)
    if problems:
        raise UserError(f"{file.name}: does not hold what the checkpoint holds:\n{listed(problems)}")
    return errors
