"""A run from its first step to its last, through everything that can happen in between."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import common.checkpoint as checkpoint
from common.checkpoint import read_config, read_json, read_tensors
from common.config import RerankerConfig, to_dict
from common.errors import UserError
from common.reranker.training import DevResult
from common.runs import read_metrics
from jax_impl import loading
from jax_impl.scoring import load_scorer
from jax_impl.training import loop
from tests.tiny import World, command, environment, train

FILES = ("model.safetensors", "resonance.safetensors", "config.json")
QUERIES, PASSAGES = ["bolum bano", "dolum bano kino"], ["bolum banosh luro", "dolum kinosh bano"]


@dataclass(frozen=True)
class Finished:
    """A run that nothing disturbed."""

    config: RerankerConfig
    run: Path
    summary: dict[str, Any]


@pytest.fixture(scope="session")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """40 steps with every loss term and dropout; dev is train, so that it does improve."""
    config = world.config(max_steps=40, checkpoint_every=3, evaluations=4, hidden_dropout=0.1)
    config = replace(config, quantum=replace(config.quantum, mode="resonance"))
    config = replace(config, data=replace(config.data, dev_split="train"))
    runs = tmp_path_factory.mktemp("finished")
    return Finished(config, runs / "tiny", train(config, runs))


def latest_state(runs: Path) -> int:
    steps = [int(path.name) for path in (runs / "tiny" / "state").glob("*") if path.name.isdigit()]
    return max(steps, default=0)


def log_of(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without its times."""
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read_metrics(run)]


def assert_as_uninterrupted(runs: Path, finished: Finished) -> None:
    """The same bits in both checkpoints, and every step in the log once with the same values."""
    for folder in ("best", "final"):
        for file in FILES:
            ours, expected = runs / "tiny" / folder / file, finished.run / folder / file
            assert ours.read_bytes() == expected.read_bytes(), f"{folder}/{file} differs"
    assert log_of(runs / "tiny") == log_of(finished.run)


def break_step(monkeypatch: pytest.MonkeyPatch, breaks: Callable[[Any], Any]) -> None:
    """Let `breaks` change the state that each step returns."""
    make = loop.make_step

    def broken(*arguments: Any) -> Any:
        step = make(*arguments)

        def run(*inputs: Any) -> Any:
            state, logged = step(*inputs)
            return breaks(state), logged

        return run

    monkeypatch.setattr(loop, "make_step", broken)


def test_a_run_leaves_its_log_and_two_checkpoints_that_score(finished: Finished) -> None:
    lines = log_of(finished.run)
    assert [line["step"] for line in lines if line["kind"] == "dev"] == [0, 10, 20, 30, 40]
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == [1, 10, 20, 30, 40]
    assert {"loss", "rank", "resonance_relevant", "entanglement_attract", "portable", "temperature"} <= {
        *lines[1]
    }
    dev = {line["step"]: line["nDCG@10"] for line in lines if line["kind"] == "dev"}
    best = max(dev, key=lambda step: dev[step])
    assert finished.summary.items() >= {"steps": 40, "best_step": best, "best_dev": dev[best]}.items()
    for folder, step in (("best", best), ("final", 40)):
        directory = finished.run / folder
        training = read_json(directory / "training.json")
        assert training["step"] == step and training["dev"]["nDCG@10"] == dev[step]
        assert training["config"] == json.loads(json.dumps(to_dict(finished.config)))
        scorer = load_scorer(directory)
        assert scorer.fusion_weight == read_config(directory)["resonance"]["fusion_weight"]
        assert np.isfinite(scorer.score(QUERIES, PASSAGES).score).all()
        assert f"step {step}" in (directory / "README.md").read_text()


def test_a_tiny_set_is_learned_by_heart(world: World, tmp_path: Path) -> None:
    config = world.config(
        max_steps=200, batch_size=8, learning_rate=3e-3, evaluations=1, checkpoint_every=200
    )
    config = replace(config, data=replace(config.data, dev_split="train"))
    summary = train(config, tmp_path)
    lines = read_metrics(tmp_path / "tiny")
    losses = [line["rank"] for line in lines if line["kind"] == "train"]
    before = next(line["nDCG@10"] for line in lines if line["kind"] == "dev")
    assert before < 0.6 and summary["best_dev"] == pytest.approx(1.0)
    assert losses[-1] < 0.3 * losses[0]


def test_only_adapters_and_heads_change_under_lora(world: World, tmp_path: Path) -> None:
    config = world.config(max_steps=3, evaluations=1)
    config = replace(config, model=replace(config.model, use_lora=True))
    train(config, tmp_path)
    base, final = read_tensors(world.base), read_tensors(tmp_path / "tiny" / "final")
    changed = {key for key, value in base.items() if not np.array_equal(value, final[f"bert.{key}"])}
    linears = {key for key in base if key.startswith("encoder") and key.endswith("weight")}
    linears -= {key for key in linears if "LayerNorm" in key}
    assert changed == linears | {"pooler.dense.weight", "pooler.dense.bias"}


def test_a_lora_target_that_names_no_layer_is_refused(world: World, tmp_path: Path) -> None:
    config = world.config()
    lora = replace(config.model.lora, targets=("q_proj",))
    config = replace(config, model=replace(config.model, use_lora=True, lora=lora))
    with pytest.raises(UserError, match=r"model\.lora\.targets: LoRA targets \['q_proj'\]"):
        train(config, tmp_path)


def test_training_stops_early_once_dev_stays_behind_and_stays_stopped(world: World, tmp_path: Path) -> None:
    config = world.config(max_steps=8, evaluations=8, patience=2, learning_rate=1e-12)
    said: list[str] = []
    summary = train(config, tmp_path, say=said.append)
    assert summary["steps"] == 2 and summary["best_step"] == 0
    assert "no better dev result in 2 evaluations: stopped early at step 2" in said
    assert (tmp_path / "tiny" / "final" / "model.safetensors").exists()
    log = log_of(tmp_path / "tiny")
    assert train(config, tmp_path) == summary  # the same command again
    assert log_of(tmp_path / "tiny") == log


def test_collapsed_scores_stop_the_run_at_the_second_evaluation_after_warm_up(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "COLD_SPREAD", 0.0)  # all scores equal, and nothing is learned
    config = world.config(max_steps=10, evaluations=5, warmup=0.3, learning_rate=1e-12)
    config = replace(config, model=replace(config.model, start="masked_lm"))
    with pytest.raises(
        UserError, match=r"step 6: the scores have collapsed(?s:.*)Lower --train\.learning-rate"
    ):
        train(config, tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path / "tiny") if line["kind"] == "dev"] == [0, 2, 4, 6]


def test_one_collapsed_evaluation_is_forgiven() -> None:
    class Guard:
        config, steps = RerankerConfig(), 100

    def guard(step: int, spread: float, notes: dict[str, Any]) -> None:
        result = DevResult(0.5, 0.5, 0.5, 0.0, spread, None)
        loop.Trainer._guard_collapse(Guard(), step, result, notes)  # type: ignore[arg-type]

    notes: dict[str, Any] = {"collapsed": 0}
    for step, spread in ((20, 0.0), (30, 1.0), (40, 0.0), (50, 1.0)):
        guard(step, spread, notes)
    guard(60, 0.0, notes)
    with pytest.raises(UserError, match="twice in a row"):
        guard(70, 0.0, notes)


def test_nan_stops_the_run_and_no_state_is_written_after_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(state: Any) -> Any:
        if int(state.step) != 6:
            return state
        return state._replace(learned=jax.tree.map(lambda x: x * jnp.nan, state.learned))

    break_step(monkeypatch, poison)
    with pytest.raises(
        UserError, match=r"step 8: .*loss.* is not a finite number.*Lower --train\.learning-rate"
    ):
        train(world.config(evaluations=1), tmp_path)
    assert latest_state(tmp_path) == 4
    assert np.isfinite(load_scorer(tmp_path / "tiny" / "best").score(QUERIES, PASSAGES).score).all()


def test_running_out_of_memory_names_the_settings_to_lower(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = "RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\nmore"

    def fail(_: Any) -> Any:
        raise jax.errors.JaxRuntimeError(message)

    break_step(monkeypatch, fail)
    with pytest.raises(UserError) as error:
        train(world.config(), tmp_path)
    for part in (
        "out of memory",
        "--train.micro-batches (now 1)",
        "--train.batch-size (4)",
        "--data.list-size (4)",
        "--data.max-passage-tokens (24)",
        "--model.use-lora",
        "--fresh",
        "allocating 123 bytes",
    ):
        assert part in str(error.value)
    message = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        train(world.config(), tmp_path, fresh=True)


def test_going_on_with_another_recipe_is_refused_by_field(finished: Finished) -> None:
    other = replace(finished.config, train=replace(finished.config.train, learning_rate=0.5))
    with pytest.raises(UserError, match=r"train\.learning_rate: 0\.001 before, 0\.5 now"):
        train(other, finished.run.parent)


def test_a_full_disk_while_saving_best_keeps_the_previous_and_the_run_goes_on_later(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert finished.summary["best_step"] > 0  # so best/ is saved more than once
    write, saved = checkpoint._write, 0

    def full(path: Path, data: bytes) -> None:
        nonlocal saved
        saved += path.name == "model.safetensors"
        if saved == 2:
            write(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", full)
        with pytest.raises(
            UserError, match=r"best: No space left(?s:.*)previous checkpoint there is untouched"
        ):
            train(finished.config, tmp_path)
    best = tmp_path / "tiny" / "best"
    assert read_json(best / "training.json")["step"] == 0
    assert np.isfinite(load_scorer(best).score(QUERIES, PASSAGES).score).all()
    train(finished.config, tmp_path)
    assert_as_uninterrupted(tmp_path, finished)


def start(config: RerankerConfig, runs: Path, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(config, runs),
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_at(config: RerankerConfig, runs: Path, step: int, wait: float) -> bool:
    """kill -9 `wait` seconds after the state of `step` is there; false when the run was done before."""
    process = start(config, runs)
    assert process.stdout is not None
    try:
        while process.poll() is None and latest_state(runs) < step:
            time.sleep(0.005)
        time.sleep(wait)
    finally:
        process.kill()
        output, _ = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), output
    return process.returncode != 0


def test_ctrl_c_saves_and_the_same_command_goes_on(finished: Finished, tmp_path: Path) -> None:
    process = start(finished.config, tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("dev at step 0"):
            process.send_signal(signal.SIGINT)
            break
    rest, _ = process.communicate()
    assert process.returncode == 130, rest
    stopped = latest_state(tmp_path)
    assert 1 <= stopped < 40 and f"stopped at step {stopped}; the same command goes on" in rest
    said: list[str] = []
    train(finished.config, tmp_path, say=said.append)
    assert f"resumed at step {stopped} of 40" in said
    assert_as_uninterrupted(tmp_path, finished)


def test_a_killed_run_ends_in_the_same_bits(finished: Finished, tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    moment = int(rng.integers(1, 25)), float(rng.uniform(0, 0.2))
    print("kill -9 at (step, seconds after)", moment)
    kill_at(finished.config, tmp_path, *moment)
    train(finished.config, tmp_path)
    assert_as_uninterrupted(tmp_path, finished)


@pytest.mark.slow
def test_five_kills_leave_no_trace(finished: Finished, tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    steps = sorted(int(step) for step in rng.choice(np.arange(1, 34), 12, replace=False))
    kills = 0
    for moment in [(step, float(rng.uniform(0, 0.1))) for step in steps]:
        print("kill -9 at (step, seconds after)", moment)
        kills += kill_at(finished.config, tmp_path, *moment)
        if kills == 5:
            break
    assert kills == 5, "the run was too quick for its killer"
    process = start(finished.config, tmp_path)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert_as_uninterrupted(tmp_path, finished)


@pytest.mark.slow
def test_two_devices_train_as_one(finished: Finished, tmp_path: Path) -> None:
    process = start(finished.config, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "2 cpu device(s)" in output
    logs = [
        [line for line in log_of(run) if line.pop("kind") == "train"]
        for run in (finished.run, tmp_path / "tiny")
    ]
    for one, two in zip(*logs, strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-4)
    ours, theirs = (
        load_scorer(run / "final").score(QUERIES, PASSAGES) for run in (finished.run, tmp_path / "tiny")
    )
    np.testing.assert_allclose(ours.score, theirs.score, atol=2e-3)  # 40 steps of Adam, sums in another order
