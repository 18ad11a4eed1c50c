"""The notebook shows a run: every cell on written logs, the whole in a kernel on a run trained here."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from common.config import RunOptions
from common.language.dashboard import figures, read_run
from common.language.workflow import train_language
from tests.monitored import write_run
from tests.tiny_language import recipe, write_articles

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "training_monitor.ipynb"


def code_cells() -> list[dict[str, Any]]:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_it_is_stored_as_it_was_before_it_ran() -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code_cells())


@pytest.mark.parametrize("kind", ["indra", "infinito"])
def test_its_cells_show_every_figure_of_a_run(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path, kind)
    monkeypatch.setenv("RESONANCE_RUN", str(run))
    first, *rest = ("".join(cell["source"]).removeprefix("%matplotlib inline\n") for cell in code_cells())
    names: dict[str, Any] = {}
    exec(first, names)
    shown = [eval(cell, names) for cell in rest]
    said = capsys.readouterr().out
    assert f"{kind}: step 40" in said and "Generation quality" in said
    assert [item for item in shown if item is not None] == list(names["drawn"].values())
    assert names["drawn"].keys() == figures(read_run(run), None).keys()


@pytest.mark.slow
def test_it_runs_in_a_kernel_on_a_run_trained_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    data = write_articles(tmp_path / "articles")
    monkeypatch.setenv("RESONANCE_CACHE", str(tmp_path / "cache"))
    options = RunOptions(runs=tmp_path / "runs", backend="jax", evaluate_test=False)
    run = train_language(recipe("infinito", data, max_steps=12), options, say=lambda _: None).folder
    monkeypatch.setenv("RESONANCE_RUN", str(run))
    monkeypatch.setenv("RESONANCE_TEXT", "Ada has the red kite , and Bob has the old map .")
    monkeypatch.setenv("RESONANCE_BACKEND", "jax")
    root = str(NOTEBOOK.parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    said = "".join(output.get("text", "") for output in outputs)
    sentences = [
        output["data"]["text/plain"] for output in outputs if output not in pictures and "data" in output
    ]
    assert len(pictures) == 6  # loss, perplexity, cross-entropy, attention, use of the memory, its map
    assert "infinito: step 12" in said and "Technical metrics" in said
    assert "There is no teacher." in sentences[0] and "Neither was logged" in sentences[1]
