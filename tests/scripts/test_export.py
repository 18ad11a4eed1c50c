"""The export command on the tiny world, and the commands that take what it wrote."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from tests.rerankers import reranker
from tests.tiny import World, write_base

ROOT = Path(__file__).parents[2]


def run(name: str, *argv: object) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        importlib.import_module(f"scripts.{name}").main([str(word) for word in argv])
    return out.getvalue()


@pytest.fixture(scope="module")
def exported(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("exports") / "tiny"
    flags = ["--data", world.data, "--split", "train", "--queries", 8, "--depth", 5, "--max-loss", 20]
    return out, run("export", world.base, "--out", out, "--precision", "fp32", "int8", *flags)


def test_help_shows_an_example() -> None:
    shown = subprocess.run(
        [sys.executable, ROOT / "scripts" / "export.py", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
    )
    assert shown.returncode == 0, shown.stderr
    assert "example: python scripts/export.py" in shown.stdout


def test_every_precision_is_a_folder_with_its_report_and_a_row(exported: tuple[Path, str]) -> None:
    out, said = exported
    for part in ("(source)", "onnx fp32", "onnx int8", "p50 ms", "pairs/s", "8 queries, 40 pairs"):
        assert part in said
    report = json.loads((out / "fp32" / "export.json").read_text())
    assert report["verification"]["difference"]["largest"] < 1e-4 and report["verification"]["loss"] == 0.0
    assert len(json.loads((out / "int8" / "export.json").read_text())["quantization_error"]) == 5
    assert sorted(path.name for path in out.iterdir()) == ["fp32", "int8"]


def test_rerank_and_evaluate_take_an_export(exported: tuple[Path, str], world: World, tmp_path: Path) -> None:
    out, _ = exported
    (tmp_path / "passages.txt").write_text("bolum banosh\ndolum kirosh\n")
    flags = ["--query", "bolum", "--passages", tmp_path / "passages.txt", "--json"]
    ours = json.loads(run("rerank", "--model", world.base, "--backend", "jax", *flags))
    onnx = json.loads(run("rerank", "--model", out / "fp32", "--backend", "onnx", *flags))
    assert [item["id"] for item in onnx["passages"]] == [item["id"] for item in ours["passages"]]
    assert onnx["passages"][0]["score"] == pytest.approx(ours["passages"][0]["score"], abs=1e-4)
    table = json.loads(
        run(
            "evaluate", world.base, out / "fp32", "--data", world.data, "--encoder", world.base, "--json", "-"
        )
    )
    alone = [row for row in table["rows"] if row["kind"] == "alone"]
    assert len(alone) == 2 and alone[0]["means"] == alone[1]["means"]
    assert "fp32" in run(
        "evaluate", out / "fp32", "--data", world.data, "--encoder", world.base, "--backend", "onnx"
    )


def test_a_sentence_encoder_and_a_portable_score_are_exported_too(world: World, tmp_path: Path) -> None:
    flags = ["--data", world.data, "--split", "train", "--queries", 4, "--depth", 4, "--precision", "fp16"]
    assert "onnx fp16" in run("export", world.base, "--out", tmp_path / "bi", "--kind", "bi-encoder", *flags)
    assert "onnx fp16" in run("export", world.base, "--out", tmp_path / "p", "--score", "portable", *flags)


@pytest.mark.slow
def test_gguf_is_verified_in_llama_cpp_and_a_bad_one_refused(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("gguf", "xllamacpp"):
        pytest.importorskip(library, reason="needs the extra gguf")
    trained, out = reranker(tmp_path, 5), tmp_path / "llama"
    flags = ["--format", "gguf", "--data", world.data, "--split", "train", "--queries", 6, "--depth", 5]
    said = run("export", trained, "--out", out, *flags, "--precision", "fp32", "--max-loss", 20)
    assert "gguf fp32" in said and "6 queries, 30 pairs" in said
    report = json.loads((out / "fp32" / "export.json").read_text())
    assert report["score"] == "portable" and report["verification"]["difference"]["largest"] < 5e-3
    with pytest.raises(UserError, match=r"a GGUF export, which llama.cpp reads: .*model.gguf"):
        run("evaluate", out / "fp32", "--data", world.data, "--encoder", world.base)

    from common.export.llama_server import LlamaServer

    real = LlamaServer.rerank
    monkeypatch.setattr(LlamaServer, "rerank", lambda *given: -real(*given))
    with pytest.raises(UserError, match=r"not written, this export ranks worse than its source"):
        run("export", trained, "--out", out, *flags, "--precision", "fp16", "--max-loss", 5)
    assert not (out / "fp16").exists()


def test_what_cannot_be_exported_is_refused_before_anything_is_measured(world: World, tmp_path: Path) -> None:
    for more, message in (
        (["--queries", 0], "--queries is 0; allowed: >= 1"),
        (["--max-loss", -1], "--max-loss is -1"),
        (["--kind", "bi-encoder", "--score", "portable"], "--score is of a cross-encoder"),
        (["--format", "gguf", "--score", "full"], "GGUF holds the portable score"),
    ):
        with pytest.raises(UserError, match=message):
            run("export", world.base, "--out", tmp_path / "out", *more)
    roberta = write_base(tmp_path / "roberta", model_type="roberta")
    with pytest.raises(UserError, match="a roberta model; exported to ONNX is bert"):
        run("export", roberta, "--out", tmp_path / "out", "--data", "./nowhere")
    assert not (tmp_path / "out").exists()
