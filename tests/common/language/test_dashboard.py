"""What a language model's report and notebook show of a run's folder, and what they say is not there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import UserError
from common.language.dashboard import (
    DRAWN,
    attention_figure,
    dashboard_tables,
    figures,
    memory_figure,
    read_run,
)
from common.report import Table, write_report
from tests.monitored import Line, inspection, write_run


def cells(tables: list[Table], title: str) -> dict[str, list[Any]]:
    """Rows of a table by their first cell."""
    (table,) = (table for table in tables if table["title"] == title)
    assert all(len(row) == len(table["columns"]) for row in table["rows"])
    return {str(row[0]): row[1:] for row in table["rows"]}


def test_perplexity_stands_beside_the_sources_target(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, "infinito"))
    found = cells(dashboard_tables(run), "Perplexity")
    assert found["validation, a token"] == [70.0, "50 to 80", "reached"]  # the better of 80 and 70
    assert found["test, static, a token"] == [75.25, None, None]

    def worse(kind: str, step: int, line: Line) -> Line:
        return line | {"perplexity": 80.5} if kind == "dev" else line

    late = read_run(write_run(tmp_path / "late", "infinito", worse))
    assert cells(dashboard_tables(late), "Perplexity")["validation, a token"][2] == "not reached"


def test_what_was_not_measured_says_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "infinito")
    (folder / "results.json").unlink()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
    tables = dashboard_tables(read_run(folder))
    assert cells(tables, "Perplexity")["validation, a token"] == [None, "50 to 80", "not measured"]
    assert cells(tables, "Perplexity")["test, static, a word"] == [None, None, "not measured"]
    assert cells(tables, "Generation quality")["self bleu"] == [None, None, None, "not measured"]
    technical = cells(tables, "Technical metrics")
    assert technical["memory: utilisation"][2] == technical["tokens a second, training"][2] == "not measured"


def test_tokens_a_second_count_no_padding_and_no_evaluation(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "infinito")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:  # 4 seconds for 2 steps; an evaluation takes a hundred
        line["seconds"] = 2.0 * line["step"] + (100.0 if line["step"] > 20 or line["kind"] == "dev" else 0.0)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = cells(dashboard_tables(read_run(folder)), "Technical metrics")
    # 4 streams of 2 segments of 16 tokens, half of them counted
    assert found["tokens a second, training"][0] == pytest.approx(2 * 4 * 2 * 16 * 0.5 / 4)


def test_rows_that_do_not_apply_are_left_out_and_the_weight_has_its_target(tmp_path: Path) -> None:
    taught = cells(dashboard_tables(read_run(write_run(tmp_path, "indra"))), "Technical metrics")
    value, target, status = taught["distillation weight, last step"]
    assert (value, target, status) == (pytest.approx(0.049), "0.05", "reached")
    assert not [name for name in taught if "memory" in name]
    aligned = {name: row[0] for name, row in taught.items() if "certainty" in name}
    assert aligned == {
        "magnitude against the teacher's certainty: R², dev": 0.25,
        "magnitude against the teacher's certainty: rank correlation with entropy, dev": -0.5,
        "phase against the teacher's certainty: R², dev": -0.125,
    }
    remembers = cells(dashboard_tables(read_run(write_run(tmp_path, "infinito"))), "Technical metrics")
    assert remembers["memory: active slots of 8"][0] == 6.0
    assert "distillation weight, last step" not in remembers

    def stuck(kind: str, step: int, line: Line) -> Line:
        return line | {"distillation_weight": 0.03} if kind == "train" else line

    half = cells(
        dashboard_tables(read_run(write_run(tmp_path / "half", "indra", stuck))), "Technical metrics"
    )
    assert half["distillation weight, last step"][2] == "not reached"


def curves(figure: Any) -> dict[str, list[float]]:
    """What a chart draws, by name."""
    return {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].get_lines()}


def test_the_figures_draw_what_was_logged_and_say_what_was_not(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, "indra"))
    drawn = figures(run, run.inspection)
    both = curves(drawn["Cross-entropy and distillation"])
    assert both["cross-entropy"][-1] == pytest.approx(3.1)
    assert both["its part of the loss"][-1] == pytest.approx(0.049 * both["distillation, T²KL"][-1])
    assert curves(drawn["Distillation weight"])["w_kd"][-1] == pytest.approx(0.049)
    assert curves(drawn["Phase and magnitude"])["magnitude_r2, dev"] == [0.25, 0.25]
    assert drawn["Memory map"] == drawn["Use of the memory"] == "This model has no memory of slots."

    run = read_run(write_run(tmp_path, "infinito"))
    drawn = figures(run, None)
    assert curves(drawn["Use of the memory"])["active slots / slots"] == [0.75, 0.75]
    assert drawn["Distillation weight"] == "There is no teacher."
    assert drawn["Phase and magnitude"].startswith("Neither was logged")
    assert drawn["Attention"] == drawn["Memory map"] == "inspection.json is written when the run ends."


def test_the_maps_show_each_layer_and_each_slot() -> None:
    look = inspection("infinito")
    figure = attention_figure(look)
    images = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    assert [image.tolist() for image in images] == look["attention"]["layers"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()][2:] == [" $", "5", "↵"]
    figure = memory_figure(look)
    images = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    assert [image.tolist() for image in images] == [
        look["memory"][key] for key in ("importance", "age", "read")
    ]
    (rotation,) = (axis.get_lines()[0] for axis in figure.axes if axis.get_lines())
    assert list(rotation.get_ydata()) == [1.0, 0.5, 0.5, 0.5, 0.5, 0.5]
    short = {name: np.asarray(values)[..., :3].tolist() for name, values in look["memory"].items()}
    few = memory_figure({"memory": short})
    few.draw_without_rendering()
    assert all(tick == int(tick) for axis in few.axes[:4] for tick in axis.get_xticks())
    assert attention_figure({"attention": None, "memory": None}) == "This model has no attention."
    assert memory_figure({"attention": None, "memory": None}) == "This model has no memory of slots."


def test_the_report_has_the_dashboard_and_each_quantity_once(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path, "infinito")).read_text()
    for part in (
        "50 to 80",
        "Generation quality",
        "Technical metrics",
        "Total loss",
        "Use of the memory on dev",
    ):
        assert part in page, part
    for part in ("layer 1", "age in segments", "rotation: slots replaced", "Gradient norm", "Learning rate"):
        assert part in page, part
    for name in DRAWN:
        kind, quantity = name.split("/")
        assert f"{quantity.replace('_', ' ')} ({kind})" not in page
    assert "<script" not in page and "src=" not in page and "<link" not in page


def test_an_evaluation_counts_for_the_weights_that_it_measured(tmp_path: Path) -> None:
    from common.backends import checkpoint_identity

    folder = write_run(tmp_path, "infinito")
    (folder / "best").mkdir()
    (folder / "best" / "model.safetensors").write_bytes(b"these weights")
    settings = {"samples": 3, "max_new_tokens": 8, "split": "test", "temperature": 1.0, "seed": 0}
    columns = {"human": {"repetition_3": 0.0}, "infinito/best": {"repetition_3": 0.25, "exploration": 0.5}}
    found = {"model": checkpoint_identity(folder / "best"), "settings": settings, "generation": columns}
    (folder / "evaluation_lm.json").write_text(json.dumps(found))
    tables = dashboard_tables(read_run(folder))
    assert cells(tables, "Generation quality")["repetition 3"] == [0.25, 0.0, None, None]
    exploration = cells(tables, "Technical metrics")["exploration: share of sampled tokens not the argmax"]
    assert math.isclose(exploration[0], 0.5)
    (folder / "best" / "model.safetensors").write_bytes(b"others")
    tables = dashboard_tables(read_run(folder))
    assert cells(tables, "Generation quality")["repetition 3"][0] is None


def test_what_is_no_language_models_run_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run here"):
        read_run(tmp_path)
    folder = tmp_path / "folder"
    folder.mkdir()
    for config, message in (
        ({"model_type": "infinito"}, "is no run's folder"),
        ({"config": {"model": {}, "quantum": {}}, "environments": []}, "is the run of a reranker"),
        (
            {"config": {"model": {}, "distillation": {}, "data": {"tokenizer": "bpe"}}, "environments": []},
            "has logged nothing yet",
        ),
    ):
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=message):
            read_run(folder)
