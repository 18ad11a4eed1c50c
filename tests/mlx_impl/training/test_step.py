"""One step in MLX: the same result however its batch is cut up, for every objective and mode."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="needs MLX: install the extra `mlx`")

import mlx.core as mx

from common.config import ModelConfig, RerankerConfig
from mlx_impl.loading import load_cross_encoder
from mlx_impl.models.cross_encoder import CrossEncoder
from mlx_impl.models.lora import freeze
from mlx_impl.training.loop import _learns
from mlx_impl.training.optimizer import make_optimizer
from mlx_impl.training.step import Batch, Moment, TrainState, make_step
from tests.parity.backends import Mlx
from tests.parity.test_training import WITHOUT_GRADIENT, random_batch
from tests.tiny import World

KINDS = {
    **{
        name: {"objective": name}
        for name in (
            "bce",
            "listwise",
            "ranknet",
            "lambda",
            "listnet",
            "plistmle",
            "margin_mse",
            "soft_labels",
        )
    },
    "superposition": {"mode": "superposition"},
    "resonance": {"mode": "resonance", "entanglement_weight": 0.0},
}


def recipe(world: World, kind: str, **train: Any) -> RerankerConfig:
    settings = dict(KINDS[kind])
    objective = settings.pop("objective", "quantum")
    config = world.config(batch_size=4, objective=objective, warmup=0.0, **train)
    return replace(config, quantum=replace(config.quantum, **settings)).validate()


def one_step(
    world: World, config: RerankerConfig, seed: int, steps: int = 1
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Parameters after a step, and what was logged."""
    rates = config.train.hidden_dropout, config.train.attention_dropout
    model = load_cross_encoder(world.base, ModelConfig(), dropout=rates).model
    model.resonance.u = 0.3 * mx.random.normal((32,), key=mx.random.key(1))  # so that every term counts
    freeze(model, _learns(config))
    state = TrainState(model, make_optimizer(config.train, 10))
    step = make_step(config, state, mx.random.key(seed % 2**31) if rates[0] else None)
    rng = np.random.default_rng(seed)
    for number in range(steps):
        batch = Batch(*map(Mlx().array, random_batch(rng, 32)))
        logged = step(batch, Moment(1.5 - 0.1 * number, 0.05, 0.5 + 0.1 * number))
    assert int(state.step) == steps
    return Mlx().parameters(model), {name: float(value) for name, value in logged.items()}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_micro_batches_is_the_step_of_the_whole_batch(
    world: World, kind: str, dropout: float, seed: int
) -> None:
    start = Mlx().parameters(load_cross_encoder(world.base, ModelConfig()).model)
    results = [
        one_step(
            world, recipe(world, kind, micro_batches=parts, hidden_dropout=dropout, learning_rate=1e-4), seed
        )
        for parts in (1, 2)
    ]
    (whole, logged), (parts, logged_of_parts) = results
    assert logged == pytest.approx(logged_of_parts, rel=1e-4, abs=1e-4)
    for name, value in whole.items():
        # Adam's first step is the gradient's sign: where that is rounding, anything up to the rate
        difference = np.abs(value - parts[name])
        assert difference.max() <= 2.1e-4, name
        assert name.endswith(WITHOUT_GRADIENT) or np.mean(difference > 1e-5) < 0.1, name
    moved = [name for name, value in whole.items() if np.abs(value - start[name]).max() > 5e-5]
    assert len(moved) > len(start) / 2 and logged["loss"] > 0


def test_the_bias_rests_unless_a_pointwise_loss_needs_it(world: World, seed: int) -> None:
    for kind, learns in (("bce", True), ("resonance", False)):
        after, _ = one_step(world, recipe(world, kind), seed)
        assert (float(after["resonance.b"]) != -10.0) is learns


def test_a_step_compiles_once_and_not_for_every_moment(
    world: World, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, plain = [], CrossEncoder.__call__
    monkeypatch.setattr(CrossEncoder, "__call__", lambda *x: (calls.append(1), plain(*x))[1])
    one_step(world, recipe(world, "resonance"), seed, steps=4)
    assert len(calls) == 1
