"""GRPO's arithmetic against NumPy: advantages, the weights of each loss, the clip, the KL."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="needs MLX and mlx-lm: install the extra `mlx`")

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear

from common.expansion.config import LoraConfig, PolicyConfig
from mlx_impl.models.qwen import (
    LanguageModel,
    Origin,
    adapter_tensors,
    add_lora,
    load_base,
    with_fused_adapters,
)
from mlx_impl.training.grpo import (
    Completions,
    _padded,
    group_advantages,
    log_probs,
    policy_loss,
    token_weights,
)
from tests.tiny_expansion import write_expander, write_rows


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


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grpo")
    return write_expander(folder / "base", write_rows(folder / "rows"))


def adapted(base: Path, model: LanguageModel | None = None) -> LanguageModel:
    """A base with an adapter that does something."""
    loaded = model or load_base(Origin(base))
    add_lora(loaded, LoraConfig(rank=4, alpha=8.0, dropout=0.0), seed=7)
    for number, (_, module) in enumerate(sorted(loaded.model.named_modules(), key=lambda named: named[0])):
        if isinstance(module, LoRALinear) and "lora_b" in module.trainable_parameters():
            module.lora_b = 0.1 * mx.random.normal(module.lora_b.shape, key=mx.random.key(number))
    mx.eval(loaded.model.parameters())
    return loaded


def batch_of(random: np.random.Generator, size: int) -> tuple[Completions, list[list[int]]]:
    """Five completions of three prompts, of different lengths, and each whole row."""
    prompts = [random.integers(1, size, length).tolist() for length in (3, 1, 21)]
    rows = [
        (prompts[i], random.integers(1, size, int(length)).tolist())
        for i, length in zip([0, 0, 1, 2, 2], random.integers(1, 40, 5), strict=True)
    ]
    counts = [len(completion) for _, completion in rows]
    batch = _padded(rows, counts, np.full(5, 0.1), random.normal(size=5), max(counts))
    return batch, [prompt + completion for prompt, completion in rows]


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_prompt_that_is_read_once_gives_what_whole_rows_give(base: Path, checkpoint: bool) -> None:
    """Log-probabilities, entropies and the gradient, against mlx-lm's own pass over each row alone."""
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    model = adapted(base).model
    batch, rows = batch_of(np.random.default_rng(seed), model.args.vocab_size)
    assert batch.prompts.shape[0] == 3 and int(batch.padding.min()) >= 0

    def together(model: Any) -> mx.array:
        return (log_probs(model, batch, 0.7, checkpoint=checkpoint)[0] * batch.weights).sum()

    def alone(model: Any) -> mx.array:
        return sum(
            0.1 * one_by_one(model, row, count)[0].sum() for row, count in zip(rows, counts, strict=True)
        )

    counts = [int(row.sum()) for row in batch.mask]
    found, entropies = log_probs(model, batch, 0.7)
    for place, (row, count) in enumerate(zip(rows, counts, strict=True)):
        expected, entropy = one_by_one(model, row, count)
        np.testing.assert_allclose(np.array(found[place, :count]), np.array(expected), atol=1e-4)
        np.testing.assert_allclose(np.array(entropies[place, :count]), np.array(entropy), atol=1e-4)
    ours, theirs = (
        dict(tree_flatten(nn.value_and_grad(model, each)(model)[1])) for each in (together, alone)
    )
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name, value in theirs.items():
        np.testing.assert_allclose(np.array(ours[name]), np.array(value), atol=2e-5, rtol=1e-3, err_msg=name)


def one_by_one(model: Any, row: list[int], count: int) -> tuple[mx.array, mx.array]:
    """Log-probabilities and entropies of the last `count` tokens of one row, from its logits."""
    logits = model(mx.array([row]))[0, -count - 1 : -1] / 0.7
    logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logs, mx.array(row[-count:])[:, None], axis=-1)[:, 0]
    return chosen, -(mx.exp(logs) * logs).sum(axis=-1)


@pytest.mark.parametrize("stacked", [False, True])
def test_adapters_are_fused_while_they_generate_and_untouched_after(base: Path, stacked: bool) -> None:
    loaded = adapted(base)
    if stacked:
        loaded.model.freeze()
        adapted(base, loaded)
    ids = mx.array([[3, 4, 5, 6]])
    before, names = np.array(loaded.model(ids)), sorted(adapter_tensors(loaded))
    with with_fused_adapters(loaded):
        assert not any(isinstance(module, LoRALinear) for module in loaded.model.modules())
        np.testing.assert_allclose(np.array(loaded.model(ids)), before, atol=1e-4)
    np.testing.assert_array_equal(np.array(loaded.model(ids)), before)
    assert sorted(adapter_tensors(loaded)) == names
    plain = load_base(Origin(base))
    assert np.abs(np.array(plain.model(ids)) - before).max() > 0.01


def test_a_quantised_base_generates_with_its_adapters_beside_it(base: Path) -> None:
    loaded = load_base(Origin(base, bits=8))
    add_lora(loaded, LoraConfig(rank=4, alpha=8.0), seed=7)
    assert loaded.quantised
    with with_fused_adapters(loaded):
        assert any(isinstance(module, LoRALinear) for module in loaded.model.modules())
