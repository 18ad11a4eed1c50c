"""The export of language models as a user types it, and the commands that read what it wrote."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.service.metrics import Metrics
from scripts import cost, doctor, evaluate_lm, export, generate
from tests.language_exports import MODELS, checkpoint
from tests.scripts.test_language_commands import run
from tests.tiny import World
from tests.tiny_language import write_corpus

ROOT = Path(__file__).parents[2]
PROMPT = "Ada has the red kite. Bob has"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint, its exports, and what the command said."""
    root = tmp_path_factory.mktemp("exports")
    data = write_corpus(root / "corpus.txt", 60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESONANCE_CACHE", str(root / "cache"))
        source = checkpoint(root / "source", MODELS["infinito"], 5, str(data))
        said = run(export, source, "--out", root / "out", "--max-documents", 4, "--max-loss", 100)
        yield root, said


def test_an_export_is_measured_beside_its_source_and_has_a_card(project: tuple[Path, str]) -> None:
    root, said = project
    for part in ("(source)", "onnx fp32", "onnx int8", "perplexity, cache", "split dev", " 0 of "):
        assert part in said
    report = json.loads((root / "out" / "fp32" / "export.json").read_text())
    found = report["verification"]
    assert report["kind"] == "language-model" and report["forced"] is False
    assert abs(found["loss"]) < 1e-3 and found["greedy"]["different"] == 0
    assert found["difference"]["largest"] < 1e-3
    small = json.loads((root / "out" / "int8" / "export.json").read_text())
    assert small["verification"]["export"]["megabytes"] < 0.7 * found["export"]["megabytes"]
    assert len(small["quantization_error"]) == 13
    card = (root / "out" / "int8" / "README.md").read_text()
    assert "onnx int8" in card and "perplexity, cache" in card


def test_the_cards_code_and_the_command_write_the_same_without_a_framework(
    project: tuple[Path, str], tmp_path: Path
) -> None:
    root, _ = project
    folder = root / "out" / "fp32"
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```\n")[0]
    (tmp_path / "decode.py").write_text(code)
    lines = [
        "import sys",
        "sys.modules |= dict.fromkeys(('jax', 'jaxlib', 'flax', 'mlx'))",
        "from scripts.generate import main",
        f"main(['--model', {str(folder)!r}, '--prompt', {PROMPT!r}, '--temperature', '0',"
        " '--max-new-tokens', '64', '--allow-unknown'])",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = [
        subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=environment, cwd=tmp_path)
        for argv in (("decode.py", str(folder), PROMPT), ("-c", "\n".join(lines)))
    ]
    assert [result.returncode for result in shown] == [0, 0], shown
    assert shown[0].stdout == shown[1].stdout and shown[0].stdout.startswith(PROMPT)
    own = run(
        generate, "--model", root / "source", "--prompt", PROMPT, "--temperature", 0,
        "--max-new-tokens", 64, "--allow-unknown",
    )  # fmt: skip
    assert own == shown[0].stdout


def test_an_export_is_evaluated(project: tuple[Path, str], tmp_path: Path) -> None:
    root, _ = project
    found = {}
    for name in ("source", "out/fp32"):
        argv = ("--data", root / "corpus.txt", "--max-documents", 3, "--out", tmp_path)
        run(evaluate_lm, "--model", root / name, *argv)
        results = json.loads((tmp_path / "evaluation_lm.json").read_text())["perplexity"]
        found[name] = [result["nll"] for result in results]
    assert len(found["source"]) == 2
    assert found["out/fp32"] == pytest.approx(found["source"], rel=1e-5)


def test_a_bad_export_is_not_written_unless_forced(
    project: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = project
    real = export.language_source

    def better(*given: Any) -> Any:
        source = real(*given)
        lower = {mode: value / 1.5 for mode, value in source.measured.perplexity.items()}
        return dataclasses.replace(source, measured=dataclasses.replace(source.measured, perplexity=lower))

    monkeypatch.setattr(export, "language_source", better)
    argv = (root / "source", "--out", tmp_path / "out", "--max-documents", 2, "--precision", "fp32")
    with pytest.raises(UserError, match=r"not written, this export predicts worse .*allowed: 2\.00%"):
        run(export, *argv)
    assert not (tmp_path / "out" / "fp32").exists()
    run(export, *argv, "--force")
    assert json.loads((tmp_path / "out" / "fp32" / "export.json").read_text())["forced"] is True


def test_what_does_not_fit_a_language_model_is_refused(
    project: tuple[Path, str], world: World, tmp_path: Path
) -> None:
    source = project[0] / "source"
    for more, message in (
        (("--score", "portable"), r"--score is not of a language-model, which .* is: leave it out"),
        (("--queries", 7), "--queries is not of a language-model"),
        (("--format", "gguf"), "a language model is exported to ONNX: leave out --format"),
        (("--max-documents", 0), "--max-documents is 0; allowed: >= 1"),
        (("--kind", "cross-encoder"), "a infinito model; exported to ONNX is bert"),
        (("--data", "./nowhere"), "nowhere"),
        (("--split", "sideways"), "sideways"),
    ):
        with pytest.raises(UserError, match=message):
            run(export, source, "--out", tmp_path / "out", *more)
    with pytest.raises(UserError, match="--max-documents is not of a cross-encoder"):
        run(export, world.base, "--out", tmp_path / "out", "--max-documents", 3)
    with pytest.raises(UserError, match="language models: llama, qwen3, indra, infinito"):
        run(export, world.base, "--out", tmp_path / "out", "--kind", "language-model")
    with pytest.raises(UserError, match=r"an export, which is not exported again"):
        run(export, project[0] / "out" / "fp32", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_doctor_and_the_cost_know_a_language_model(project: tuple[Path, str], tmp_path: Path) -> None:
    root, _ = project

    def found(model: Path) -> dict[str, tuple[str, str]]:
        return {item.item: (item.status, item.what) for item in doctor.examine(doctor.Args(model=str(model)))}

    own = found(root / "source")
    assert (own["model writes"][0], own["export"][0]) == ("ok", "note")
    copy = shutil.copytree(root / "out" / "fp32", tmp_path / "fp32")
    good = found(copy)
    assert (good["model writes"][0], good["export"][0]) == ("ok", "ok")
    assert "perplexity" in good["export"][1] and "1 documents" in good["export"][1]
    report = json.loads((copy / "export.json").read_text())
    for loss, status in ((0.019, "ok"), (0.021, "FAIL")):
        report["verification"]["loss"] = loss
        (copy / "export.json").write_text(json.dumps(report))
        assert found(copy)["export"][0] == status
    with pytest.raises(UserError, match=r"a language model, .*scripts/serve\.py --language-model") as refused:
        cost.cost_table(cost.Args((copy,), price=1.0))
    metrics = Metrics()
    metrics.stage("generate", 1.0)
    named = re.findall(r"resonance_\S+", str(refused.value))
    assert len(named) == 2 and all(f"\n{name} " in metrics.text().decode() for name in named)
    (copy / "export.json").write_text("{}")
    assert "Export it again" in found(copy)["model"][1]
