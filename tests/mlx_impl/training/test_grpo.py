"""GRPO's arithmetic against NumPy: advantages, the weights of each loss, the clip, the KL."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="needs MLX and mlx-lm: install the extra `mlx`")

import mlx.core as mx

from common.expansion.config import PolicyConfig
from mlx_impl.training.grpo import Completions, group_advantages, policy_loss, token_weights


def policy(**values: Any) -> PolicyConfig:
    return dataclasses.replace(PolicyConfig(), **values)


def of_figures(mask: mx.array, advantages: mx.array, weights: mx.array) -> Completions:
    """Completions of which the loss reads these alone."""
    ids = [mx.zeros(0, mx.int32)] * 4
    return Completions(*ids, mask, advantages, weights)


def test_advantages_compare_a_group_and_a_silent_one_gives_none() -> None:
    rewards = np.array([0.1, 0.5, 0.9, 0.5, 0.7, 0.7, 0.7, 0.7])
    advantages, silent = group_advantages(rewards, policy())
    spread = np.std(rewards[:4], ddof=1)
    np.testing.assert_allclose(advantages[:4], (rewards[:4] - 0.5) / (spread + 1e-4))
    assert silent == 0.5 and not advantages[4:].any()
    centred, _ = group_advantages(rewards, policy(loss_type="dr_grpo"))
    np.testing.assert_allclose(centred[:4], rewards[:4] - 0.5)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("grpo", [1 / 8, 1 / 16, 1 / 4, 1 / 4]),
        ("dr_grpo", [1 / 40] * 4),
        ("dapo", [1 / 8] * 4),
        ("bnpo", [1 / 12, 1 / 12, 1 / 4, 1 / 4]),
    ],
)
def test_weights_of_each_loss(loss: str, expected: list[float]) -> None:
    """Completions of 2, 4, 1 and (cut off) 0 counted tokens; another of 1 makes up dapo's 8."""
    counts = [2, 4, 1, 1]
    config = policy(loss_type=loss, max_completion_length=10)
    np.testing.assert_allclose(token_weights(counts, config, 2), expected)
    assert np.isfinite(token_weights([0, 0], config, 2)).all()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_loss_is_the_formula(level: str) -> None:
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    random = np.random.default_rng(seed)
    new, old, reference = (random.normal(-2, 0.3, (3, 5)) for _ in range(3))
    mask = np.arange(5) < np.array([[5], [3], [1]])
    advantages, weights = random.normal(size=3), mask * random.random((3, 1))
    config = policy(importance_sampling_level=level, epsilon=0.1, epsilon_high=0.2, beta=0.3)
    batch = of_figures(mx.array(mask), mx.array(advantages), mx.array(weights))
    arrays = (mx.array(x) for x in (new, old, reference))
    loss, kl, acts = policy_loss(*arrays, batch, config)
    ratio = np.exp(new - old)
    if level == "sequence":
        ratio = np.exp(((new - old) * mask).sum(1, keepdims=True) / mask.sum(1, keepdims=True)) * np.ones(
            (3, 5)
        )
    plain = ratio * advantages[:, None]
    bounded = np.clip(ratio, 0.9, 1.2) * advantages[:, None]
    k3 = np.exp(reference - new) - (reference - new) - 1
    expected = ((0.3 * k3 - np.minimum(plain, bounded)) * weights).sum()
    np.testing.assert_allclose(float(loss), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(float(kl), (k3 * mask).sum(), rtol=1e-4)
    assert int(acts) == ((bounded < plain) & mask).sum()


def test_at_the_start_the_gradient_is_the_policy_gradient_and_a_clip_stops_it() -> None:
    config = policy(beta=0.0)
    weights = mx.full((1, 2), 0.5)
    batch = of_figures(mx.ones((1, 2)) > 0, mx.array([2.0]), weights)
    old = mx.array([[-1.0, -1.0]])

    def loss(new: mx.array) -> mx.array:
        return policy_loss(new, old, old, batch, config)[0]

    np.testing.assert_allclose(np.array(mx.grad(loss)(old)), [[-1.0, -1.0]], rtol=1e-6)
    np.testing.assert_allclose(np.array(mx.grad(loss)(old + mx.array([[0.5, 0.0]])))[0, 0], 0.0)
