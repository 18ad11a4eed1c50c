"""Every family of encoders: both backends against transformers and against each other.

Random tiny configurations, weights and inputs; every output, and the gradient of a random sum of all outputs
by every parameter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import ModelConfig
from common.keymap import FAMILIES
from tests.families import random_pairs, random_settings, write_checkpoint
from tests.parity.backends import Backend
from tests.parity.test_models import (
    Results,
    Twins,
    compare,
    cross_encoders,
    dropout_keys,
    pair_outputs,
    randomise,
    torch_results,
)

torch = pytest.importorskip("torch", reason="the oracle needs torch: install the extra `peers`")
transformers = pytest.importorskip("transformers")

every_family = pytest.mark.parametrize("family", list(FAMILIES))


def draw(family: str, seed: int, directory: Path) -> tuple[Any, np.ndarray, np.ndarray]:
    """Transformers' classifier of a random checkpoint in `directory`, in float64, with ids and sides [N, S].

    Padding holds the padding token and nothing else does: transformers keeps its gradient at 0.
    """
    rng = np.random.default_rng(seed)
    settings = random_settings(family, rng)
    print(settings)
    write_checkpoint(directory, family, seed=seed, **settings)
    oracle = transformers.AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float64)
    pad = oracle.config.pad_token_id
    ids, sides = random_pairs(family, oracle.config, rng)
    return oracle.eval(), np.where((sides > 0) & (ids == pad), pad + 1, ids).astype(np.int32), sides


def outputs(model: Any, ids: Any, sides: Any, keep: Any, segments: Any) -> list[Any]:
    """Hidden states, at padding 0, and portable scores."""
    return [model.encoder(ids, sides > 0, segments) * keep, model(ids, sides).portable]


def oracle_results(oracle: Any, ids: np.ndarray, sides: np.ndarray, seed: int) -> Results:
    """The same of transformers, with 0 where a parameter has no gradient."""
    inputs = {"input_ids": torch.tensor(ids).long(), "attention_mask": torch.tensor(sides > 0).long()}
    if has_segments(oracle.config):
        inputs["token_type_ids"] = torch.tensor(sides == 2).long()
    for parameter in oracle.parameters():  # sinusoidal positions have none
        parameter.requires_grad_(True)
    hidden = oracle.base_model(**inputs)[0] * torch.tensor(sides > 0)[..., None]
    values, gradients = torch_results(oracle, [hidden, oracle(**inputs).logits[:, 0]], seed)
    zeros = {name: np.zeros(value.shape) for name, value in oracle.named_parameters()}
    return values, zeros | gradients


def has_segments(config: Any) -> bool:
    return getattr(config, "type_vocab_size", 0) > 1


def without_head(results: Results) -> Results:
    return results[0], {key: x for key, x in results[1].items() if not key.startswith("resonance.")}


@every_family
@pytest.mark.parametrize("case", range(2))
def test_random_configurations_agree_with_their_twin_and_with_transformers(
    twins: Twins, family: str, case: int, seed: int, tmp_path: Path
) -> None:
    seed = (seed + case) % 2**32
    oracle, ids, sides = draw(family, seed, tmp_path / "base")
    segment = int(has_segments(oracle.config))
    models = cross_encoders(twins, tmp_path / "base", passage_segment=segment)
    keep = (sides > 0)[..., None].astype(np.float32)
    inputs = ids, sides, keep, segment * (sides == 2).astype(np.int32)
    results = [
        without_head(backend.results(model, outputs, seed, *inputs))
        for backend, model in zip(twins, models, strict=True)
    ]
    theirs = oracle_results(oracle, ids, sides, seed)
    for backend, ours in zip(twins, results, strict=True):
        compare(family, f"{backend.name} with transformers", ours, theirs)
    compare(family, "jax with mlx", *results)


@every_family
def test_the_cross_encoder_agrees_with_its_twin_under_dropout(
    twins: Twins, family: str, seed: int, tmp_path: Path
) -> None:
    _, ids, sides = draw(family, seed, tmp_path / "base")
    sides[0] = 0  # a row of padding alone
    models = cross_encoders(twins, tmp_path / "base", complex_width=4, dropout=(0.2, 0.3))
    randomise(twins, models, seed)
    keys = dropout_keys(twins, seed, len(ids))

    def of(backend: Backend) -> Any:
        return lambda *x: pair_outputs(backend, *x, keys=keys)

    results = [b.results(m, of(b), seed, ids, sides) for b, m in zip(twins, models, strict=True)]
    compare(f"{family}, under dropout", "jax with mlx", *results)


@every_family
def test_the_bi_encoder_agrees_with_its_twin(twins: Twins, family: str, seed: int, tmp_path: Path) -> None:
    _, ids, sides = draw(family, seed, tmp_path / "base")
    models = [b.module("loading").load_bi_encoder(tmp_path / "base") for b in twins]
    results = [
        b.results(m, lambda m, *x: [m(*x)], seed, ids, sides > 0) for b, m in zip(twins, models, strict=True)
    ]
    compare(f"{family}, bi-encoder", "jax with mlx", *results)


@every_family
def test_adapters_of_all_linear_layers_agree_with_their_twin(
    twins: Twins, family: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "base", family, "Model")
    models = [b.module("loading").load_cross_encoder(tmp_path / "base", ModelConfig()).model for b in twins]
    found = [
        b.module("models.lora").add_lora(m.encoder, 2, 4.0, (), rngs=b.rngs(0))
        for b, m in zip(twins, models, strict=True)
    ]
    assert sorted(found[0]) == sorted(found[1]) and len(found[0]) >= 4
    shapes = [
        {key: value.shape for key, value in b.parameters(m).items()}
        for b, m in zip(twins, models, strict=True)
    ]
    assert shapes[0] == shapes[1]
