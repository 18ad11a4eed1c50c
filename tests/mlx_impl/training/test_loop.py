"""A run in MLX from its first step to its last: its log, its checkpoints, going on where it stopped."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="needs MLX: install the extra `mlx`")

from common.backends import load_scorer
from common.checkpoint import read_json, read_tensors
from common.config import RerankerConfig, to_dict
from common.errors import UserError
from common.runs import read_metrics
from mlx_impl.training import loop
from tests.tiny import World, train

FILES = ("model.safetensors", "resonance.safetensors", "config.json")
QUERIES, PASSAGES = ["bolum bano", "dolum bano kino"], ["bolum banosh luro", "dolum kinosh bano"]


@dataclass(frozen=True)
class Finished:
    """A run that nothing disturbed."""

    config: RerankerConfig
    run: Path
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """12 steps with every loss term and dropout; dev is train, so that it does improve."""
    config = world.config(max_steps=12, checkpoint_every=3, evaluations=2, hidden_dropout=0.1)
    config = replace(config, quantum=replace(config.quantum, mode="resonance"))
    config = replace(config, data=replace(config.data, dev_split="train"))
    runs = tmp_path_factory.mktemp("finished")
    return Finished(config, runs / "tiny", train(config, runs, backend="mlx"))


def log_of(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without its times."""
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read_metrics(run)]


def states(runs: Path) -> list[int]:
    return sorted(int(path.name) for path in (runs / "tiny" / "state").glob("*") if path.name.isdigit())


def stop_before(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException) -> None:
    """Let step number `step` of the next run fail."""
    make = loop.make_step

    def breaking(*arguments: Any) -> Any:
        run_step, state = make(*arguments), arguments[1]

        def run(*inputs: Any) -> Any:
            if int(state.step) + 1 == step:
                raise error
            return run_step(*inputs)

        return run

    monkeypatch.setattr(loop, "make_step", breaking)


def test_a_run_leaves_its_log_and_two_checkpoints_that_both_backends_score_alike(finished: Finished) -> None:
    lines = log_of(finished.run)
    assert [line["step"] for line in lines if line["kind"] == "dev"] == [0, 6, 12]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 6, 10, 12]
    dev = {line["step"]: line["nDCG@10"] for line in lines if line["kind"] == "dev"}
    best = max(dev, key=lambda step: dev[step])
    assert (
        finished.summary.items() >= {"steps": 12, "best_step": best, "best_dev": dev[best]}.items()
        and best > 0
    )
    for folder, step in (("best", best), ("final", 12)):
        directory = finished.run / folder
        training = read_json(directory / "training.json")
        assert training["step"] == step
        assert training["config"] == json.loads(json.dumps(to_dict(finished.config)))
        scores = [load_scorer(directory, backend).score(QUERIES, PASSAGES) for backend in ("mlx", "jax")]
        np.testing.assert_allclose(scores[0].score, scores[1].score, atol=1e-4)
        np.testing.assert_allclose(scores[0].portable, scores[1].portable, atol=1e-4)
    assert states(finished.run.parent) == [9, 12]


def test_an_interrupted_run_ends_in_the_same_bits(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_before(patch, 8, RuntimeError("the machine is gone"))
        with pytest.raises(RuntimeError, match="gone"):
            train(finished.config, tmp_path, backend="mlx")
    assert states(tmp_path) == [3, 6]
    said: list[str] = []
    train(finished.config, tmp_path, say=said.append, backend="mlx")
    assert "resumed at step 6 of 12" in said
    for folder in ("best", "final"):
        for file in FILES:
            ours, expected = tmp_path / "tiny" / folder / file, finished.run / folder / file
            assert ours.read_bytes() == expected.read_bytes(), f"{folder}/{file} differs"
    assert log_of(tmp_path / "tiny") == log_of(finished.run)


def test_training_stops_early_and_a_ctrl_c_at_that_moment_is_not_lost(world: World, tmp_path: Path) -> None:
    config = world.config(max_steps=8, evaluations=8, patience=2, learning_rate=1e-12)
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if text.startswith("no better dev result in 2 evaluations: stopped early at step 2"):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, say=say, backend="mlx")
    assert said[-1].startswith("no better dev result")
    assert (tmp_path / "tiny" / "final" / "model.safetensors").exists()
    log = log_of(tmp_path / "tiny")
    summary = train(config, tmp_path, backend="mlx")  # the same command again: nothing is left to train
    assert summary["steps"] == 2 and summary["best_step"] == 0 and log_of(tmp_path / "tiny") == log


def test_running_out_of_memory_names_the_settings_to_lower(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_before(
        monkeypatch, 1, RuntimeError("[metal::malloc] Attempting to allocate 123 bytes which is greater than")
    )
    with pytest.raises(UserError, match=r"out of memory: raise --train\.micro-batches(?s:.*)allocate 123"):
        train(world.config(), tmp_path, backend="mlx")


def test_only_adapters_and_heads_change_under_lora(world: World, tmp_path: Path) -> None:
    config = world.config(max_steps=3, evaluations=1)
    config = replace(config, model=replace(config.model, use_lora=True))
    train(config, tmp_path, backend="mlx")
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
        train(config, tmp_path, backend="mlx")


def test_nan_stops_the_run_and_no_state_is_written_after_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = loop.make_step

    def poisoned(*arguments: Any) -> Any:
        run_step, state = make(*arguments), arguments[1]

        def run(*inputs: Any) -> Any:
            if int(state.step) == 6:
                state.model.resonance.gamma = state.model.resonance.gamma * float("nan")
            return run_step(*inputs)

        return run

    monkeypatch.setattr(loop, "make_step", poisoned)
    with pytest.raises(UserError, match=r"step 8: .*loss.* is not a finite number"):
        train(world.config(evaluations=1), tmp_path, backend="mlx")
    assert states(tmp_path) == [4]
