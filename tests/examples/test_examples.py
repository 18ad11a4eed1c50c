"""Every example runs from its first line to its last, on the tiny world."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import World

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


def example(name: str, world: World, **settings: Any) -> Any:
    main = importlib.import_module(f"examples.{name}").main
    return main(data=str(world.data), base=str(world.base), quick=True, **settings)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_opens_with_its_purpose_its_command_and_its_time(name: str) -> None:
    text = (ROOT / "examples" / f"{name}.py").read_text()
    opening = text[: text.index('"""', 3)]
    assert f"    python examples/{name}.py" in opening and "Time on 2 CPU cores: " in opening
    assert len(text.splitlines()) <= 60


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_a_command(name: str) -> None:
    shown = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
    )
    assert shown.returncode == 0 and "--quick" in shown.stdout, shown.stderr


@pytest.mark.slow
def test_training_ends_with_a_checkpoint_and_evaluation_measures_it(
    world: World, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = example("basic_training", world, runs=runs)
    assert (best / "resonance.safetensors").exists() and (best.parent / "report.html").exists()
    assert "example_basic/best" in capsys.readouterr().out
    table = example("evaluation", world, model=str(best))
    kinds = {(row.pool, row.kind) for row in table.rows if row.model}
    assert kinds == {(pool, kind) for pool in ("bm25", "rrf") for kind in ("alone", "fused", "portable")}
    assert "over its first stage, p = " in capsys.readouterr().out


@pytest.mark.slow
def test_both_ways_of_training_on_negatives_are_compared(world: World, runs: Path) -> None:
    table = example("hard_negatives", world, runs=runs, margin=0.0)
    given, random = "example_negatives_given/best", "example_negatives_random/best"
    assert {row.model for row in table.rows if row.model} == {given, random}
    assert {(pair.a, pair.b) for pair in table.pairs} == {(given, random)}


@pytest.mark.slow
def test_the_workflow_retrains_on_what_the_first_model_found(world: World, runs: Path) -> None:
    answer = example("complete_workflow", world, runs=runs)
    assert len(answer.passages) == 5 and answer.passages[0].rank == 1
    retrained = runs / "example_second"
    assert {f"analysis-{name}.json" for name in ("original", "test")} <= {
        file.name for file in retrained.iterdir()
    }
    assert (runs / "example_first" / "best").is_dir() and (retrained / "best").is_dir()


def test_rag_without_training_gives_a_context(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = example("rag_basic", world, index=tmp_path / "index")
    assert context.startswith("[1] ") and "\n\n[2] " in context
    assert "60 documents added, 0 were there; 60 passages" in capsys.readouterr().out
    assert example("rag_basic", world, index=tmp_path / "index") == context
    assert "0 documents added, 60 were there" in capsys.readouterr().out


@pytest.mark.slow
def test_rag_with_a_reranker_shows_what_moved_and_falls_back(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    context = example("rag_reranked", world, model=str(world.base))
    said = capsys.readouterr().out
    assert context.results.reranked and len(context.sources) == 3
    assert "1. (was " in said and "fallback: reranker past its deadline" in said
    assert "fallbacks: {'reranker past its deadline': 1}" in said


@pytest.mark.slow
def test_the_production_loop_watches_and_promotes(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = example("production_loop", world, model=str(world.base), folder=tmp_path)
    (window,) = report.windows
    assert window.searches == 5 and report.verdict.verdict == "too few"
    assert window.latency["total"]["p50"] >= window.latency["rerank"]["p50"] > 0
    said = capsys.readouterr().out
    assert " hard cases; current: " in said and said.strip().endswith("ranker/1/ranker-1")
