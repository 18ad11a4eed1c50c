"""A GGUF run by llama.cpp beside mlx-lm: what is written agrees, and what is wrong is found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("gguf", reason="needs gguf: install the extra `mlx`")
pytest.importorskip("mlx_lm", reason="needs MLX and mlx-lm: install the extra `mlx`")

from common.errors import UserError
from mlx_impl import convert
from mlx_impl.export import gguf, runtime
from tests.tiny_expansion import write_expander, write_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runtime")
    return write_expander(folder / "base", write_rows(folder / "rows"))


def written(base: Path, folder: Path, kind: str) -> Path:
    file = folder / f"model-{kind}.gguf"
    gguf.write_gguf(base, file, kind, name="model", metadata={})
    return file


def needs_runtime() -> None:
    pytest.importorskip("xllamacpp", reason="needs llama-server: pip install xllamacpp")


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_what_is_written_agrees(base: Path, tmp_path: Path, kind: str) -> None:
    needs_runtime()
    found = runtime.check_runtime(written(base, tmp_path, kind), base, kind)
    assert found.texts == len(runtime.TEXTS) + len(runtime.QUERIES)
    assert 0 < found.difference < runtime.ALLOWED[kind] and 0 < found.equal <= found.continued
    assert "the same token ids for 10 texts" in found.text()


def test_another_models_weights_and_tokens_are_found(base: Path, tmp_path: Path) -> None:
    needs_runtime()
    other = write_expander(tmp_path / "other", write_rows(tmp_path / "rows"), intermediate_size=96)
    with pytest.raises(UserError, match=r"reads it otherwise(?s:.*)a probability differs by 0\.\d+; allowed"):
        runtime.check_runtime(written(other, tmp_path, "F16"), base, "F16")
    described = json.loads((other / "tokenizer.json").read_text())
    described["model"]["merges"] = described["model"]["merges"][:40]
    (other / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"token ids \[.*the tokenizer's are \["):
        runtime.check_runtime(written(other, tmp_path, "F16"), base, "F16")
    file = tmp_path / "no.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"llama\.cpp \(xllamacpp\) does not run it"):
        runtime.check_runtime(file, base, "F16")


def test_convert_says_what_was_compared_or_why_not(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    options = convert.ConvertOptions(str(base), tmp_path / "out", types=("F16",))
    agreed = runtime.RuntimeCheck(10, 47, 48, 1e-4)
    monkeypatch.setattr(runtime, "has_runtime", lambda: True)
    monkeypatch.setattr(runtime, "check_runtime", lambda *_: agreed)
    convert.convert(options, said.append)
    line = "in llama.cpp: the same token ids for 10 texts, 47 of 48 greedy tokens those of mlx-lm"
    assert any(line in text for text in said) and line in (tmp_path / "out" / "README.md").read_text()
    convert.convert(replace(options, run=False), said.append)
    assert "not run in llama.cpp: --no-run" in (tmp_path / "out" / "README.md").read_text()
    monkeypatch.setattr(runtime, "has_runtime", lambda: False)
    convert.convert(options, said.append)
    assert any("the package xllamacpp is not installed" in text for text in said)
