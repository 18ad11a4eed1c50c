"""One optimizer step: the same result however its batch is cut up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from common.config import ModelConfig, RerankerConfig, RetrainConfig
from common.reference.cases import random_states
from jax_impl.loading import load_cross_encoder
from jax_impl.losses.quantum import entanglement_loss
from jax_impl.models.cross_encoder import CrossEncoder
from jax_impl.training.step import (
    Batch,
    Moment,
    TrainState,
    make_step,
    portable_distillation,
    split_batch,
)
from tests.tiny import VOCABULARY, World

B, L, S = 4, 3, 12
MOMENT = Moment(1.5, 0.05, 0.5)
KINDS = {
    "bce": {"objective": "bce"},
    "listwise": {"objective": "listwise"},
    "ranknet": {"objective": "ranknet"},
    "lambda": {"objective": "lambda"},
    "plistmle": {"objective": "plistmle"},
    "margin_mse": {"objective": "margin_mse"},
    "soft_labels": {"objective": "soft_labels"},
    "superposition": {"mode": "superposition"},
    "resonance": {"mode": "resonance", "entanglement_weight": 0.0},
    "entanglement": {"mode": "entanglement"},
    "adaptation": {"mode": "adaptation", "preserve_knowledge": 0.3, "resonance_alignment": 0.2},
}


def recipe(world: World, kind: str, parts: int = 1) -> RerankerConfig:
    settings = dict(KINDS[kind])
    config = world.config(batch_size=B, micro_batches=parts, objective=settings.pop("objective", "quantum"))
    weights = {
        name: settings.pop(name) for name in ("preserve_knowledge", "resonance_alignment") if name in settings
    }
    config = replace(config, retrain=replace(config.retrain, **weights))
    return replace(config, quantum=replace(config.quantum, **settings))


def random_batch(seed: int) -> Batch:
    """Lists of uneven lengths and sizes; the second has no positive, the third is of the first's query."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, S + 1, (B, L, 1))
    position = np.arange(S)
    sides = np.where(position < lengths, np.where(position < 3, 1, 2), 0)
    ids = np.where(sides > 0, rng.integers(5, len(VOCABULARY), (B, L, S)), 0)
    mask = np.asarray([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1]], bool)
    labels = np.asarray([[1, 0, 0], [0, 0, 0], [2, 0, 0], [1, 1, 0]], np.float32)
    related = np.zeros((B, B), np.float32)
    related[0, 1] = related[0, 3] = related[2, 3] = 0.8
    return Batch(
        jnp.asarray(ids),
        jnp.asarray(sides),
        jnp.asarray(labels),
        jnp.asarray(mask),
        jnp.asarray(related + related.T),
        jnp.asarray([0, 1, 0, 3]),
        jnp.asarray(rng.normal(size=(B, 32)), jnp.float32),
        jnp.asarray(rng.normal(size=(B, L, 32)), jnp.float32),
        jnp.asarray(np.where(rng.random((B, L)) < 0.8, rng.normal(size=(B, L)), np.nan), jnp.float32),
        jnp.asarray(np.where(mask, rng.normal(size=(B, L)), np.nan), jnp.float32),
        *(jnp.asarray(unit_states(rng), jnp.float32) for _ in range(2)),
    )


def unit_states(rng: np.random.Generator) -> np.ndarray:
    """The original's states, [B, L, 2, C]."""
    return np.stack(random_states(rng, B, L, 32), axis=2)


def load(world: World, rate: float = 0.0) -> CrossEncoder:
    """With a reading of [CLS] too, so that every term moves every part."""
    model = load_cross_encoder(world.base, ModelConfig(), dropout=(rate, rate)).model
    model.resonance.u[...] = 0.3 * jax.random.normal(jax.random.key(1), (32,))
    return model


def one_step(
    config: RerankerConfig,
    model: CrossEncoder,
    batch: Batch,
    key: jax.Array | None = None,
    moment: Moment = MOMENT,
) -> tuple[Any, dict[str, float]]:
    """Parameters after a step of plain gradient descent, and what was logged."""
    graphdef, learned, fixed = nnx.split(model, nnx.Param, ...)
    learned, fixed = jax.tree.map(jnp.copy, (learned, fixed))  # the step donates its state
    optimizer = optax.sgd(0.1)
    state = TrainState(learned, fixed, optimizer.init(learned), jnp.zeros((), jnp.int32))
    after, logged = make_step(config, graphdef, optimizer, key)(state, batch, moment)
    assert int(after.step) == 1
    return after.learned, {name: float(value) for name, value in logged.items()}


def assert_same(a: tuple[Any, dict[str, float]], b: tuple[Any, dict[str, float]]) -> None:
    assert a[1] == pytest.approx(b[1], abs=1e-4, rel=1e-4)
    for left, right in zip(jax.tree.leaves(a[0]), jax.tree.leaves(b[0]), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "entanglement"])
def test_a_step_of_micro_batches_is_the_step_of_the_whole_batch(world: World, kind: str, seed: int) -> None:
    model, batch = load(world), random_batch(seed)
    whole, parts = (one_step(recipe(world, kind, parts), model, batch) for parts in (1, 2))
    assert_same(whole, parts)
    before = jax.tree.leaves(nnx.state(model, nnx.Param))
    moved = [float(jnp.abs(a - b).max()) for a, b in zip(before, jax.tree.leaves(whole[0]), strict=True)]
    assert sum(change > 1e-4 for change in moved) > len(moved) / 2
    assert whole[1]["loss"] > 0 and np.isfinite(list(whole[1].values())).all()


def test_dropout_too_is_the_same_in_micro_batches(world: World, seed: int) -> None:
    model, batch, key = load(world, rate=0.3), random_batch(seed), jax.random.key(seed)
    whole, parts = (one_step(recipe(world, "listwise", parts), model, batch, key) for parts in (1, 2))
    assert_same(whole, parts)
    assert abs(whole[1]["rank"] - one_step(recipe(world, "listwise"), model, batch)[1]["rank"]) > 1e-4


def test_micro_batches_lower_the_memory_of_a_step(world: World, seed: int) -> None:
    batch, times = random_batch(seed), 16
    many = Batch(*(jnp.tile(x, (times, *[1] * (x.ndim - 1))) for x in batch))
    many = many._replace(related=jnp.tile(batch.related, (times, times)))
    graphdef, learned, fixed = nnx.split(load(world), nnx.Param, ...)
    state = TrainState(learned, fixed, optax.sgd(0.1).init(learned), jnp.zeros((), jnp.int32))
    needed = []
    for parts in (1, times):
        config = world.config(batch_size=times * B, micro_batches=parts)
        step: Any = make_step(config, graphdef, optax.sgd(0.1), None)
        needed.append(step.lower(state, many, MOMENT).compile().memory_analysis().temp_size_in_bytes)
    assert needed[1] < needed[0] / 4


def test_terms_between_queries_see_the_queries_of_one_micro_batch(world: World, seed: int) -> None:
    """Summed over micro-batches, divided by the pairs that micro-batches hold: related 2-3 here, not 0-3."""
    model, batch = load(world), random_batch(seed)
    config = recipe(world, "entanglement", 2)
    config = replace(config, quantum=replace(config.quantum, entanglement_margin=-1.0))
    _, logged = one_step(config, model, batch)
    attract, repel = np.zeros(2), np.zeros(2)
    for part in range(2):
        piece = split_batch(batch, part, 2)
        out = model(piece.input_ids.reshape(-1, S), piece.sides.reshape(-1, S))
        re, im = (x.reshape(2, L, -1) for x in out.query)
        pairs = entanglement_loss(re, im, piece.labels, piece.mask, piece.related, -1.0, piece.query_index)
        attract, repel = attract + np.asarray(pairs[0]), repel + np.asarray(pairs[1])
    assert attract[1] == 1 and repel[1] == 0  # the list without a positive forms no pair
    assert logged["entanglement_attract"] == pytest.approx(attract[0], abs=1e-5)
    assert logged["entanglement_repel"] == 0
    whole = one_step(replace(config, train=replace(config.train, micro_batches=1)), model, batch)[1]
    assert abs(whole["entanglement_attract"] - logged["entanglement_attract"]) > 1e-5


def test_the_loss_is_the_weighted_sum_of_its_terms(world: World, seed: int) -> None:
    config = recipe(world, "resonance")
    config = replace(config, quantum=replace(config.quantum, entanglement_weight=0.2, alignment_weight=2.0))
    _, logged = one_step(config, load(world), random_batch(seed))
    resonance = logged["resonance_relevant"] + logged["resonance_other"]
    entanglement = logged["entanglement_attract"] + logged["entanglement_repel"]
    alignment = logged["alignment_query"] + logged["alignment_passage"]
    expected = logged["rank"] + logged["portable"] + MOMENT.ramp * (0.3 * resonance + 0.2 * entanglement)
    expected += (1.0 - MOMENT.ramp) * 2.0 * alignment
    assert logged["loss"] == pytest.approx(expected, rel=1e-5)


def test_preservation_is_weighted_alike_in_every_phase_and_mode(world: World, seed: int) -> None:
    for mode, ramp in (("adaptation", 0.0), ("resonance", 1.0)):
        config = recipe(world, "adaptation")
        config = replace(config, quantum=replace(config.quantum, mode=mode, alignment_weight=0.0))
        batch, moment = random_batch(seed), MOMENT._replace(ramp=ramp)
        _, logged = one_step(config, load(world), batch, moment=moment)
        without = replace(config, retrain=RetrainConfig())
        _, plain = one_step(without, load(world), batch, moment=moment)
        states = logged["preserve_query"] + logged["preserve_passage"]
        expected = plain["loss"] + 0.3 * logged["preserve"] + 0.2 * states
        assert logged["loss"] == pytest.approx(expected, rel=1e-5) and logged["preserve"] > 0
        assert not any(name.startswith("preserve") for name in plain)


def test_unlabelled_lists_move_nothing_but_what_they_preserve(world: World, seed: int) -> None:
    """Of a batch without labels only the preservation terms count, and they alone move the parameters."""
    config = recipe(world, "adaptation")
    config = replace(config, quantum=replace(config.quantum, alignment_weight=0.0))
    batch = random_batch(seed)._replace(labels=jnp.zeros((B, L)))
    _, logged = one_step(config, load(world), batch)
    terms = {name: value for name, value in logged.items() if name not in ("loss", "gradient_norm")}
    assert {name for name, value in terms.items() if value != 0} == {
        "preserve",
        "preserve_query",
        "preserve_passage",
    }
    assert logged["gradient_norm"] > 0


def test_a_model_that_is_still_the_original_has_nothing_to_preserve(world: World, seed: int) -> None:
    model, batch = load(world), random_batch(seed)
    out = model(batch.input_ids.reshape(-1, S), batch.sides.reshape(-1, S))
    batch = batch._replace(
        original_scores=out.score.reshape(B, L),
        original_query=jnp.stack(out.query, axis=1).reshape(B, L, 2, -1),
        original_passage=jnp.stack(out.passage, axis=1).reshape(B, L, 2, -1),
    )
    _, logged = one_step(recipe(world, "adaptation"), model, batch)
    for name in ("preserve", "preserve_query", "preserve_passage"):
        assert logged[name] == pytest.approx(0.0, abs=1e-5)


def test_distillation_teaches_the_portable_score_and_leaves_the_full_one_alone(seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch = random_batch(seed)
    scores, portable = (jnp.asarray(rng.normal(size=(B, L)), jnp.float32) for _ in range(2))
    judged = (batch.labels, batch.mask)
    value, count = portable_distillation(scores, portable, *judged)
    assert value > 0 and count == 3
    assert portable_distillation(scores, scores + 7.0, *judged)[0] == pytest.approx(0, abs=1e-5)
    full, student = jax.grad(lambda s, p: portable_distillation(s, p, *judged)[0], (0, 1))(scores, portable)
    assert (full == 0).all() and float(jnp.abs(student).max()) > 1e-3
    assert (student[1] == 0).all() and student[2, 2] == 0  # no positive; padding
