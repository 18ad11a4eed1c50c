"""Qwen3 checkpoints to GGUF: written by the `gguf` package tensor by tensor, read back and compared.

Keys and tensors are those of llama.cpp's own converter. K-quants are made by the `llama_model_quantize` of an
installed llama.cpp. Needs NumPy only. No twin yet: JAX has no Qwen3.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common.checkpoint import CONFIG_FILE, read_config, read_json, sync
from common.errors import UserError, listed
from common.export.gguf import FILE_TYPES, announce, encoded, kind_of, relative_error

WRITTEN = ("F32", "F16", "BF16", "Q8_0", "Q4_0")  # types that the gguf package writes
# llama_ftype of what an installed llama.cpp makes
K_QUANTS = {"Q3_K_M": 12, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18}
TYPES = (*WRITTEN, *K_QUANTS)
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
# the largest root mean square error of a K-quant's tensor, relative to the tensor's own
K_QUANT_ERROR = {"Q3_K_M": 0.25, "Q4_K_S": 0.15, "Q4_K_M": 0.15, "Q5_K_S": 0.08, "Q5_K_M": 0.08, "Q6_K": 0.04}


def gguf_name(key: str) -> str:
    """`model.layers.0.self_attn.q_proj.weight` -> `blk.0.attn_q.weight`; UserError for a key Qwen3 has
    not.
    """
    stem = key.removesuffix(".weight")
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    name = f"blk.{found[1]}.{_LAYER.get(found[2])}" if found and found[2] in _LAYER else _WHOLE.get(stem)
    if name is None or stem == key:
        raise UserError(f"tensor {key}: not of Qwen3's architecture; GGUF has no name for it.")
    return f"{name}.weight"


def write_gguf(directory: Path, file: Path, kind: str, *, name: str, metadata: Mapping[str, str]) -> None:
    """Write the checkpoint `directory` (Hugging Face names, unquantised) as `file`, of a type of WRITTEN.

    Norms stay F32; a matrix whose rows the type's blocks do not divide becomes F16. Whole or not at all.
    `metadata` holds values for general.* keys. UserError: another architecture, a tokenizer without a chat
    template or with more tokens than the model, a full disk.
    """
    import gguf

    config = _checked_config(directory)
    tokens = read_vocabulary(directory, config["vocab_size"])
    unfinished = file.with_name(f".{file.name}.tmp-{os.getpid()}")
    writer = gguf.GGUFWriter(unfinished, "qwen3")
    try:
        _describe(writer, config, name, kind, metadata)
        _add_tokenizer(writer, tokens)
        kinds = {}
        for key, shape in _shapes(directory, config):
            kinds[key] = kind_of(kind, shape)
            announce(writer, gguf_name(key), shape, kinds[key])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for key, value in _tensors(directory, kinds):
            writer.write_tensor_data(encoded(value, kinds[key]))
        writer.close()
        sync(unfinished)
        unfinished.replace(file)
    except OSError as error:
        raise _cannot_write(file, error) from error
    finally:
        writer.close()
        unfinished.unlink(missing_ok=True)


def verify_gguf(file: Path, directory: Path, kind: str) -> dict[str, float]:
    """Read `file` back and hold it to the checkpoint: names, shapes, every value; returns errors by tensor.

    Types of WRITTEN must be what the checkpoint encodes to, bit for bit; a K-quant's root mean square error,
    relative to the tensor's, stays below K_QUANT_ERROR. UserError names the tensors that differ.
    """
    import gguf

    reader = gguf.GGUFReader(file)
    found = {tensor.name: tensor for tensor in reader.tensors}
    config = _checked_config(directory)
    kinds = {key: kind_of(kind, shape) for key, shape in _shapes(directory, config)}
    names = {gguf_name(key) for key in kinds}
    problems = [f"{name}: missing" for name in sorted(names - found.keys())]
    problems += [f"{name}: unexpected" for name in sorted(found.keys() - names)]
    errors: dict[str, float] = {}
    for key, value in _tensors(directory, {key: kinds[key] for key in kinds if gguf_name(key) in found}):
        tensor = found[gguf_name(key)]
        shape = tuple(int(size) for size in tensor.shape[::-1])
        if shape != value.shape:
            problems.append(f"{tensor.name}: {list(shape)}, expected {list(value.shape)}")
            continue
        read = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        errors[tensor.name] = relative_error(read, value)
        if kind in K_QUANTS:
            if not errors[tensor.name] <= K_QUANT_ERROR[kind]:
                problems.append(f"{tensor.name}: relative error {errors[tensor.name]:.3g}")
        elif encoded(value, kinds[key]).tobytes() != tensor.data.tobytes():
            problems.append(f"{tensor.name}: differs from the checkpoint")
    template = read_vocabulary(directory, config["vocab_size"]).template
    written = reader.get_field("tokenizer.chat_template")
    if written is None or written.contents() != template:
        problems.append("tokenizer.chat_template: not the tokenizer's")
    if problems:
        raise UserError(f"{file}: does not hold what {directory} holds:\n{listed(problems)}\nWrite it again.")
    return errors


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE tokenizer as GGUF stores it; `kinds` are gguf.TokenType numbers."""

    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    template: str
    end: int
    padding: int | None


def read_vocabulary(directory: Path, size: int) -> Vocabulary:
    """The tokenizer of a checkpoint, filled up to the model's vocabulary of `size` with unused tokens."""
    import gguf

    described, settings = (
        read_json(directory / "tokenizer.json"),
        read_json(directory / "tokenizer_config.json"),
    )
    model = described["model"]
    if model.get("type") != "BPE":
        raise UserError(f"{directory / 'tokenizer.json'}: a {model.get('type')} tokenizer; Qwen3's is BPE.")
    ids: dict[int, tuple[str, int]] = {
        number: (token, gguf.TokenType.NORMAL) for token, number in model["vocab"].items()
    }
    for added in described["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        ids[added["id"]] = (added["content"], kind)
    if max(ids) >= size:
        raise UserError(
            f"{directory}: the tokenizer has token {max(ids)} and the model a vocabulary of {size}; they do "
            "not belong together. Copy the tokenizer files of the model's own base."
        )
    numbers = {token: number for number, (token, _) in ids.items()}
    end = _text(settings.get("eos_token"))
    if end not in numbers:
        raise UserError(
            f"{directory / 'tokenizer_config.json'}: eos_token is {end!r}, no token of tokenizer.json; "
            "without it llama.cpp would not know where an answer ends. Copy the base's own tokenizer files."
        )
    filled = [ids.get(i, (f"[PAD{i}]", gguf.TokenType.UNUSED)) for i in range(size)]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return Vocabulary(
        [token for token, _ in filled],
        [int(kind) for _, kind in filled],
        merges,
        read_template(directory, settings),
        numbers[end],
        numbers.get(_text(settings.get("pad_token"))),
    )


def read_template(directory: Path, settings: Mapping[str, Any] | None = None) -> str:
    """The chat template of a checkpoint, verbatim; UserError where there is none."""
    settings = read_json(directory / "tokenizer_config.json") if settings is None else settings
    file = directory / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.exists() else settings.get("chat_template")
    if not isinstance(template, str) or not template:
        raise UserError(
            f"{directory}: the tokenizer has no chat template, without which llama.cpp and QMD would prompt "
            "the model in another form than it was trained in. Copy tokenizer_config.json (or "
            "chat_template.jinja) of the base, Qwen/Qwen3-1.7B."
        )
    return template


def quantize_gguf(source: Path, target: Path, kind: str, *, say: Callable[[str], None] = print) -> None:
    """Make a K-quant of an F32, F16 or BF16 file by an installed llama.cpp.

    UserError lists what was looked for when none is there.
    """
    unfinished = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    looked: list[str] = []
    try:
        for name, quantize in _quantizers(looked):
            say(f"{kind} by {name}")
            quantize(source, unfinished, kind)
            if not unfinished.exists():
                raise UserError(f"{name}: made no {target.name} from {source}; see what it printed.")
            unfinished.replace(target)
            return
    except OSError as error:
        raise _cannot_write(target, error) from error
    finally:
        unfinished.unlink(missing_ok=True)
    raise UserError(
        f"{kind} needs an installed llama.cpp, and none was found. Looked for:\n{listed(looked)}\n"
        "Install one (`brew install llama.cpp`, `npm install node-llama-cpp` in this folder, or "
        f"`pip install llama-cpp-python`), or choose types that need none: {', '.join(WRITTEN)}."
    )


def _checked_config(directory: Path) -> dict[str, Any]:
    config = read_config(directory)
    if config.get("model_type") != "qwen3":
        raise UserError(
            f"{directory / CONFIG_FILE}: model_type is {config.get('model_type')!r}; this export writes "
            "qwen3."
        )
    if "quantization" in config or "quantization_config" in config:
        raise UserError(
            f"{directory}: is quantised; convert the adapter with its base, which dequantises it."
        )
    return config


def _describe(
    writer: Any, config: Mapping[str, Any], name: str, kind: str, metadata: Mapping[str, str]
) -> None:
    import gguf

    writer.add_type("model")
    writer.add_name(name)
    for key, value in metadata.items():
        writer.add_string(f"general.{key}", value)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kind]])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])  # llama.cpp would take hidden / heads
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config.get("rope_parameters") or {}
    base = config.get("rope_theta") or rope.get("rope_theta")
    scaled = config.get("rope_scaling") or (rope if rope.get("rope_type", "default") != "default" else None)
    if base is None or scaled:
        raise UserError(
            f"config.json: rope is {scaled or base!r}; this export writes Qwen3's plain rope_theta."
        )
    writer.add_rope_freq_base(float(base))


def _add_tokenizer(writer: Any, tokens: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens.tokens)
    writer.add_token_types(tokens.kinds)
    writer.add_token_merges(tokens.merges)
    writer.add_eos_token_id(tokens.end)
    if tokens.padding is not None:
        writer.add_pad_token_id(tokens.padding)
        writer.add_bos_token_id(tokens.padding)  # <|endoftext|>, as llama.cpp's converter; never put in front
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokens.template)


def _shapes(directory: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the checkpoint in file order; a head that repeats tied embeddings is left out."""
    for key, part in _slices(directory):
        if not (key == "lm_head.weight" and config.get("tie_word_embeddings")):
            yield key, tuple(part.get_shape())


def _tensors(directory: Path, wanted: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """The same, one at a time, as float32."""
    import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy

    for key, part in _slices(directory):
        if key in wanted:
            yield key, np.asarray(part[:]).astype(np.float32)


def _slices(directory: Path) -> Iterator[tuple[str, Any]]:
    from safetensors import SafetensorError, safe_open

    index = directory / "model.safetensors.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    for name in names:
        try:
            with safe_open(directory / name, framework="np") as file:
                for key in sorted(file.keys()):
                    yield key, file.get_slice(key)
        except (SafetensorError, FileNotFoundError) as error:
            raise UserError(
                f"{directory / name}: cannot be read ({error}). Write or copy it again."
            ) from None


def _text(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


Quantizer = Callable[[Path, Path, str], None]


def _quantizers(looked: list[str]) -> Iterator[tuple[str, Quantizer]]:
    """What can make K-quants here, best first; notes in `looked` what was not there."""
    program = shutil.which("llama-quantize")
    if program:
        yield program, partial(_run_quantize, program)
    looked.append("llama-quantize on the PATH")
    for library in _libraries(looked):
        yield str(library), partial(_call_quantize, library)


def _run_quantize(program: str, source: Path, target: Path, kind: str) -> None:
    done = subprocess.run([program, str(source), str(target), kind], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{program} failed on {source}:\n{(done.stderr or done.stdout).strip()[-500:]}")


def _libraries(looked: list[str]) -> Iterator[Path]:
    """Shared libraries with llama_model_quantize: of llama-cpp-python, of node-llama-cpp."""
    system, suffix = ("mac", "dylib") if sys.platform == "darwin" else ("linux", "so")
    spec = importlib.util.find_spec("llama_cpp")
    if spec is not None and spec.origin is not None:
        yield from Path(spec.origin).parent.glob(f"lib/libllama.{suffix}")
    looked.append(f"libllama.{suffix} in the Python package llama-cpp-python")
    roots = [Path.cwd(), *Path.cwd().parents]
    roots += [Path(path) for path in os.environ.get("NODE_PATH", "").split(os.pathsep) if path]
    roots += [Path(sys.prefix, "lib"), Path("/usr/local/lib"), Path("/opt/homebrew/lib"), Path("/usr/lib")]
    machine = {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    found = f"@node-llama-cpp/{system}-{machine}*/bins/*/libllama.*{suffix}"
    for root in roots:
        for modules in (root / "node_modules", root):
            yield from sorted(modules.glob(found))
    looked.append(f"{found} in node_modules of this folder and those above it, in $NODE_PATH, in npm's own")


def _call_quantize(library: Path, source: Path, target: Path, kind: str) -> None:
    """llama_model_quantize in a process of its own: what a C library does to its process stays there."""
    program = (
        "import json, sys; from pathlib import Path; from mlx_impl.export.gguf import call_library; "
        "call_library(*json.loads(sys.argv[1]))"
    )
    arguments = json.dumps([str(library), str(source), str(target), K_QUANTS[kind]])
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", program, arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
    )
    if done.returncode:
        raise UserError(f"{library} could not quantise {source}:\n{done.stderr.strip()[-500:]}")


class _Parameters(ctypes.Structure):
    """llama_model_quantize_params: the first two fields of every version, and room for the rest."""

    _fields_ = (("nthread", ctypes.c_int32), ("ftype", ctypes.c_int32), ("rest", ctypes.c_byte * 504))


def call_library(library: str, source: str, target: str, ftype: int) -> None:
    """Quantise by a shared library of llama.cpp, in this process."""
    for beside in sorted(Path(library).parent.glob("libggml-base*")):
        ctypes.CDLL(str(beside), mode=ctypes.RTLD_GLOBAL)
    llama = ctypes.CDLL(library)
    llama.llama_model_quantize_default_params.restype = _Parameters
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = ftype
    llama.llama_backend_init()
    code = llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters))
    if code:
        raise RuntimeError(f"llama_model_quantize returned {code}")


def _cannot_write(file: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {file}: {error.strerror or error}. Nothing half written is left; free some space or "
        "choose another --output, then run the same command again."
    )
