"""The grid of variants: what it trains, what it skips, and the table it writes."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import UserError
from common.reranker.ablation import OUTCOME
from scripts import ablate
from tests.tiny import World, command, write_base


def run(*argv: object) -> str:
    """What the command prints; its errors are raised."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        ablate.main([str(word) for word in argv])
    return out.getvalue()


@pytest.fixture(scope="module")
def recipe(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = world.config(max_steps=3, evaluations=1)
    config = replace(
        config,
        data=replace(config.data, encoder=str(world.base)),
        evaluation=replace(config.evaluation, first_stage="rrf"),
    )
    root = tmp_path_factory.mktemp("recipe")
    command(config, root)
    return root / "recipe.py"


@pytest.fixture(scope="module")
def done(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    runs = tmp_path_factory.mktemp("ablation")
    flags = ["--variants", "cartesian", "cls_only", "--seeds", 0, 1, "--runs", runs]
    return runs, run("--config", recipe, *flags)


def test_the_table_compares_every_variant_with_the_reference(done: tuple[Path, str]) -> None:
    runs, said = done
    stored = json.loads((runs / "ablation.json").read_text())
    (rows,) = stored["collections"].values()
    assert [row["variant"] for row in rows] == ["cartesian", "cls_only"]
    assert stored["failed"] == [] and stored["reference"] == "cartesian"
    reference, *others = rows
    assert others
    assert reference["difference"] is None and -1 <= reference["tau"] <= 1  # between its seeds
    for row in others:
        low, high = row["difference_interval"]
        assert low <= row["difference"] <= high and 0 < row["p"] <= 1 and -1 <= row["tau"] <= 1
        assert row["difference"] == pytest.approx(row["mean"] - reference["mean"])
        assert row["mean"] == pytest.approx(sum(row["seeds"].values()) / 2) and row["spread"] >= 0
    text = (runs / "ablation.md").read_text()
    assert "| cartesian (reference) |" in text and "| rrf, first stage |" in text
    assert (
        "queries, top 10 of rrf" in text
        and "cls_only" in said
        and "not corrected for the 1 comparisons" in text
    )


def test_a_finished_run_is_not_trained_again_and_its_numbers_are_those_of_its_checkpoint(
    done: tuple[Path, str], recipe: Path
) -> None:
    runs, _ = done
    files = {path: path.stat().st_mtime_ns for path in runs.rglob("*.safetensors")}
    flags = ["--variants", "cartesian", "cls_only", "--seeds", 0, 1, "--runs", runs]
    said = run("--config", recipe, *flags)
    assert said.count("finished before") == 4 and "dev at step" not in said
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*.safetensors")} == files
    heads = {
        path.parent.parent.name: json.loads(path.read_text())["resonance"]["head"]
        for path in runs.glob("*/*/best/config.json")
    }
    assert heads["cls_only-s1"] == "cls" and heads["cartesian-s0"] == "resonance"
    one = json.loads(next(runs.glob(f"*/cls_only-s0/{OUTCOME}")).read_text())
    query, passages = next(iter(one["scores"].items()))
    assert len(passages) == 10 and query in one["values"]["alone"]
    assert not list(runs.glob("*/*/state"))


def test_a_failed_run_is_told_and_does_not_stop_the_others(recipe: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "tiny-data" / "cartesian-s0"
    blocked.mkdir(parents=True)
    (blocked / "mine.txt").write_text("not a run")
    flags = ["--variants", "cartesian", "real", "--seeds", 0, "--runs", tmp_path]
    with pytest.raises(UserError, match=r"(?s)1 of 2 runs failed.*cartesian-s0: .*holds other files"):
        run("--config", recipe, *flags)
    stored = json.loads((tmp_path / "ablation.json").read_text())
    ((row,),) = stored["collections"].values()
    assert row["variant"] == "real" and row["p"] is None and len(stored["failed"]) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--variants", "cartesian", "pollar"], r"unknown variant 'pollar'.*Did you mean 'polar'\?"),
        (["--variants", "polar"], "--reference cartesian is not among --variants"),
        (["--seeds", 1, 1], "give at least one, each once"),
        (
            ["--quantum.mode", "entanglement"],
            r"variant cls_only of tiny: .*quantum\.mode is 'entanglement'; allowed: 'superposition'",
        ),
        (["--variant", "polar"], "did you mean --variants"),
        (["--datasets", "a/x.jsonl", "b/x.jsonl"], "two collections would be called tiny-x"),
        (["--config", "configs/quantum_resonnance.py"], "did you mean configs/quantum_resonance.py"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_before_any_training(
    recipe: Path, tmp_path: Path, argv: list[object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run("--config", recipe, "--runs", tmp_path, *argv)
    assert list(tmp_path.iterdir()) == []


def test_several_sources_are_refused_before_anything_is_trained(
    recipe: Path, world: World, tmp_path: Path
) -> None:
    flags = ["--variants", "cartesian", "--seeds", 0, "--runs", tmp_path]
    with pytest.raises(UserError, match=r"(?s)1 of 1 runs failed.*names several sources.*with --datasets"):
        run("--config", recipe, "--data", f"{world.data} + {world.data}", *flags)
    assert not list(tmp_path.rglob("config.json"))


def test_a_base_that_has_changed_is_told(recipe: Path, world: World, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    flags = ["--model.base", base, "--variants", "cartesian", "--seeds", 0, "--runs", tmp_path / "runs"]
    run("--config", recipe, "--train.max-steps", 1, *flags)
    shutil.rmtree(base)
    write_base(base, seed=1)
    with pytest.raises(UserError, match=r"(?s)is a run with other settings.*inputs\.base"):
        run("--config", recipe, "--train.max-steps", 1, *flags)


def test_nothing_finished_is_no_table(recipe: Path, tmp_path: Path) -> None:
    assert "no finished run" in run("--config", recipe, "--runs", tmp_path, "--table-only")
