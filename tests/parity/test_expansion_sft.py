"""SFT of the query expansion: the shared loop in JAX and MLX, and mlx-lm's Qwen3 in mlx_impl/training/sft.py.

The same rows, prompts, order of batches, adapters and optimizer: the same losses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="needs MLX and mlx-lm: install the extra `mlx`")

import jax
import mlx.core as mx
from flax import nnx

from common.expansion.sft import prepare_expansion
from jax_impl.training.language import LanguageTrainer as JaxTrainer
from mlx_impl.expansion import expansion_prompts
from mlx_impl.models.qwen import Origin, add_lora, load_base
from mlx_impl.training.language import LanguageTrainer as MlxTrainer
from mlx_impl.training.sft import SftTrainer
from tests.parity.backends import MODEL_TOLERANCE, check
from tests.tiny_expansion import expansion_recipe, sft_config, write_expander, write_rows

STEPS = 6  # five are an epoch: each row is asked in both forms


def silent(_: str) -> None:
    """Say nothing."""


def of_the_loop(trainer: Any) -> list[float]:
    batches = trainer.plan.loader(trainer.steps)
    return [float(trainer._one_step(step, next(batches))["loss"]) for step in range(1, STEPS + 1)]


def adapters(trainer: JaxTrainer) -> dict[str, np.ndarray]:
    """What learns at the start, by path: mlx-lm names and shapes adapters alike."""
    flat = nnx.to_flat_state(trainer.state.learned)
    return {".".join(map(str, path)): np.asarray(jax.device_get(value[...])) for path, value in flat}


def test_the_first_losses_are_those_of_the_mlx_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESONANCE_CACHE", str(tmp_path / "cache"))
    rows = write_rows(tmp_path / "rows")
    base = write_expander(tmp_path / "base", rows)
    recipe, prepared = prepare_expansion(expansion_recipe(rows, base).validate(), say=silent)
    ours = JaxTrainer(recipe, prepared, say=silent)
    start = adapters(ours)
    assert len(start) == 14 and all(".lora_" in name for name in start)

    twin = MlxTrainer(recipe, prepared, say=silent)
    twin.model.load_weights([(name, mx.array(value)) for name, value in start.items()], strict=False)

    settings: dict[str, Any] = {"gradient_accumulation_steps": 1, "seed": recipe.train.seed}
    config = sft_config(
        rows, base, tmp_path / "run", system="mixed", plain=True, **settings, warmup_ratio=0.03
    )
    loaded = load_base(Origin(base))
    add_lora(loaded, config.lora, seed=0)
    loaded.model.load_weights([(name, mx.array(value)) for name, value in start.items()], strict=False)
    theirs = SftTrainer(config, loaded, expansion_prompts(config, loaded), prepared.data, say=silent)
    assert theirs.steps == ours.steps == 10

    losses = of_the_loop(ours)
    assert losses[-1] < losses[0] - 0.5
    check("expansion SFT, six losses", "jax with mlx", losses, of_the_loop(twin), MODEL_TOLERANCE)
    expected = [theirs.train_step(step)["loss"] for step in range(1, STEPS + 1)]
    check("expansion SFT, six losses", "jax with mlx-lm", losses, expected, MODEL_TOLERANCE)
