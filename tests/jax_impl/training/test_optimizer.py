"""AdamW as the paper has it, with the schedule and the decay that a recipe asks for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from common.config import ModelConfig, TrainConfig
from jax_impl.loading import load_cross_encoder
from jax_impl.models.lora import add_lora
from jax_impl.training.optimizer import decayed, learning_rate, make_optimizer
from tests.tiny import World


def rates(steps: int, **settings: Any) -> list[float]:
    schedule = learning_rate(TrainConfig(learning_rate=1.0 - 1e-9, **settings), steps)
    return [float(schedule(step)) for step in range(steps)]


def test_linear_rises_to_the_rate_and_falls_to_zero_after_the_last_step() -> None:
    expected = [1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    np.testing.assert_allclose(rates(10, warmup=0.2), expected, atol=1e-6)


def test_cosine_halves_in_the_middle() -> None:
    np.testing.assert_allclose(
        rates(4, warmup=0.0, schedule="cosine"), (1 + np.cos(np.pi * np.arange(4) / 4)) / 2, atol=1e-6
    )


def test_constant_stays() -> None:
    np.testing.assert_allclose(rates(5, warmup=0.4, schedule="constant"), [1 / 3, 2 / 3, 1, 1, 1], atol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_a_run_of_one_step_still_learns(schedule: str) -> None:
    np.testing.assert_allclose(rates(1, warmup=0.9, schedule=schedule), [1.0], atol=1e-6)


def test_matrices_decay_and_biases_norms_and_scalars_do_not(world: World) -> None:
    model = load_cross_encoder(world.base, ModelConfig()).model
    add_lora(model.encoder, 2, 4.0, ("query",), rngs=nnx.Rngs(0))
    mask = nnx.to_flat_state(decayed(nnx.state(model, nnx.Param)))
    decays = {".".join(map(str, path)): leaf.get_value() for path, leaf in mask}
    never = ("bias", "scale", "resonance.u", "resonance.gamma", "resonance.b")
    assert decays == {name: not name.endswith(never) for name in decays}
    assert decays["bert.embeddings.word_embeddings.embedding"] and decays["classifier.kernel"]
    assert decays["bert.encoder.layer.0.attention.self.query.lora_a"]
    assert sum(decays.values()) > 10 and not decays["resonance.gamma"]


def test_pooler_and_classifier_learn_at_their_own_rate(world: World) -> None:
    parameters = nnx.state(load_cross_encoder(world.base, ModelConfig()).model, nnx.Param)
    gradients = jax.tree.map(jnp.ones_like, parameters)

    def moved(portable_rate: float) -> dict[str, float]:
        config = TrainConfig(portable_rate=portable_rate, weight_decay=0.0)
        optimizer = make_optimizer(config, 10)
        updates, _ = optimizer.update(gradients, optimizer.init(parameters), parameters)
        flat = nnx.to_flat_state(updates)
        return {".".join(map(str, path)): float(jnp.max(jnp.abs(leaf.get_value()))) for path, leaf in flat}

    plain, faster = moved(1.0), moved(8.0)
    for name, size in plain.items():
        times = 8 if name.startswith(("bert.pooler.", "classifier.")) else 1
        assert faster[name] == pytest.approx(times * size, rel=1e-5), name
    assert sum(faster[name] > 2 * plain[name] for name in plain) == 4


def test_updates_are_those_of_clipped_adamw_by_hand(seed: int) -> None:
    config = TrainConfig(learning_rate=0.01, weight_decay=0.1, max_grad_norm=0.5, warmup=0.0)
    rng = np.random.default_rng(seed)
    parameters = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
    ours = {name: jnp.asarray(value, jnp.float32) for name, value in parameters.items()}
    optimizer = make_optimizer(config, steps=4)
    state = optimizer.init(ours)
    first, second = ({name: 0.0 for name in parameters} for _ in range(2))
    for step in range(4):
        gradient = {name: rng.normal(size=value.shape) for name, value in parameters.items()}
        updates, state = optimizer.update(
            {name: jnp.asarray(value, jnp.float32) for name, value in gradient.items()}, state, ours
        )
        ours = optax.apply_updates(ours, updates)
        norm = np.sqrt(sum((value**2).sum() for value in gradient.values()))
        for name, value in gradient.items():
            clipped = value * min(1, 0.5 / norm)
            first[name] = 0.9 * first[name] + 0.1 * clipped
            second[name] = 0.999 * second[name] + 0.001 * clipped**2
            direction = first[name] / (1 - 0.9 ** (step + 1))
            direction = direction / (np.sqrt(second[name] / (1 - 0.999 ** (step + 1))) + 1e-8)
            decay = 0.1 * parameters[name] if name == "kernel" else 0.0
            parameters[name] = parameters[name] - 0.01 * (1 - step / 4) * (direction + decay)
    for name, value in parameters.items():
        np.testing.assert_allclose(ours[name], value, atol=1e-5)
