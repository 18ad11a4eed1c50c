"""Turn a trained query expander into a checkpoint and GGUF files for QMD, llama.cpp and Ollama.

example: python mlx_impl/convert.py runs/qmd-sft --output export/qmd-expansion --types Q8_0 Q4_K_M
example: python mlx_impl/convert.py runs/qmd-grpo --types Q4_K_M --ollama qmd-expansion

Adapters are fused into their base (a quantised base is dequantised); hf/ in the output is a Hugging Face
checkpoint. Every file is read back and compared with it, and run in llama.cpp beside mlx-lm where the package
xllamacpp is installed. K-quants (Q4_K_M, ...) need an installed llama.cpp.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from common.checkpoint import (
    CONFIG_FILE,
    MODEL_FILE,
    TRAINING_FILE,
    check_writable,
    read_json,
    to_json,
    write_directory,
    write_file,
)
from common.errors import UserError, run_command
from common.expansion.qmd import Sampling
from common.language.text import copy_tokenizer
from mlx_impl.export import gguf, runtime


@dataclass(frozen=True)
class ConvertOptions:
    model: tyro.conf.Positional[str]
    """Run, adapter directory, or Qwen3 checkpoint."""
    output: Path = Path("export/qmd-expansion")
    """Folder of what is written; its name is the model's."""
    types: tuple[str, ...] = ("Q8_0",)
    """GGUF types: F32 F16 BF16 Q8_0 Q4_0, and K-quants such as Q4_K_M, Q5_K_M, Q6_K."""
    base: str | None = None
    """Where the adapter's base lies, if not where it was trained."""
    license: str = "apache-2.0"
    """Written into the files; Qwen3's own is Apache-2.0."""
    run: bool = True
    """Run each file in llama.cpp beside mlx-lm, where the package xllamacpp is installed."""
    ollama: str | None = None
    """Create this model in Ollama and ask it one query."""


def main(argv: Sequence[str] | None = None) -> None:
    convert(tyro.cli(ConvertOptions, args=argv, description=__doc__))


def convert(options: ConvertOptions, say: Callable[[str], None] = print) -> list[Path]:
    """Write hf/, a GGUF of each type, Modelfile and README.md; returns the GGUF files, verified.

    Raises UserError: an unknown type, an adapter that does not fit, no chat template, a full disk, an output
    folder with other files.
    """
    kinds = _checked_types(options.types)
    _check_output(options.output)
    checkpoint = fuse_checkpoint(options, say)
    name = options.output.resolve().name
    files, checks = [], []
    metadata = {
        "license": options.license,
        "description": "Expands search queries for QMD (lex, vec, hyde lines)",
    }
    for kind in kinds:
        file = options.output / f"{name}-{kind.lower()}.gguf"
        if kind in gguf.WRITTEN:
            gguf.write_gguf(checkpoint, file, kind, name=name, metadata=metadata)
        else:
            _k_quant(checkpoint, file, kind, name, metadata, say)
        errors = gguf.verify_gguf(file, checkpoint, kind)
        say(
            f"{file}: {file.stat().st_size / 1e6:.1f} MB, {len(errors)} tensors verified, largest relative "
            f"error {max(errors.values()):.2g}"
        )
        files.append(file)
        checks.append(_run(options, file, checkpoint, kind))
        say(f"{file.name}: {checks[-1]}")
    _write(options.output / "Modelfile", modelfile(files[-1].name))
    _write(options.output / "README.md", _card(options, files, checks, read_json(checkpoint / TRAINING_FILE)))
    say(f"for QMD: export QMD_GENERATE_MODEL={files[-1].resolve()}  (before the first `qmd collection add`)")
    if options.ollama:
        _try_ollama(options.ollama, options.output, say)
    return files


def fuse_checkpoint(options: ConvertOptions, say: Callable[[str], None]) -> Path:
    """The model with its adapters fused, as a Hugging Face checkpoint in output/hf."""
    try:
        from mlx_impl.models.qwen import fuse, fused_tensors, load_trained, write_tensors
    except ImportError as error:
        raise UserError(
            f"MLX cannot be loaded here ({error}); install it with `pip install -e '.[mlx]'`."
        ) from None
    loaded = load_trained(options.model, options.base, say)
    gguf.read_template(loaded.origin.base)  # before anything is written
    fuse(loaded, dequantise=True)
    quantisation = ("quantization", "quantization_config")
    config = {key: value for key, value in loaded.config.items() if key not in quantisation}
    tensors = fused_tensors(loaded)
    kind = str(tensors["model.norm.weight"].dtype).rpartition(".")[2]
    config |= {"torch_dtype": kind, "dtype": kind, "tie_word_embeddings": "lm_head.weight" not in tensors}

    def fill(folder: Path) -> None:
        copy_tokenizer(loaded.origin.base, folder)
        (folder / CONFIG_FILE).write_bytes(to_json(config))
        write_tensors(folder / MODEL_FILE, tensors)
        (folder / TRAINING_FILE).write_bytes(to_json(_history(loaded.origin)))

    directory = options.output / "hf"
    write_directory(directory, fill)
    say(f"{directory}: {len(tensors)} tensors, {kind}")
    return directory


def modelfile(file: str) -> str:
    """An Ollama Modelfile: the prompt that the model was trained with, QMD's sampling, the stop."""
    sampling = Sampling()
    return f'''FROM ./{file}
TEMPLATE """{{{{- if .System }}}}<|im_start|>system
{{{{ .System }}}}<|im_end|>
{{{{ end }}}}<|im_start|>user
{{{{ .Prompt }}}}<|im_end|>
<|im_start|>assistant
"""
PARAMETER stop "<|im_end|>"
PARAMETER stop "<|endoftext|>"
PARAMETER temperature {sampling.temperature}
PARAMETER top_k {sampling.top_k}
PARAMETER top_p {sampling.top_p}
PARAMETER presence_penalty {sampling.presence_penalty}
PARAMETER repeat_last_n {sampling.penalty_window}
PARAMETER repeat_penalty 1.0
PARAMETER num_predict {sampling.max_tokens}
PARAMETER num_ctx 2048
'''


def _checked_types(types: Sequence[str]) -> list[str]:
    kinds = [kind.upper() for kind in types]
    unknown = [kind for kind in kinds if kind not in gguf.TYPES]
    if unknown or not kinds:
        raise UserError(f"no GGUF type {', '.join(unknown) or 'given'}; there are {', '.join(gguf.TYPES)}.")
    return kinds


def _check_output(folder: Path) -> None:
    check_writable(folder / "Modelfile")
    if folder.exists() and any(folder.iterdir()) and not (folder / "hf" / TRAINING_FILE).exists():
        raise UserError(
            f"{folder}: holds other files and no earlier export; its README.md would be replaced. Choose "
            "another --output."
        )


def _k_quant(
    checkpoint: Path, file: Path, kind: str, name: str, metadata: dict[str, str], say: Callable[[str], None]
) -> None:
    whole = file.with_name(f"{name}-for-k-quants.gguf")
    try:
        gguf.write_gguf(checkpoint, whole, "F32", name=name, metadata=metadata)
        gguf.quantize_gguf(whole, file, kind, say=say)
    finally:
        whole.unlink(missing_ok=True)


def _run(options: ConvertOptions, file: Path, checkpoint: Path, kind: str) -> str:
    """What llama.cpp made of a file."""
    if not options.run:
        return "not run in llama.cpp: --no-run"
    if not runtime.has_runtime():
        return f"not run in llama.cpp: the package {runtime.PACKAGE} is not installed"
    return runtime.check_runtime(file, checkpoint, kind).text()


def _history(origin: Any) -> dict[str, Any]:
    """What the model was made of: its base, and each adapter's own training.json."""
    adapters = [{"adapter": str(path), **read_json(path / TRAINING_FILE)} for path in origin.below]
    return {
        "base": origin.name or str(origin.base),
        "quantised_to": origin.bits or None,
        "adapters": adapters,
    }


def _card(
    options: ConvertOptions, files: Sequence[Path], checks: Sequence[str], history: dict[str, Any]
) -> str:
    base = history["base"]
    on_hub = f"base_model: {base}\n" if base.count("/") == 1 else ""
    rows = "".join(
        f"| {file.name} | {file.stat().st_size / 1e6:.1f} MB | {check} |\n"
        for file, check in zip(files, checks, strict=True)
    )
    data = ", ".join(adapter["data"]["name"] for adapter in history["adapters"]) or "no further data"
    figures = "".join(
        f"| {name} | {value:.4f} |\n"
        for adapter in history["adapters"][-1:]
        for name, value in adapter["evaluation"].items()
    )
    return f"""---
license: {options.license}
{on_hub}tags: [gguf, qmd, query-expansion]
---
# {options.output.resolve().name}

Rewrites a search query into `lex`, `vec` and `hyde` lines for QMD. From `{base}`, trained on {data}.

| file | | |
|---|---|---|
{rows}
| validation of the last training | |
|---|---|
{figures}
Prompt (QMD sends it itself): `/no_think Expand this search query: ...`. Sample as QMD does; greedy decoding
may loop.

QMD: `export QMD_GENERATE_MODEL=/absolute/path/{files[-1].name}`. Ollama: `ollama create NAME -f Modelfile`.
The score judges form and is easy to game; `mlx_impl/eval.py` prints a template's beside it.
"""


def _write(path: Path, text: str) -> None:
    write_file(path, text.encode())


def _try_ollama(name: str, folder: Path, say: Callable[[str], None]) -> None:
    program = shutil.which("ollama")
    if program is None:
        raise UserError("--ollama: there is no `ollama` on the PATH. Install it, or leave the flag out.")
    question = "/no_think Expand this search query: rotate ssh keys"
    for words in ([program, "create", name, "-f", "Modelfile"], [program, "run", name, question]):
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"`{' '.join(words[:2])}` failed: {done.stderr.strip()[-500:]}")
    say(f"ollama: {name} answers\n{done.stdout.strip()}")


if __name__ == "__main__":
    run_command(main)
