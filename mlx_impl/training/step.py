"""One optimizer step of a reranker: its loss terms, summed over micro-batches and devices, then divided.

Every term is a numerator over a denominator that depends on the data alone, so a step accumulated from
micro-batches, or spread over devices, has the gradient of the whole batch. Terms between queries see the
queries of one micro-batch. Twin: jax_impl/training/step.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from common.config import RerankerConfig
from common.reranker.prepare import pairs_queries
from mlx_impl.losses.preservation import preservation_loss, state_preservation_loss
from mlx_impl.losses.quantum import (
    alignment_loss,
    entanglement_loss,
    resonance_loss,
    superposition_entropy,
    superposition_loss,
)
from mlx_impl.losses.ranking import (
    Pair,
    counted_candidates,
    lambda_loss,
    listnet,
    listwise_denominator,
    listwise_softmax,
    log_probabilities,
    margin_mse,
    plistmle,
    pointwise_bce,
    ranknet,
    soft_labels,
    total,
)
from mlx_impl.models.cross_encoder import CrossEncoder, PairOutput
from mlx_impl.models.dropout import fold_in, row_keys
from mlx_impl.training.distributed import World
from mlx_impl.training.optimizer import global_norm


class Batch(NamedTuple):
    """B lists of L candidates, S tokens (common.data.pipeline.ListBatch) as arrays of a backend."""

    input_ids: mx.array  # [B, L, S]
    sides: mx.array  # [B, L, S]
    labels: mx.array  # [B, L]
    mask: mx.array  # [B, L]
    related: mx.array  # [B, B]
    query_index: mx.array  # [B]
    query_vectors: mx.array  # [B, D]
    passage_vectors: mx.array  # [B, L, D]
    teacher: mx.array  # [B, L]
    original_scores: mx.array  # [B, L]
    original_query: mx.array  # [B, L, 2, C]
    original_passage: mx.array  # [B, L, 2, C]


class Moment(NamedTuple):
    """What the host tells a step: the settings of common.reranker.schedule.Phase, and `openness_at`."""

    temperature: mx.array | float
    entropy_bonus: mx.array | float
    ramp: mx.array | float
    openness: mx.array | float = 1.0


class TrainState(NamedTuple):
    """All that changes in training: the arrays in these two, which a step replaces in place."""

    model: CrossEncoder
    optimizer: optim.Optimizer

    @property
    def step(self) -> mx.array:
        """Optimizer steps so far, a whole number []."""
        return self.optimizer.state["states"][0]["step"]

    def arrays(self) -> list[Any]:
        """The tree of all arrays, whose containers stay the same ones."""
        return [self.model.state, self.optimizer.state]


RANK_LOSSES: dict[str, Callable[[mx.array, mx.array, mx.array], Pair]] = {
    "bce": pointwise_bce,
    "listwise": listwise_softmax,
    "ranknet": ranknet,
    "lambda": lambda_loss,
    "listnet": listnet,
    "plistmle": plistmle,
}
_Arrays = tuple[mx.array, ...]
Terms = dict[str, Pair]
Step = Callable[[Batch, Moment], dict[str, mx.array]]


def loss_terms(
    config: RerankerConfig, out: PairOutput, batch: Batch, moment: Moment
) -> tuple[Terms, dict[str, float | mx.array]]:
    """Every term of the recipe's loss as (numerator, denominator), and its weight; 0 is only logged."""
    lists = batch.labels.shape
    scores, portable = out.score.reshape(lists), out.portable.reshape(lists)  # [B, L]
    judged = (batch.labels, batch.mask)
    terms: Terms = {"rank": _rank_term(config, scores, batch, moment)}
    weights: dict[str, float | mx.array] = {"rank": 1.0}
    quantum = config.quantum
    if config.train.objective == "quantum" and quantum.mode == "resonance":
        r = out.resonance.reshape(lists)
        terms["resonance_relevant"], terms["resonance_other"] = resonance_loss(
            r, *judged, quantum.resonance_threshold, quantum.resonance_sharpness
        )
        weights |= dict.fromkeys(
            ("resonance_relevant", "resonance_other"), quantum.resonance_weight * moment.ramp
        )
    if pairs_queries(config):
        re, im = (x.reshape(*lists, -1) for x in out.query)  # [B, L, C]
        terms["entanglement_attract"], terms["entanglement_repel"] = entanglement_loss(
            re, im, *judged, batch.related, quantum.entanglement_margin, batch.query_index
        )
        weights |= dict.fromkeys(
            ("entanglement_attract", "entanglement_repel"), quantum.entanglement_weight * moment.ramp
        )
    if batch.query_vectors.shape[-1]:
        queries = mx.broadcast_to(batch.query_vectors[:, None], batch.passage_vectors.shape)  # [B, L, D]
        for name, state, target in (
            ("query", out.query, queries),
            ("passage", out.passage, batch.passage_vectors),
        ):
            re, im = (x.reshape(*lists, -1) for x in state)  # [B, L, C]
            terms[f"alignment_{name}"] = alignment_loss(re, im, target, mx.zeros_like(target), *judged)
            weights[f"alignment_{name}"] = quantum.alignment_weight * (1.0 - moment.ramp)
    if config.preserves:
        preserved_terms, preserved_weights = _preservation_terms(config, scores, out, batch)
        terms |= preserved_terms
        weights |= preserved_weights
    terms["portable"] = portable_distillation(scores, portable, *judged)
    terms["entropy"] = superposition_entropy(scores, *judged, moment.temperature)
    weights |= {"portable": quantum.portable_weight, "entropy": 0.0}
    return terms, weights


def _preservation_terms(
    config: RerankerConfig, scores: mx.array, out: PairOutput, batch: Batch
) -> tuple[Terms, dict[str, float | mx.array]]:
    """How far scores and states have moved from the frozen original's, over labelled and unlabelled lists."""
    retrain = config.retrain
    terms: Terms = {}
    if retrain.preserve_knowledge > 0:
        terms["preserve"] = preservation_loss(scores, batch.original_scores, batch.mask)
    if retrain.resonance_alignment > 0:
        known = batch.mask & mx.isfinite(batch.original_scores)
        for name, state, original in (
            ("query", out.query, batch.original_query),
            ("passage", out.passage, batch.original_passage),
        ):
            re, im = (x.reshape(*batch.mask.shape, -1) for x in state)  # [B, L, C]
            fixed = original[..., 0, :], original[..., 1, :]  # [B, L, C]
            terms[f"preserve_{name}"] = state_preservation_loss(re, im, *fixed, known)
    weights: dict[str, float | mx.array] = {"preserve": retrain.preserve_knowledge}
    weights |= dict.fromkeys(("preserve_query", "preserve_passage"), retrain.resonance_alignment)
    return terms, {name: weights[name] for name in terms}


def portable_distillation(scores: mx.array, portable: mx.array, labels: mx.array, mask: mx.array) -> Pair:
    """KL(softmax(s) || softmax(s_port)) up to the constant entropy of s, which gets no gradient; all [B, L].

    The constant is left out of the gradient, not of the value: the value is the KL, >= 0, 0 at equality.
    """
    teacher = mx.stop_gradient(log_probabilities(scores, mask))  # [B, L]
    student = log_probabilities(portable, mask)  # [B, L]
    divergence = mx.exp(teacher) * (teacher - student)  # [B, L]
    return total(divergence, counted_candidates(labels, mask)), listwise_denominator(labels, mask)


def make_step(
    config: RerankerConfig, state: TrainState, dropout_key: mx.array | None, world: World | None = None
) -> Step:
    """A compiled step: (batch, moment) -> mean of every term, loss and gradient norm; it changes `state`.

    Dropout depends on `dropout_key`, the step number and the global row. Each process of `world` is given the
    whole batch and encodes its share.
    """
    model, optimizer, world = state.model, state.optimizer, world or World()
    parts = config.train.micro_batches
    optimizer.init(model.trainable_parameters())  # `captured` must hold all there will be
    captured = state.arrays()

    def total_loss(
        batch: Batch, moment: Moment, keys: mx.array | None, scale: dict[str, Any]
    ) -> tuple[mx.array, Terms]:
        rows = batch.mask.size
        openness = moment.openness if config.train.separable_start else None
        own = world.share(rows)
        ids, sides = (x.reshape(rows, -1)[own] for x in (batch.input_ids, batch.sides))
        out = world.gathered(model(ids, sides, None if keys is None else keys[own], openness))
        terms, weights = loss_terms(config, out, batch, moment)
        loss = sum(weights[name] * terms[name][0] * scale[name] for name in terms)
        return loss, terms

    value_and_gradient = nn.value_and_grad(model, total_loss)

    @partial(mx.compile, inputs=model.state)
    def gradient(
        piece: _Arrays, moment: _Arrays, keys: mx.array | None, scale: dict[str, mx.array]
    ) -> tuple[mx.array, dict[str, mx.array], Any]:
        before = model.trainable_parameters()
        (loss, terms), gradients = value_and_gradient(Batch(*piece), Moment(*moment), keys, scale)
        model.update(before)  # else what the trace has put there would stay
        return loss, {name: pair[0] for name, pair in terms.items()}, gradients

    @partial(mx.compile, inputs=captured, outputs=captured)
    def update(gradients: Any) -> mx.array:
        optimizer.update(model, gradients)
        return global_norm(gradients)

    def step(batch: Batch, moment: Moment) -> dict[str, mx.array]:
        now = tuple(mx.array(value, mx.float32) for value in moment)  # a Python number would be compiled in
        keys = None
        if dropout_key is not None:
            rows = batch.mask.size
            keys = row_keys(fold_in(dropout_key, state.step), rows).reshape(parts, rows // parts, 2)
        micro = [split_batch(batch, part, parts) for part in range(parts)]
        scale = denominators(config, micro)
        found: Any = None
        for part, piece in enumerate(micro):
            result = gradient(tuple(piece), now, None if keys is None else keys[part], scale)
            found = result if found is None else tree_map(mx.add, found, result)
            mx.eval(found)  # one part's activations at a time
        loss, sums, gradients = found
        norm = update(world.summed(gradients))
        mx.eval(captured, norm)
        logged = {name: value * scale[name] for name, value in sums.items()}
        return logged | {"loss": loss, "gradient_norm": norm}

    return step


def split_batch(batch: Batch, part: int, parts: int) -> Batch:
    """Micro-batch `part` of `parts`: neighbouring lists, so that related queries stay together."""
    size = batch.mask.shape[0] // parts
    rows = slice(part * size, (part + 1) * size)
    cut = Batch(*(x[rows] for x in batch))
    return cut._replace(related=batch.related[rows, rows])


def denominators(config: RerankerConfig, micro: list[Batch]) -> dict[str, mx.array]:
    """1 / (denominator of each term over the whole batch, at least 1)."""
    totals: dict[str, mx.array] = {}
    for batch in micro:
        nothing = mx.zeros(batch.mask.size)
        width = max(1, batch.query_vectors.shape[-1], batch.original_query.shape[-1])
        state = (mx.zeros((batch.mask.size, width)),) * 2
        out = PairOutput(nothing, nothing, nothing, state, state)
        terms, _ = loss_terms(config, out, batch, Moment(1.0, 0.0, 0.0))
        totals = {name: totals.get(name, 0.0) + pair[1] for name, pair in terms.items()}
    return {name: 1.0 / mx.maximum(1.0, number) for name, number in totals.items()}


def _rank_term(config: RerankerConfig, scores: mx.array, batch: Batch, moment: Moment) -> Pair:
    objective, judged = config.train.objective, (batch.labels, batch.mask)
    if objective == "quantum":
        return superposition_loss(scores, *judged, moment.temperature, moment.entropy_bonus)
    if objective == "margin_mse":
        return margin_mse(scores, *judged, batch.teacher)
    if objective == "soft_labels":
        return soft_labels(scores, batch.mask, batch.teacher, config.train.teacher_temperature)
    return RANK_LOSSES[objective](scores, *judged)
