"""GGUF of a Qwen3: what is written is what the checkpoint holds, and llama.cpp reads it as mlx-lm does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf", reason="needs gguf: install the extra `mlx`")

from common.errors import UserError
from mlx_impl import convert
from mlx_impl.export import gguf
from tests.tiny_expansion import write_expander, write_rows

PROMPT = (
    "<|im_start|>user\n/no_think Expand this search query: Grüße router 你好<|im_end|>\n"
    "<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The head width is not hidden / heads, as in Qwen3."""
    folder = tmp_path_factory.mktemp("gguf")
    return write_expander(
        folder / "base", write_rows(folder / "rows"), hidden_size=256, num_hidden_layers=2, vocab_size=448
    )


def written(base: Path, folder: Path, kind: str = "F32") -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / f"model-{kind}.gguf"
    gguf.write_gguf(base, file, kind, name="model", metadata={"license": "apache-2.0"})
    return file


@pytest.mark.parametrize("kind", gguf.WRITTEN)
def test_every_type_is_written_and_verified(base: Path, tmp_path: Path, kind: str) -> None:
    errors = gguf.verify_gguf(written(base, tmp_path, kind), base, kind)
    limit = {"F32": 0.0, "F16": 1e-3, "BF16": 5e-3, "Q8_0": 1e-2, "Q4_0": 0.15}[kind]
    assert len(errors) == 24 and max(errors.values()) <= limit


def test_keys_are_those_of_llama_cpps_converter(base: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    reader = GGUFReader(written(base, tmp_path))

    def value(key: str) -> Any:
        field = reader.get_field(key)
        assert field is not None, key
        return field.contents()

    config = json.loads((base / "config.json").read_text())
    assert value("general.architecture") == "qwen3" and value("general.license") == "apache-2.0"
    assert value("qwen3.attention.key_length") == 64 == value("qwen3.attention.value_length")
    assert value("qwen3.rope.freq_base") == 1e6 and value("qwen3.block_count") == 2
    assert value("tokenizer.ggml.pre") == "qwen2" and value("tokenizer.ggml.add_bos_token") is False
    assert value("tokenizer.ggml.eos_token_id") == config["eos_token_id"]
    template = json.loads((base / "tokenizer_config.json").read_text())["chat_template"]
    assert value("tokenizer.chat_template") == template
    assert "output.weight" not in {tensor.name for tensor in reader.tensors}  # the head is tied


def test_what_differs_from_the_checkpoint_is_found(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(base, other)
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-3] ^= 64
    (other / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"does not hold what(?s:.*)differs from the checkpoint"):
        gguf.verify_gguf(written(base, tmp_path), other, "F32")


def test_a_head_of_its_own_and_a_padded_vocabulary_are_written(tmp_path: Path) -> None:
    from gguf import GGUFReader

    rows = write_rows(tmp_path / "rows")
    base = write_expander(tmp_path / "base", rows, tie_word_embeddings=False)
    small = write_expander(tmp_path / "small", rows, vocab_size=320)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (base / file).write_bytes((small / file).read_bytes())
    file = written(base, tmp_path / "out")
    assert "output.weight" in gguf.verify_gguf(file, base, "F32")
    field = GGUFReader(file).get_field("tokenizer.ggml.tokens")
    assert field is not None
    assert len(field.contents()) == 384 and field.contents()[-1] == "[PAD383]"


def test_a_checkpoint_that_cannot_be_exported_is_named(base: Path, tmp_path: Path) -> None:
    def changed(name: str, file: str, **values: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(base, folder)
        content = json.loads((folder / file).read_text())
        content = {k: v for k, v in (content | values).items() if v is not None}
        (folder / file).write_text(json.dumps(content))
        return folder

    with pytest.raises(UserError, match="has no chat template"):
        written(changed("a", "tokenizer_config.json", chat_template=None), tmp_path / "out")
    with pytest.raises(UserError, match=r"eos_token is .*no token of tokenizer\.json"):
        written(changed("e", "tokenizer_config.json", eos_token=None), tmp_path / "out")
    with pytest.raises(UserError, match="model_type is 'llama'"):
        written(changed("b", "config.json", model_type="llama"), tmp_path / "out")
    with pytest.raises(UserError, match=r"has token \d+ and the model a vocabulary of 100"):
        written(changed("c", "config.json", vocab_size=100), tmp_path / "out")
    with pytest.raises(UserError, match="rope is"):
        written(changed("d", "config.json", rope_scaling={"type": "yarn"}), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk_leaves_nothing_half_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gguf import GGUFWriter

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(GGUFWriter, "write_tensor_data", full)
    with pytest.raises(UserError, match=r"cannot write .*No space left(?s:.*)free some space"):
        written(base, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_k_quants_say_what_was_looked_for(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(gguf, "_libraries", lambda looked: iter(looked.append("libllama") or ()))
    source = written(base, tmp_path)
    with pytest.raises(
        UserError, match=r"Looked for:\n.*llama-quantize on the PATH\n.*libllama(?s:.*)Install one"
    ):
        gguf.quantize_gguf(source, tmp_path / "k.gguf", "Q4_K_M")
    with pytest.raises(UserError, match=r"no GGUF type Q9_K; there are F32, F16"):
        convert.convert(convert.ConvertOptions(str(base), tmp_path / "out", types=("q9_k",)), lambda _: None)


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q5_K_M", "Q6_K"])
def test_k_quants_by_an_installed_llama_cpp(base: Path, tmp_path: Path, kind: str) -> None:
    if not list(gguf._quantizers([])):
        pytest.skip("no llama.cpp that quantises is installed (npm install node-llama-cpp; NODE_PATH)")
    target = tmp_path / "k.gguf"
    gguf.quantize_gguf(written(base, tmp_path), target, kind, say=lambda _: None)
    errors = gguf.verify_gguf(target, base, kind)
    assert 1e-3 < errors["blk.0.ffn_up.weight"] <= gguf.K_QUANT_ERROR[kind]


def test_a_k_quant_by_the_program_on_the_path(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "llama-quantize"
    program.write_text('#!/bin/sh\n[ "$3" = Q6_K ] && cp "$1" "$2" || { echo "bad type" >&2; exit 1; }\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    source = written(base, tmp_path)
    gguf.quantize_gguf(source, tmp_path / "k.gguf", "Q6_K", say=lambda _: None)
    assert (tmp_path / "k.gguf").read_bytes() == source.read_bytes()
    with pytest.raises(UserError, match="bad type"):
        gguf.quantize_gguf(source, tmp_path / "j.gguf", "Q5_K_M", say=lambda _: None)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_llama_server_reads_and_continues_as_mlx_lm_does(base: Path, tmp_path: Path, kind: str) -> None:
    """The same tokens, and greedily the same text as long as the first two logits are not close."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="needs llama-server: pip install xllamacpp")
    pytest.importorskip("mlx_lm")
    import mlx.core as mx

    from common.expansion.prompts import load_tokenizer
    from mlx_impl.models.qwen import Origin, load_base

    tokenizer, model = load_tokenizer(base), load_base(Origin(base)).model
    ids = tokenizer.encode(PROMPT, add_special_tokens=False)
    expected, gaps = list(ids), []
    for _ in range(12):
        logits = np.array(model(mx.array([expected]))[0, -1])
        best = np.sort(logits)[-2:]
        gaps.append(float(best[1] - best[0]))
        expected.append(int(logits.argmax()))
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(written(base, tmp_path, kind))
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 256, 1, False
    parameters.cpuparams.n_threads = parameters.n_gpu_layers = 1
    server = xllamacpp.Server(parameters)
    answer = server.handle_completions(
        {"prompt": PROMPT, "n_predict": 12, "temperature": 0, "ignore_eos": False}
    )
    assert answer["usage"]["prompt_tokens"] == len(ids)
    clear = next((place for place, gap in enumerate(gaps) if gap < 0.05), len(gaps))
    text = tokenizer.decode(expected[len(ids) : len(ids) + clear], skip_special_tokens=True)
    assert clear >= 3
    assert answer["choices"][0]["text"].startswith(text)


def test_ollama_is_asked_where_it_is_installed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlx_lm")
    said: list[str] = []
    options = convert.ConvertOptions(str(base), tmp_path / "out", types=("F16",), run=False, ollama="mine")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(UserError, match="no `ollama` on the PATH"):
        convert.convert(options, said.append)
    program = tmp_path / "ollama"
    program.write_text(
        '#!/bin/sh\n[ "$1" = create ] && test -f "$(sed -n "s/^FROM //p" Modelfile)" && exit\necho lex: $3\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda _: str(program))
    convert.convert(options, said.append)
    assert "lex: /no_think Expand this search query: rotate ssh keys" in said[-1]
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert 'PARAMETER stop "<|im_end|>"' in text and "PARAMETER temperature 0.7" in text
