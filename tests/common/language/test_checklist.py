"""Each item of the checklist on a run that went well and on one that did not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.errors import UserError
from common.language.checklist import (
    Item,
    Limits,
    generation_items,
    items_json,
    log_items,
    passed,
    perplexity_item,
    run_of,
)
from common.language.dashboard import read_run
from common.language.generation import Generated, SamplingConfig
from tests.monitored import STEPS, Line, write_run


def of_log(folder: Path, **limits: float) -> dict[str, Item]:
    return {item.name: item for item in log_items(read_run(folder), Limits(**limits))}


def failing(items: dict[str, Item]) -> list[str]:
    return [name for name, item in items.items() if item.passed is False]


@pytest.mark.parametrize("kind", ["decoder", "indra", "infinito"])
def test_a_run_that_went_well_passes(tmp_path: Path, kind: str) -> None:
    items = of_log(write_run(tmp_path, kind))
    assert failing(items) == [] and passed(list(items.values()))
    skipped = {name for name, item in items.items() if item.passed is None}
    terms = {f"{term} stable: spread at the end" for term in ("magnitude", "phase")}
    assert (
        skipped
        == {
            "decoder": {"distillation weight reached", "memory used", *terms},
            "indra": {"memory used"},
            "infinito": {"distillation weight reached", *terms},
        }[kind]
    )
    assert all(items[name].why for name in skipped)


@pytest.mark.parametrize(
    ("kind", "name", "value", "wrong"),
    [
        ("decoder", "cross_entropy", lambda step: 1.0 + step, "cross-entropy, end / begin"),
        ("decoder", "cross_entropy", lambda step: 2.0, "cross-entropy, end / begin"),
        ("decoder", "gradient_norm", lambda step: float("nan"), "values of the log that are not finite"),
        ("indra", "distillation_weight", lambda step: 0.03, "distillation weight reached"),
        ("indra", "phase", lambda step: step % 4 / 4, "phase stable: spread at the end"),
        ("indra", "magnitude", lambda step: step % 4 / 4, "magnitude stable: spread at the end"),
        ("infinito", "utilisation", lambda step: 0.01, "memory utilisation"),
        ("infinito", "rotation", lambda step: 0.0, "memory rotation"),
    ],
)
def test_a_log_that_went_wrong_fails_at_its_item_alone(
    tmp_path: Path, kind: str, name: str, value: Any, wrong: str
) -> None:
    def change(_kind: str, step: int, line: Line) -> Line:
        return line | {name: value(step)} if name in line else line

    items = of_log(write_run(tmp_path, kind, change))
    assert failing(items) == [wrong] and not passed(list(items.values()))


def test_early_unrest_of_phase_and_magnitude_is_no_failure(tmp_path: Path) -> None:
    def restless(_kind: str, step: int, line: Line) -> Line:
        return line | {"phase": step % 4 / 4} if "phase" in line and step <= STEPS / 2 else line

    assert failing(of_log(write_run(tmp_path, "indra", restless))) == []


def test_a_run_without_a_last_checkpoint_has_not_ended(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "decoder")
    (folder / "final").rmdir()
    assert failing(of_log(folder)) == ["training ended"]


def test_limits_are_what_is_allowed_and_the_border_passes(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "infinito")
    assert failing(of_log(folder, min_utilisation=0.6)) == []
    assert failing(of_log(folder, min_utilisation=0.61)) == ["memory utilisation"]
    assert Limits(max_repetition=1.5, max_spread=0.0).problems() == [
        "--max-repetition is 1.5; allowed: [0, 1]",
        "--max-spread is 0.0; allowed: > 0",
    ]


def test_perplexity_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "infinito")
    best = folder / "best"
    best.mkdir()
    (best / "training.json").write_text(json.dumps({"dev": {"token": 80.0}}))
    run = run_of(best)
    assert run is not None and run.directory == folder
    assert perplexity_item(best, run, Limits()).passed is True
    assert perplexity_item(best, run, Limits(max_perplexity=79.9)).passed is False
    (best / "training.json").write_text("{}")
    with pytest.raises(UserError, match="was never evaluated"):
        perplexity_item(best, run, Limits())
    alone = Path(shutil.copytree(best, tmp_path / "downloaded"))
    assert run_of(alone) is None and perplexity_item(alone, None, Limits()).passed is None


class Writer:
    """A generator that writes what a function of (seed, prompt's number) says."""

    def __init__(self, write: Any, explored: float = 0.4, context: int | None = None) -> None:
        self.write, self.explored = write, explored
        self.engine = SimpleNamespace(context=context)
        self.tokenizer = self
        self.unknown_ids, self.calls = (7,), 0
        self.prompts: Sequence[Sequence[int]] = ()

    def encode(self, text: str) -> Any:
        return SimpleNamespace(tolist=lambda: list(range(len(text))))

    def continued(self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig) -> list[Generated]:
        assert sampling.temperature == 1.0 and sampling.banned == (7,)
        self.calls, self.prompts = self.calls + 1, prompts
        texts = [self.write(sampling.seed, number, self.calls) for number in range(len(prompts))]
        return [
            Generated(tuple(map(ord, text)), text, "length", self.explored if text else 0.0) for text in texts
        ]


def of_texts(writer: Writer, **limits: float) -> dict[str, Item]:
    found = generation_items(writer, Limits(**limits), new_tokens=16, seed=3)  # type: ignore[arg-type]
    return {item.name: item for item in found}


def good(seed: int, number: int, call: int) -> str:
    return f"text {number} of the seed {seed}"


def test_texts_that_are_well_written_pass() -> None:
    items = of_texts(Writer(good))
    assert failing(items) == [] and len(items) == 5
    assert items["exploration"].value == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("writer", "wrong"),
    [
        (Writer(lambda s, n, c: good(s, n, c) if n else " \n"), "generated texts that are empty"),
        (Writer(lambda s, n, c: good(s + c, n, c)), "the same text for the same seed"),
        (Writer(lambda s, n, c: good(0, n, c)), "another text for another seed"),
        (Writer(lambda s, n, c: f"{s}" + "abc" * 30), "repetition of 3-grams"),
        (Writer(good, explored=0.0), "exploration"),
        (Writer(good, explored=1.0), "exploration"),
    ],
)
def test_texts_that_are_not_fail_at_their_item_alone(writer: Writer, wrong: str) -> None:
    assert failing(of_texts(writer)) == [wrong]


def test_a_model_that_writes_nothing_fails_where_nothing_can_be_measured() -> None:
    items = of_texts(Writer(lambda s, n, c: ""))
    wrong = {"generated texts that are empty", "repetition of 3-grams", "exploration"}
    assert wrong <= set(failing(items)) and items["exploration"].why
    assert items_json([items["exploration"]])[0] == {
        "name": "exploration",
        "value": None,
        "limit": "[0.02, 0.98]",
        "result": "fail",
        "why": "the texts are too short to measure it",
    }


def test_prompts_leave_room_in_a_short_context() -> None:
    writer = Writer(good, context=16)
    of_texts(writer)
    assert max(map(len, writer.prompts)) == 8
