"""The GPU suite at toy size: all parts in one call; what fails or is missing costs nothing else."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_suite
from benchmarks.gpu_suite import (
    Job,
    NotRun,
    Row,
    budgets,
    flops_per_token,
    run_part,
    switch_rows,
    token_rates,
)
from benchmarks.record import Record
from common.checkpoint import read_config
from common.errors import UserError
from common.language.architectures import InfinitoConfig, language_config, parameter_count
from common.language.config import InfinitoRecipe
from tests.tiny import World

FOREVER = float("inf")


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record("gpu_suite", {}, device="cpu", folder=tmp_path / "results")


def rows_of(file: Path) -> dict[str, Row]:
    return {row["what"]: row for row in json.loads(file.read_text())["rows"]}


def gives(name: str) -> Callable[[float], list[Row]]:
    return lambda _: [gpu_suite.row(name, 1.0, "things")]


def fails(error: BaseException) -> Callable[[float], list[Row]]:
    def run(_: float) -> list[Row]:
        raise error

    return run


# --- the order of things ---


def test_a_failure_is_noted_and_the_others_are_measured(record: Record) -> None:
    jobs = [
        Job("bad", fails(UserError("no such file")), "a"),
        Job("worse", fails(ZeroDivisionError("by zero")), "a"),
        Job("cut", fails(NotRun("cut at step 3 of 9")), "a"),
        Job("good", gives("speed"), "a"),
    ]
    state = run_part("lm", jobs, FOREVER, record)
    assert state["done"] == ["good"] and state["not_run"] == {"cut": "cut at step 3 of 9"}
    assert state["failed"] == {"bad": "UserError: no such file", "worse": "ZeroDivisionError: by zero"}
    stored = rows_of(record.path)
    assert stored["speed"]["ours"] == 1.0
    assert {name: stored["part lm"][name] for name in state} == state


def test_what_an_interruption_leaves_says_what_was_done_and_what_was_not(record: Record) -> None:
    jobs = [
        Job("first", gives("speed"), "a"),
        Job("second", fails(KeyboardInterrupt()), "a"),
        Job("third", gives("memory"), "a"),
    ]
    with pytest.raises(KeyboardInterrupt):
        run_part("lm", jobs, FOREVER, record)
    stored = rows_of(record.path)
    assert stored["part lm"]["done"] == ["first"] and "speed" in stored and "memory" not in stored
    assert stored["part lm"]["not_run"] == {"second": "interrupted", "third": "no time left"}


def test_a_job_is_begun_only_when_there_is_time_for_one_of_its_kind(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(gpu_suite.time, "monotonic", lambda: now[0])
    given: list[float] = []

    def takes(seconds: float) -> Callable[[float], list[Row]]:
        def run(minutes: float) -> list[Row]:
            given.append(minutes)
            now[0] += seconds
            return []

        return run

    kinds = {"one": ("long", 60.0), "two": ("long", 60.0), "small": ("short", 20.0), "late": ("short", 20.0)}
    jobs = [Job(name, takes(seconds), kind) for name, (kind, seconds) in kinds.items()]
    state = run_part("lm", jobs, 90.0, record)
    assert state["done"] == ["one", "small"] and given == [1.5, 0.5]
    assert state["not_run"] == {"two": "no time left", "late": "no time left"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["9"], {"lm": 6.0, "ablations": 3.0}),
        (["lm=5"], {"lm": 5.0, "ablations": 4.5}),
        (["8", "lm=5"], {"lm": 5.0, "ablations": 3.0}),
        (["lm=20"], {"lm": 20.0, "ablations": 0.0}),
        (["0"], {"lm": 0.0, "ablations": 0.0}),
    ],
)
def test_minutes_are_of_the_call_or_of_a_part(words: list[str], expected: dict[str, float]) -> None:
    assert budgets(words, ["lm", "ablations"]) == pytest.approx(expected)


@pytest.mark.parametrize("word", ["-1", "nan", "inf", "soon", "lm=", "speed=1", "=3"])
def test_minutes_that_are_none_are_refused(word: str) -> None:
    with pytest.raises(UserError, match=r"--minutes .*lm, ablations"):
        budgets([word], ["lm", "ablations"])


# --- what is missing ---


def test_without_a_gpu_nothing_is_begun(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no GPU: JAX says 'cpu'.*--toy"):
        gpu_suite.main(["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")])
    assert not list(tmp_path.iterdir())


def test_everything_that_is_missing_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESONANCE_DATA", str(tmp_path / "nothing"))
    found = gpu_suite.missing(gpu_suite.full(tmp_path), ["samples", "ablations", "reranker"], tmp_path)
    for pattern in (
        "samples: .*wikitext",
        "samples: tokenizer 'gpt2' was not found",
        "samples: .*infinito/best is not there",
        "ablations: .*wikitext",
        "ablations: .*alpaca",
        *(f"reranker: .*{name}" for name in ("conala", "wikiqa", "scifact", "nfcorpus")),
    ):
        assert sum(bool(re.match(pattern, line)) for line in found) == 1, (pattern, found)
    assert not gpu_suite.missing(
        gpu_suite.toy(tmp_path), ["lm", "samples", "ablations", "reranker"], tmp_path
    )


def test_unknown_parts_and_doubled_seeds_are_refused() -> None:
    with pytest.raises(UserError, match=r"--parts .*'lms'.*lm, samples"):
        gpu_suite.parsed(["--parts", "lms,samples"])
    with pytest.raises(UserError, match="--seeds"):
        gpu_suite.parsed(["--seeds", "1", "1"])


# --- numbers ---


def test_the_formula_of_mfu_counts_what_the_model_multiplies() -> None:
    model = InfinitoConfig()
    plain = dataclasses.replace(model, memory_slots=0)
    assert 65e6 < parameter_count(model) < 75e6
    attention = 12 * 8 * 640 * 256  # layers, width, context
    assert flops_per_token(plain) == 6 * parameter_count(plain) + attention
    assert flops_per_token(model) - flops_per_token(plain) == pytest.approx(
        6 * (parameter_count(model) - parameter_count(plain)) + 12 * 640 * 257
    )


def log(*lines: tuple[int, str, float]) -> list[dict[str, Any]]:
    return [{"step": step, "kind": kind, "seconds": at, "counted_share": 0.5} for step, kind, at in lines]


def test_tokens_a_second_leave_out_compiling_evaluations_and_padding() -> None:
    item = InfinitoRecipe().changed(train={"batch_size": 4, "unroll": 2}, model={"context": 16})
    lines = log(
        (1, "train", 30.0), (10, "train", 39.0), (10, "dev", 60.0), (20, "train", 62.0), (30, "train", 67.0)
    )
    assert token_rates(item, lines) == [64.0, 128.0]


def test_mfu_of_an_unknown_device_is_not_known() -> None:
    rows = gpu_suite.speed_rows(
        InfinitoRecipe(), InfinitoConfig(), log((1, "train", 1.0), (11, "train", 2.0))
    )
    speed, mfu, memory = rows
    assert speed["ours"] > 0 and mfu["ours"] is None and mfu["ratio"] is None and memory["ours"] is None
    assert mfu["peak_flops"].startswith("not known")


def test_mfu_is_the_share_of_the_devices_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_suite.PEAK_BF16, "cpu", 1e15)
    item = InfinitoRecipe().changed(train={"batch_size": 32, "unroll": 2})
    speed, mfu, _ = gpu_suite.speed_rows(item, item.model, log((1, "train", 1.0), (11, "train", 2.0)))
    assert speed["ours"] == 32 * 2 * 256 * 0.5 * 10
    assert mfu["ours"] == pytest.approx(speed["ours"] * flops_per_token(item.model) / 1e15)
    assert mfu["ratio"] == pytest.approx(mfu["ours"] / 0.4)


def test_switches_are_compared_over_the_seeds_of_both() -> None:
    found = {
        "infinito": {0: {"word": 100.0, "static": 110.0}, 1: {"word": 104.0, "static": 110.0}},
        "lstm": {0: {"word": 200.0, "static": 200.0}, 2: {"word": 1.0, "static": 1.0}},
        "transformer": {2: {"word": 90.0, "static": 90.0}},
    }
    rows = {row["what"]: row for row in switch_rows("infinito", found, "infinito")}
    assert rows["infinito: infinito"]["ours"] == 102.0 and rows["infinito: infinito"]["peer"] is None
    lstm = rows["infinito: lstm"]
    assert (lstm["ours"], lstm["peer"], lstm["ratio"]) == (200.0, 100.0, 0.5)
    assert lstm["difference"] == 100.0 and lstm["static_difference"] == 90.0
    assert rows["infinito: transformer"]["peer"] is None


def test_seeds_of_an_earlier_call_stay_in_the_comparison(record: Record, tmp_path: Path) -> None:
    value = {"word": 100.0, "static": 110.0}
    record.add(*switch_rows("infinito", {"infinito": {0: value}, "lstm": {0: value}}, "infinito"))
    plan = gpu_suite.full(tmp_path)
    suite = gpu_suite.Suite(plan, tmp_path, (1,), record, gpu_suite.ablate.Tools("jax"))
    assert suite._measured("infinito") == {"infinito": {0: value}, "lstm": {0: value}}
    assert suite._measured("indra") == {}


def test_the_switches_of_indra_are_those_of_its_recipe(tmp_path: Path) -> None:
    switches = gpu_suite.full(tmp_path).indra
    assert list(switches) == ["unified", "pure", "aggressive", "gentle"]
    teachers = {name: item.distillation.teacher for name, item in switches.items()}
    assert teachers.pop("pure") is None
    assert set(teachers.values()) == {str(tmp_path / "indra_teacher" / "best")}
    assert switches["aggressive"].distillation.cross_entropy_weight == 0.0
    assert switches["gentle"].base == str(tmp_path / "indra_pure-s{seed}" / "best")
    assert len({item.name for item in switches.values()}) == 4
    assert {item.train.max_steps for item in switches.values()} == {800}


def test_what_a_gpu_is_to_measure_can_be_measured(tmp_path: Path, record: Record) -> None:
    plan = gpu_suite.full(tmp_path)
    languages = [plan.lm, plan.teacher, *plan.infinito.values(), *plan.indra.values()]
    for item in (*languages, *plan.rerankers, plan.heads):
        item.validate()
    assert len({item.name for item in languages}) == len(languages)
    suite = gpu_suite.Suite(plan, tmp_path, (0, 1, 2), record, gpu_suite.ablate.Tools("jax"))
    jobs = {part: [job.name for job in suite.jobs(part)] for part in gpu_suite.PARTS}
    assert jobs["ablations"][:2] == ["infinito, infinito, seed 0", "infinito, no_memory, seed 0"]
    assert jobs["speed"] == ["training, transformer", "training, infinito", "generation"]
    assert jobs["reranker"] == ["quantum_resonance", "general_reranker"]
    assert {part: len(set(names)) for part, names in jobs.items()} == {
        "lm": 1,
        "samples": 1,
        "ablations": 1 + 3 * (5 + 4),
        "speed": 3,
        "reranker": 2,
        "heads": 3 * len(gpu_suite.HEAD_VARIANTS),
    }


# --- a whole call ---


def test_a_call_of_no_minutes_says_what_was_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--toy", "--runs", str(tmp_path), "--minutes", "0", "--parts", "lm,ablations", "--seeds", "0"]
    gpu_suite.main(words)
    said = capsys.readouterr().out
    assert "not run: lm: train and test: no time left" in said
    assert "not run: ablations: indra, gentle, seed 0: no time left" in said
    stored = rows_of(tmp_path / "gpu_suite.cpu.json")
    assert stored["part lm"]["not_run"] == {"train and test": "no time left"}
    assert not (tmp_path / "infinito").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_parts_in_one_call(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="the peer: install the extra `peers`")
    toy, config = gpu_suite.toy, world.config(max_steps=2, evaluations=1)
    config = config.changed(data={"encoder": str(world.base)})  # of MiniLM a step takes seconds
    monkeypatch.setattr(
        gpu_suite, "toy", lambda runs: dataclasses.replace(toy(runs), rerankers=(config,), heads=config)
    )
    gpu_suite.main(["--toy", "--runs", str(tmp_path / "runs"), "--seeds", "0", "--minutes", "200"])
    stored = rows_of(tmp_path / "runs" / "gpu_suite.cpu.json")
    for part in gpu_suite.PARTS:
        state = stored[f"part {part}"]
        assert state["done"] and not state["failed"] and not state["not_run"], state
    dev = stored["infinito: dev perplexity a token, best"]
    assert [step for step, _ in dev["by_step"]] == [3, 6] and dev["ours"] > 1
    assert dev["ours"] == min(value for _, value in dev["by_step"])
    for mode in ("static", "cache"):
        test = stored[f"infinito: test perplexity a word, {mode}"]
        assert test["ours"] == test["result"]["word"] and test["peer"] is None
    size = parameter_count(language_config(read_config(tmp_path / "runs" / "infinito" / "best"), ""))
    assert stored["infinito: training"]["flops_a_token"] > 6 * size
    assert stored["infinito: training"]["flops_a_token"] < 12 * size
    texts = stored["infinito: generated text"]
    assert len(texts["texts"]) == len(gpu_suite.DEMO_PROMPTS) + 2 and any(t["text"] for t in texts["texts"])
    assert texts["metrics"].keys() == {"human text", "<unk> allowed", "<unk> banned"}
    for switch in ("no_memory", "no_exploration", "transformer", "lstm"):
        assert stored[f"infinito: {switch}"]["peer_name"] == "infinito"
    for switch in ("pure", "aggressive", "gentle"):
        assert stored[f"indra: {switch}"]["peer_name"] == "unified"
    assert stored["training, infinito"]["ours"] > 0 and stored["greedy generation, batch 2"]["ours"] > 0
    assert any(what.startswith("tiny: ") and what.endswith("fused") for what in stored)
    assert any(
        what.startswith("head cls_only: ") and row["difference"] is not None for what, row in stored.items()
    )
    assert str(tmp_path) not in json.dumps([row for what, row in stored.items() if "perplexity" in what])
