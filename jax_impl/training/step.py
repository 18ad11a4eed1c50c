"""One optimizer step of a reranker: its loss terms, summed over micro-batches and devices, then divided.

Every term is a numerator over a denominator that depends on the data alone, so a step accumulated from
micro-batches, or spread over devices, has the gradient of the whole batch. Terms between queries see the
queries of one micro-batch, on all devices. Twin: mlx_impl/training/step.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from common.config import RerankerConfig
from common.reranker.prepare import pairs_queries
from jax_impl.losses.preservation import preservation_loss, state_preservation_loss
from jax_impl.losses.quantum import (
    alignment_loss,
    entanglement_loss,
    resonance_loss,
    superposition_entropy,
    superposition_loss,
)
from jax_impl.losses.ranking import (
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
from jax_impl.models.cross_encoder import CrossEncoder, PairOutput
from jax_impl.models.dropout import row_keys
from jax_impl.training.parallel import Devices, gathered, once, summed


class Batch(NamedTuple):
    """B lists of L candidates, S tokens (common.data.pipeline.ListBatch) as arrays of a backend."""

    input_ids: jax.Array  # [B, L, S]
    sides: jax.Array  # [B, L, S]
    labels: jax.Array  # [B, L]
    mask: jax.Array  # [B, L]
    related: jax.Array  # [B, B]
    query_index: jax.Array  # [B]
    query_vectors: jax.Array  # [B, D]
    passage_vectors: jax.Array  # [B, L, D]
    teacher: jax.Array  # [B, L]
    original_scores: jax.Array  # [B, L]
    original_query: jax.Array  # [B, L, 2, C]
    original_passage: jax.Array  # [B, L, 2, C]


class Moment(NamedTuple):
    """What the host tells a step: the settings of common.reranker.schedule.Phase, and `openness_at`."""

    temperature: jax.Array | float
    entropy_bonus: jax.Array | float
    ramp: jax.Array | float
    openness: jax.Array | float = 1.0


class TrainState(NamedTuple):
    """All that changes in training. `fixed` are parameters that do not learn."""

    learned: Any
    fixed: Any
    optimizer: Any
    step: jax.Array


RANK_LOSSES: dict[str, Callable[[jax.Array, jax.Array, jax.Array], Pair]] = {
    "bce": pointwise_bce,
    "listwise": listwise_softmax,
    "ranknet": ranknet,
    "lambda": lambda_loss,
    "listnet": listnet,
    "plistmle": plistmle,
}
Terms = dict[str, Pair]
Step = Callable[[TrainState, Batch, Moment], tuple[TrainState, dict[str, jax.Array]]]


def loss_terms(
    config: RerankerConfig, out: PairOutput, batch: Batch, moment: Moment, axis: str | None = None
) -> tuple[Terms, dict[str, float | jax.Array]]:
    """Every term of the recipe's loss as (numerator, denominator), and its weight; 0 is only logged.

    With `axis`, of a pmap, the batch is one device's rows and a term is to be summed over it.
    """
    lists = batch.labels.shape
    scores, portable = out.score.reshape(lists), out.portable.reshape(lists)  # [B, L]
    judged = (batch.labels, batch.mask)
    terms: Terms = {"rank": _rank_term(config, scores, batch, moment)}
    weights: dict[str, float | jax.Array] = {"rank": 1.0}
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
        everyone = gathered((re, im, *judged, batch.related, batch.query_index), axis)
        re, im, labels, mask, related, index = everyone
        pairs = entanglement_loss(re, im, labels, mask, related, quantum.entanglement_margin, index)
        terms["entanglement_attract"], terms["entanglement_repel"] = once(pairs, axis)
        weights |= dict.fromkeys(
            ("entanglement_attract", "entanglement_repel"), quantum.entanglement_weight * moment.ramp
        )
    if batch.query_vectors.shape[-1]:
        queries = jnp.broadcast_to(batch.query_vectors[:, None], batch.passage_vectors.shape)  # [B, L, D]
        for name, state, target in (
            ("query", out.query, queries),
            ("passage", out.passage, batch.passage_vectors),
        ):
            re, im = (x.reshape(*lists, -1) for x in state)  # [B, L, C]
            terms[f"alignment_{name}"] = alignment_loss(re, im, target, jnp.zeros_like(target), *judged)
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
    config: RerankerConfig, scores: jax.Array, out: PairOutput, batch: Batch
) -> tuple[Terms, dict[str, float | jax.Array]]:
    """How far scores and states have moved from the frozen original's, over labelled and unlabelled lists."""
    retrain = config.retrain
    terms: Terms = {}
    if retrain.preserve_knowledge > 0:
        terms["preserve"] = preservation_loss(scores, batch.original_scores, batch.mask)
    if retrain.resonance_alignment > 0:
        known = batch.mask & jnp.isfinite(batch.original_scores)
        for name, state, original in (
            ("query", out.query, batch.original_query),
            ("passage", out.passage, batch.original_passage),
        ):
            re, im = (x.reshape(*batch.mask.shape, -1) for x in state)  # [B, L, C]
            fixed = original[..., 0, :], original[..., 1, :]  # [B, L, C]
            terms[f"preserve_{name}"] = state_preservation_loss(re, im, *fixed, known)
    weights = {"preserve": retrain.preserve_knowledge}
    weights |= dict.fromkeys(("preserve_query", "preserve_passage"), retrain.resonance_alignment)
    return terms, {name: weights[name] for name in terms}


def portable_distillation(scores: jax.Array, portable: jax.Array, labels: jax.Array, mask: jax.Array) -> Pair:
    """KL(softmax(s) || softmax(s_port)) up to the constant entropy of s, which gets no gradient; all [B, L].

    The constant is left out of the gradient, not of the value: the value is the KL, >= 0, 0 at equality.
    """
    teacher = jax.lax.stop_gradient(log_probabilities(scores, mask))  # [B, L]
    student = log_probabilities(portable, mask)  # [B, L]
    divergence = jnp.exp(teacher) * (teacher - student)  # [B, L]
    return total(divergence, counted_candidates(labels, mask)), listwise_denominator(labels, mask)


def make_step(
    config: RerankerConfig,
    graphdef: nnx.GraphDef[CrossEncoder],
    optimizer: optax.GradientTransformation,
    dropout_key: jax.Array | None,
    devices: Devices | None = None,
) -> Step:
    """A compiled step: (state, batch, moment) -> (state, mean of every term, loss and gradient norm).

    The old state is donated. Dropout depends on `dropout_key`, the step number and the global row. The batch
    stands in the order of `Devices.share`; without `devices` it is whole, on one.
    """
    parts = config.train.micro_batches
    lists = config.lists_per_step // parts  # of a micro-batch, without the empty ones that fill devices up
    axis, count = (None, 1) if devices is None else (devices.axis, devices.count)

    def total_loss(
        learned: Any, fixed: Any, batch: Batch, moment: Moment, keys: jax.Array | None, scale: dict[str, Any]
    ) -> tuple[jax.Array, Terms]:
        model = nnx.merge(graphdef, learned, fixed)
        rows = batch.mask.size
        openness = moment.openness if config.train.separable_start else None
        out = model(batch.input_ids.reshape(rows, -1), batch.sides.reshape(rows, -1), keys, openness)
        terms, weights = loss_terms(config, out, batch, moment, axis)
        loss = sum(weights[name] * terms[name][0] * scale[name] for name in terms)
        return jnp.asarray(loss), terms

    gradient = jax.value_and_grad(total_loss, has_aux=True)

    def step(state: TrainState, batch: Batch, moment: Moment) -> tuple[TrainState, dict[str, jax.Array]]:
        micro = [split_batch(batch, part, parts, count) for part in range(parts)]
        scale = denominators(config, micro, axis)

        def of_part(part: jax.Array | int, piece: Batch) -> tuple[jax.Array, dict[str, jax.Array], Any]:
            keys = None
            if dropout_key is not None:
                rows, width = piece.mask.size, piece.mask.shape[1]
                before = 0 if axis is None else jax.lax.axis_index(axis) * rows
                key = jax.random.fold_in(dropout_key, state.step)
                keys = row_keys(key, rows, part * lists * width + before)
            (value, terms), grads = gradient(state.learned, state.fixed, piece, moment, keys, scale)
            return value, {name: pair[0] for name, pair in terms.items()}, grads

        if parts == 1:
            found = of_part(0, micro[0])
        else:  # a scan: of an unrolled loop XLA keeps the activations of all parts at once
            nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(of_part, 0, micro[0]))
            stacked = jax.tree.map(lambda *rows: jnp.stack(rows), *micro)
            found, _ = jax.lax.scan(
                lambda so_far, x: (jax.tree.map(jnp.add, so_far, of_part(*x)), None),
                nothing,
                (jnp.arange(parts), stacked),
            )
        loss, sums, gradients = summed(found, axis)
        updates, opt_state = optimizer.update(gradients, state.optimizer, state.learned)
        learned = optax.apply_updates(state.learned, updates)
        logged = {name: value * scale[name] for name, value in sums.items()}
        logged |= {"loss": loss, "gradient_norm": optax.tree.norm(gradients)}
        return TrainState(learned, state.fixed, opt_state, state.step + 1), logged

    return jax.jit(step, donate_argnums=0) if devices is None else devices.compile(step)


def split_batch(batch: Batch, part: int, parts: int, devices: int = 1) -> Batch:
    """Micro-batch `part` of `parts`: neighbouring lists, so that related queries stay together.

    Of a batch over `devices` its rows stand as [devices, parts, rows]; in a pmap they are one device's.
    """
    rows, everyone = batch.related.shape
    here = devices * rows // everyone  # devices whose rows these are
    cut = Batch(*(_part(x, part, parts, here) for x in batch))
    return cut._replace(related=_part(cut.related.T, part, parts, devices).T)


def _part(x: jax.Array, part: int, parts: int, devices: int) -> jax.Array:
    """Those of the rows [devices * parts * R, ...] that belong to a part, [devices * R, ...]."""
    size, rest = len(x) // (devices * parts), x.shape[1:]
    return x.reshape(devices, parts, size, *rest)[:, part].reshape(devices * size, *rest)


def denominators(config: RerankerConfig, micro: list[Batch], axis: str | None = None) -> dict[str, jax.Array]:
    """1 / (denominator of each term over the whole batch, at least 1)."""
    totals: dict[str, jax.Array] = {}
    for batch in micro:
        nothing = jnp.zeros(batch.mask.size)
        width = max(1, batch.query_vectors.shape[-1], batch.original_query.shape[-1])
        state = (jnp.zeros((batch.mask.size, width)),) * 2
        out = PairOutput(nothing, nothing, nothing, state, state)
        terms, _ = loss_terms(config, out, batch, Moment(1.0, 0.0, 0.0), axis)
        totals = {name: totals.get(name, 0.0) + pair[1] for name, pair in terms.items()}
    totals = summed(totals, axis)
    return {name: 1.0 / jnp.maximum(1.0, number) for name, number in totals.items()}


def _rank_term(config: RerankerConfig, scores: jax.Array, batch: Batch, moment: Moment) -> Pair:
    objective, judged = config.train.objective, (batch.labels, batch.mask)
    if objective == "quantum":
        return superposition_loss(scores, *judged, moment.temperature, moment.entropy_bonus)
    if objective == "margin_mse":
        return margin_mse(scores, *judged, batch.teacher)
    if objective == "soft_labels":
        return soft_labels(scores, batch.mask, batch.teacher, config.train.teacher_temperature)
    return RANK_LOSSES[objective](scores, *judged)
