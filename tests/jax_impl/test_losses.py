"""What every loss promises: padding and order do not matter, edges are finite, sums divide correctly."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.reference.cases import ListCase, parity_error, random_lists
from jax_impl.losses import preservation, quantum, ranking
from jax_impl.models.projector import normalise

# name -> (loss of (values, labels, mask), its denominators, which field of a case holds the values)
LIST_LOSSES: dict[str, tuple[Callable, Callable, str]] = {
    "pointwise": (ranking.pointwise_bce, ranking.pointwise_denominator, "scores"),
    "listwise": (ranking.listwise_softmax, ranking.listwise_denominator, "scores"),
    "superposition": (
        lambda s, y, m: quantum.superposition_loss(s, y, m, 2.0, 0.1),
        quantum.superposition_denominator,
        "scores",
    ),
    "entropy": (
        lambda s, y, m: quantum.superposition_entropy(s, y, m, 2.0),
        quantum.superposition_denominator,
        "scores",
    ),
    "resonance": (
        lambda r, y, m: quantum.resonance_loss(r, y, m, 0.7, 10.0),
        quantum.resonance_denominator,
        "resonance",
    ),
}


def test_what_is_preserved_are_differences_within_a_list_and_states(seed: int) -> None:
    """A constant a list costs nothing, padding and lists of one candidate neither; the gradient is finite."""
    case = random_lists(seed)
    mask = jnp.asarray(case.mask)
    scores = jnp.where(mask, jnp.asarray(case.scores, jnp.float32), 0.0)
    shift = jnp.asarray(np.random.default_rng(seed).normal(0, 5, (len(scores), 1)), jnp.float32)
    original = jnp.where(mask, scores + shift, jnp.nan)
    value, lists = preservation.preservation_loss(scores, original, mask)
    assert float(value) == pytest.approx(0.0, abs=1e-3) and lists == int((case.mask.sum(axis=1) > 1).sum())
    gradient = jax.grad(lambda s: preservation.preservation_loss(s, -original, mask)[0])(scores)
    assert jnp.isfinite(gradient).all() and not gradient[~mask].any() and not gradient[2].any()
    nowhere = jnp.full(scores.shape, jnp.nan)
    assert preservation.preservation_loss(scores, nowhere, mask) == (0.0, 0.0)
    states = normalise(jnp.asarray(case.query_re), jnp.asarray(case.query_im))
    turned = (-states[0], -states[1])
    for other, cost in ((states, 0.0), (turned, 2.0)):
        total_cost, count = preservation.state_preservation_loss(*states, *other, mask)
        assert count == case.mask.sum() and float(total_cost) == pytest.approx(cost * float(count), abs=1e-3)


every_list_loss = pytest.mark.parametrize("name", LIST_LOSSES)


def numbers(result: object) -> np.ndarray:
    return np.array(jax.tree.leaves(result), np.float64)


def total(loss: Callable, *arrays: jax.Array) -> jax.Array:
    """Every numerator of a loss, added."""
    result = loss(*arrays)
    pairs = result if isinstance(result[0], tuple) else (result,)
    return sum(pair[0] for pair in pairs)


def entangled(case: ListCase, margin: float = 0.2) -> tuple:
    arrays = (case.query_re, case.query_im, case.labels, case.mask, case.related, margin, case.query_index)
    return jax.jit(quantum.entanglement_loss)(*map(jnp.asarray, arrays))


def arrays_of(case: ListCase, field: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    values = jnp.asarray(getattr(case, field), jnp.float32)
    return values, jnp.asarray(case.labels, jnp.float32), jnp.asarray(case.mask)


@every_list_loss
def test_order_and_padding_change_nothing(name: str, seed: int) -> None:
    loss, _, field = LIST_LOSSES[name]
    values, labels, mask = arrays_of(random_lists(seed), field)
    loss = jax.jit(loss)
    expected = numbers(loss(values, labels, mask))

    order = np.random.default_rng(seed).permutation(values.shape[1])
    assert parity_error(numbers(loss(values[:, order], labels[:, order], mask[:, order])), expected) < 1e-5

    def padded(array: jax.Array, garbage: float) -> jax.Array:
        return jnp.pad(array, ((0, 2), (0, 3)), constant_values=garbage)

    for garbage in (5.0, jnp.inf, jnp.nan):
        wider = loss(padded(values, garbage), padded(labels, 3), padded(mask, False))
        assert parity_error(numbers(wider), expected) < 1e-5


@every_list_loss
def test_micro_batches_add_up_to_the_batch(name: str, seed: int) -> None:
    loss, denominator, field = LIST_LOSSES[name]
    arrays = arrays_of(random_lists(seed), field)
    loss = jax.jit(loss)
    whole = numbers(loss(*arrays))
    parts = [numbers(loss(*(array[rows] for array in arrays))) for rows in (slice(0, 5), slice(5, None))]
    assert parity_error(parts[0] + parts[1], whole) < 1e-5
    assert np.array_equal(numbers(denominator(*arrays[1:])).ravel(), whole.reshape(-1, 2)[:, 1])


@every_list_loss
def test_gradients_are_finite_at_every_edge_and_zero_at_padding(name: str, seed: int) -> None:
    loss, _, field = LIST_LOSSES[name]
    values, labels, mask = arrays_of(random_lists(seed), field)
    gradient_of = jax.jit(jax.grad(lambda *arrays: total(loss, *arrays)))
    edges = (jnp.zeros_like(values), jnp.full_like(values, 1e4), jnp.full_like(values, -1e4))
    for real in (mask, jnp.zeros_like(mask)):
        for edge in (*edges, jnp.where(real, values, jnp.nan)):
            gradient = gradient_of(edge, labels, real)
            assert np.isfinite(gradient).all()
            assert not gradient[~np.asarray(real)].any()


def test_lists_without_a_positive_count_nowhere(seed: int) -> None:
    case = random_lists(seed)
    values, _, mask = arrays_of(case, "scores")
    for loss, _, _ in LIST_LOSSES.values():
        assert not numbers(loss(values, jnp.zeros_like(values), mask)).any()


def test_one_candidate_gives_nothing_to_learn_from_a_list() -> None:
    one = jnp.array([[2.5, 9.0]]), jnp.array([[3.0, 0.0]]), jnp.array([[True, False]])
    for name in ("listwise", "superposition"):
        value, gradient = jax.value_and_grad(total, argnums=1)(LIST_LOSSES[name][0], *one)
        assert float(value) == 0.0
        assert not gradient.any()


def test_at_equal_scores_the_entropy_is_that_of_a_fair_die_and_the_loss_its_logarithm() -> None:
    scores, mask = jnp.full((1, 6), 3.0), jnp.ones((1, 6), bool)
    labels = jnp.array([[0.0, 2.0, 1.0, 0.0, 0.0, 0.0]])
    assert float(quantum.superposition_entropy(scores, labels, mask, 2.0)[0]) == pytest.approx(math.log(6))
    loss = quantum.superposition_loss(scores, labels, mask, 2.0, 0.1)[0]
    assert float(loss) == pytest.approx(0.9 * math.log(6), rel=1e-6)


def test_collapsed_superposition_is_the_listwise_loss(seed: int) -> None:
    arrays = arrays_of(random_lists(seed), "scores")
    collapsed = quantum.superposition_loss(*arrays, 1.0, 0.0)
    assert numbers(collapsed) == pytest.approx(numbers(ranking.listwise_softmax(*arrays)))


def test_graded_labels_share_the_target_in_proportion() -> None:
    # The gradient vanishes exactly where the probabilities are the normalised grades.
    labels, mask = jnp.array([[3.0, 1.0, 0.0]]), jnp.array([[True, True, False]])
    gradient = jax.grad(total, argnums=1)(ranking.listwise_softmax, jnp.log(labels + 1e-9), labels, mask)
    assert np.abs(gradient).max() < 1e-6


def test_the_resonance_threshold_is_a_fidelity() -> None:
    # At r^2 = threshold each half costs log(2)/2; below it a relevant pair costs more and another pair less.
    labels, mask = jnp.array([[1.0, 0.0]]), jnp.ones((1, 2), bool)

    def halves(r: float) -> list[float]:
        pairs = quantum.resonance_loss(jnp.full((1, 2), r), labels, mask, 0.49, 10.0)
        return [float(ranking.ratio(pair)) for pair in pairs]

    assert halves(0.7) == pytest.approx([math.log(2) / 2] * 2, rel=1e-5)
    assert halves(0.2)[0] > halves(0.7)[0] > halves(0.9)[0]
    assert halves(0.2)[1] < halves(0.7)[1] < halves(0.9)[1]
    assert halves(-0.9) == halves(0.0)


def test_related_queries_attract_and_unrelated_ones_repel_down_to_the_margin() -> None:
    states = jnp.array([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])[:, None]  # three queries, one candidate each
    ones = jnp.ones((3, 1)), jnp.ones((3, 1), bool)
    related = jnp.zeros((3, 3)).at[0, 1].set(0.5).at[1, 0].set(0.5)
    attract, repel = quantum.entanglement_loss(states, 0 * states, *ones, related, 0.1)
    # <0|1> = 0.6, weight 0.5; <0|2> = 0.6 is above the margin, <1|2> = -0.28 is below it.
    assert numbers(attract) == pytest.approx([0.5 * 0.4, 1])
    assert numbers(repel) == pytest.approx([0.5, 2])


def test_a_query_state_is_the_mean_over_its_relevant_pairs_alone() -> None:
    re = jnp.array([[[2.0, 0.0], [0.0, 2.0], [9.0, 9.0], [9.0, -9.0]]])
    labels, mask = jnp.array([[1.0, 2.0, 0.0, 1.0]]), jnp.array([[True, True, True, False]])
    state = quantum.query_states(re, 0 * re, labels, mask)
    assert numbers(state).reshape(-1) == pytest.approx([0.5**0.5, 0.5**0.5, 0.0, 0.0])


def test_entanglement_ignores_global_phase_order_padding_and_lists_of_one_query(seed: int) -> None:
    case = random_lists(seed)
    expected = numbers(entangled(case))
    angle = np.random.default_rng(seed).uniform(0, 2 * np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    order = np.random.default_rng(seed).permutation(len(case.labels))
    turned = ListCase(
        **{
            **vars(case),
            "query_re": cos * case.query_re - sin * case.query_im,
            "query_im": sin * case.query_re + cos * case.query_im,
        }
    )
    shuffled = ListCase(
        **{
            name: value[order][:, order] if name == "related" else value[order]
            for name, value in vars(case).items()
        }
    )
    garbage = np.where(case.mask[..., None], case.query_re, np.nan)
    for other in (turned, shuffled, ListCase(**{**vars(case), "query_re": garbage})):
        assert parity_error(numbers(entangled(other)), expected) < 1e-5
    pairs = sum(numbers(entangled(case)).reshape(2, 2)[:, 1])
    # Ten lists: one is padding, one has no positive, and two belong to one query.
    assert pairs == 8 * 7 / 2 - 1
    arrays = (case.labels, case.mask, case.related, case.query_index)
    counts = numbers(quantum.entanglement_denominator(*map(jnp.asarray, arrays)))
    assert np.array_equal(counts, expected.reshape(2, 2)[:, 1])


def test_entanglement_of_one_query_is_zero_and_so_is_attraction_without_related_pairs(seed: int) -> None:
    case = random_lists(seed)
    one = [jnp.asarray(array[:1], jnp.float32) for array in (case.query_re, case.query_im, case.labels)]
    alone = quantum.entanglement_loss(*one, jnp.asarray(case.mask[:1]), jnp.zeros((1, 1)), 0.0)
    assert not numbers(alone).any()

    def attraction(query_re: jax.Array) -> jax.Array:
        arrays = map(jnp.asarray, (case.query_im, case.labels, case.mask, np.zeros_like(case.related)))
        return ranking.ratio(quantum.entanglement_loss(query_re, *arrays, 0.0)[0])

    value, gradient = jax.value_and_grad(attraction)(jnp.asarray(case.query_re))
    assert float(value) == 0.0
    assert not gradient.any()


def test_entanglement_has_a_finite_gradient_at_zero_and_equal_states_and_padding(seed: int) -> None:
    case = random_lists(seed)
    zeros, ones = jnp.zeros(case.query_re.shape), jnp.ones(case.query_re.shape)
    labels, related = jnp.asarray(case.labels), jnp.asarray(case.related)
    for query_re, query_im in ((zeros, zeros), (ones, zeros), (ones * 1e4, ones)):
        for mask in (jnp.asarray(case.mask), jnp.zeros(case.mask.shape, bool)):
            gradients = jax.grad(
                lambda re, im, mask=mask: total(
                    quantum.entanglement_loss, re, im, labels, mask, related, 0.1
                ),
                argnums=(0, 1),
            )(query_re, query_im)
            assert all(np.isfinite(gradient).all() for gradient in gradients)
            assert all(not gradient[~np.asarray(mask)].any() for gradient in gradients)


def test_losses_trace_once_for_every_temperature(seed: int) -> None:
    arrays = arrays_of(random_lists(seed), "scores")
    traces = []

    @jax.jit
    def step(temperature: jax.Array, bonus: jax.Array) -> jax.Array:
        traces.append(1)
        return quantum.superposition_loss(*arrays, temperature, bonus)[0]

    values = [float(step(tau, beta)) for tau, beta in ((2.0, 0.1), (1.5, 0.05), (1.0, 0.0))]
    assert len(traces) == 1
    assert len(set(values)) == 3


def test_half_precision_scores_are_summed_in_single_precision(seed: int) -> None:
    scores, labels, mask = arrays_of(random_lists(seed), "scores")
    half = scores.astype(jnp.bfloat16)
    for name, (loss, _, field) in LIST_LOSSES.items():
        if field == "scores":
            low, high = (
                numbers(loss(half, labels, mask)),
                numbers(loss(half.astype(jnp.float32), labels, mask)),
            )
            assert np.array_equal(low, high), name
    assert normalise(half, half)[0].dtype == jnp.float32
