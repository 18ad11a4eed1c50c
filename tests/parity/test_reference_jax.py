"""The JAX losses and projector against the float64 reference: values and gradients on fresh random cases."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.reference import losses as reference
from common.reference import projector as reference_projector
from common.reference.cases import float32_exact, numeric_gradient, parity_error, random_lists, random_states
from jax_impl.losses import preservation, quantum, ranking
from jax_impl.models.projector import Projector, block_fidelity, fidelity_factors, resonance

TOLERANCE = 1e-5
CASES = 5


def numbers(result: object) -> np.ndarray:
    return np.array(jax.tree.leaves(result), np.float64)


# name -> (field of a case, our loss, reference loss, reference gradient), each of (values, labels, mask)
def list_losses(temperature: float, bonus: float, threshold: float, sharpness: float) -> dict[str, tuple]:
    def bind(function: Callable, *settings: float) -> Callable:
        return lambda values, labels, mask: function(values, labels, mask, *settings)

    soft, settings = (temperature, bonus), (threshold, sharpness)
    return {
        "pointwise": (
            "scores",
            ranking.pointwise_bce,
            reference.pointwise_bce,
            reference.pointwise_bce_gradient,
        ),
        "listwise": (
            "scores",
            ranking.listwise_softmax,
            reference.listwise_softmax,
            bind(reference.superposition_loss_gradient, 1.0, 0.0),
        ),
        **{
            name: (
                "scores",
                getattr(ranking, name),
                getattr(reference, name),
                getattr(reference, f"{name}_gradient"),
            )
            for name in ("ranknet", "lambda_loss", "listnet", "plistmle")
        },
        "superposition": (
            "scores",
            bind(quantum.superposition_loss, *soft),
            bind(reference.superposition_loss, *soft),
            bind(reference.superposition_loss_gradient, *soft),
        ),
        "entropy": (
            "scores",
            bind(quantum.superposition_entropy, temperature),
            bind(reference.superposition_entropy, temperature),
            None,
        ),
        "resonance": (
            "resonance",
            bind(quantum.resonance_loss, *settings),
            bind(reference.resonance_loss, *settings),
            bind(reference.resonance_loss_gradient, *settings),
        ),
    }


@pytest.mark.parametrize("name", list_losses(1.0, 0.0, 0.5, 1.0))
def test_list_losses_and_their_gradients(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    settings = rng.uniform([0.5, 0.0, 0.1, 1.0], [3.0, 0.5, 0.9, 15.0]).tolist()
    field, ours, theirs, gradient = list_losses(*settings)[name]
    value_of, jacobian_of = jax.jit(ours), jax.jit(jax.jacrev(ours))
    for _ in range(CASES):
        case = random_lists(int(rng.integers(2**32)))
        values = getattr(case, field)
        arrays = jnp.asarray(values), jnp.asarray(case.labels), jnp.asarray(case.mask)
        expected = numbers(theirs(values, case.labels, case.mask))
        assert parity_error(numbers(value_of(*arrays)), expected) < TOLERANCE
        if gradient is None:
            continue
        jacobian, analytic = jacobian_of(*arrays), gradient(values, case.labels, case.mask)
        halves = zip(jacobian, analytic, strict=True) if name == "resonance" else [(jacobian, analytic)]
        for (numerator, denominator), row in halves:
            assert parity_error(numerator, row) < TOLERANCE
            assert not denominator.any()


def test_the_reference_gradients_are_those_of_the_reference_values(seed: int) -> None:
    case = random_lists(seed)
    for name, (field, _, theirs, gradient) in list_losses(1.7, 0.2, 0.6, 8.0).items():
        if gradient is None:
            continue
        two, point = name == "resonance", getattr(case, field).copy()
        if name == "lambda_loss":  # its weights jump where the ranks change, as at equal scores
            point[4] += 0.1 * np.arange(point.shape[1])
        analytic = gradient(point, case.labels, case.mask)
        for half, row in enumerate(analytic if two else (analytic,)):

            def numerator(
                values: np.ndarray, half: int = half, theirs: Callable = theirs, two: bool = two
            ) -> float:
                result = theirs(values, case.labels, case.mask)
                return result[half][0] if two else result[0]

            assert parity_error(numeric_gradient(numerator, point), row) < 1e-6, name


@pytest.mark.parametrize("name", ["margin_mse", "soft_labels"])
def test_losses_of_a_teacher_and_their_gradients(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    temperature = float(float32_exact(rng.uniform(0.5, 3.0)))
    for _ in range(CASES):
        case = random_lists(int(rng.integers(2**32)))
        if name == "margin_mse":
            settings: tuple = (case.labels, case.mask, case.teacher)
        else:
            settings = (case.mask, case.teacher, temperature)
        ours, theirs = getattr(ranking, name), getattr(reference, name)

        def value(scores: jax.Array, ours: Callable = ours, settings: tuple = settings) -> tuple:
            return ours(scores, *map(jnp.asarray, settings))

        scores = jnp.asarray(case.scores)
        expected = numbers(theirs(case.scores, *settings))
        assert expected[1] > 3 and parity_error(numbers(jax.jit(value)(scores)), expected) < TOLERANCE
        numerator, denominator = jax.jit(jax.jacrev(value))(scores)
        by_hand = getattr(reference, f"{name}_gradient")(case.scores, *settings)
        assert parity_error(numerator, by_hand) < TOLERANCE and not denominator.any()
        padded = np.where(case.mask, case.scores, 0.0)  # far from 1e4, where central differences are exact

        def plain(x: np.ndarray, theirs: Callable = theirs, settings: tuple = settings) -> float:
            return theirs(x, *settings)[0]

        by_hand = getattr(reference, f"{name}_gradient")(padded, *settings)
        assert parity_error(numeric_gradient(plain, padded), by_hand) < 1e-6


def test_entanglement_and_its_gradient(seed: int) -> None:
    rng = np.random.default_rng(seed)
    compared, redrawn = 0, 0
    while compared < 2:
        case = random_lists(int(rng.integers(2**32)), width=3)
        margin = float(float32_exact(rng.uniform(-0.3, 0.5)))
        data = case.labels, case.mask, case.related, margin, case.query_index

        def theirs(half: int, query_re: np.ndarray, query_im: np.ndarray, data: tuple = data) -> float:
            return reference.entanglement_loss(query_re, query_im, *data)[half][0]

        # The hinge has no gradient at its corner: a case with a pair within 1e-4 of it is drawn again.
        nudged = [
            reference.entanglement_loss(case.query_re, case.query_im, *data[:3], margin + step, data[4])[1][0]
            for step in (-1e-4, 0.0, 1e-4)
        ]
        if abs(nudged[0] - 2 * nudged[1] + nudged[2]) > 1e-9:
            redrawn += 1
            continue
        compared += 1
        ours = lambda re, im, data=data: quantum.entanglement_loss(re, im, *map(jnp.asarray, data))  # noqa: E731
        states = jnp.asarray(case.query_re), jnp.asarray(case.query_im)
        expected = numbers(reference.entanglement_loss(case.query_re, case.query_im, *data))
        assert parity_error(numbers(jax.jit(ours)(*states)), expected) < TOLERANCE
        jacobian = jax.jit(jax.jacrev(ours, argnums=(0, 1)))(*states)
        for half in (0, 1):
            by_re = numeric_gradient(
                lambda x, half=half, case=case: theirs(half, x, case.query_im), case.query_re
            )
            by_im = numeric_gradient(
                lambda x, half=half, case=case: theirs(half, case.query_re, x), case.query_im
            )
            assert parity_error(jacobian[half][0][0], by_re) < TOLERANCE
            assert parity_error(jacobian[half][0][1], by_im) < TOLERANCE
    print(f"{redrawn} cases drawn again")


def test_alignment_and_its_gradient(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(CASES):
        case = random_lists(int(rng.integers(2**32)), width=3)
        states, targets = (
            (case.query_re, case.query_im),
            float32_exact(rng.normal(size=(2, *case.query_re.shape))),
        )
        judged = jnp.asarray(case.labels), jnp.asarray(case.mask)

        def ours(
            re: jax.Array, im: jax.Array, targets: np.ndarray = targets, judged: tuple = judged
        ) -> tuple:
            return quantum.alignment_loss(re, im, *map(jnp.asarray, targets), *judged)

        expected = numbers(reference.alignment_loss(*states, *targets, case.labels, case.mask))
        assert parity_error(numbers(ours(*map(jnp.asarray, states))), expected) < TOLERANCE
        gradient = jax.grad(lambda *x: ours(*x)[0], argnums=(0, 1))(*map(jnp.asarray, states))
        by_hand = reference.alignment_loss_gradient(*targets, case.labels, case.mask)
        assert max(map(parity_error, gradient, by_hand)) < TOLERANCE


def test_preserved_lists_and_their_gradient(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(CASES):
        case = random_lists(int(rng.integers(2**32)))
        # what the frozen original said: of every real candidate, or not of all of them
        original = np.where(case.mask, float32_exact(rng.normal(0.0, 3.0, case.scores.shape)), np.nan)
        for known in (original, case.teacher):
            settings = jnp.asarray(known), jnp.asarray(case.mask)
            value = jax.jit(lambda s, settings=settings: preservation.preservation_loss(s, *settings))
            expected = numbers(reference.preservation_loss(case.scores, known, case.mask))
            assert expected[1] > 3 and expected[0] > 0
            assert parity_error(numbers(value(jnp.asarray(case.scores))), expected) < TOLERANCE
            numerator, denominator = jax.jacrev(value)(jnp.asarray(case.scores))
            by_hand = reference.preservation_loss_gradient(case.scores, known, case.mask)
            assert parity_error(numerator, by_hand) < TOLERANCE and not denominator.any()
            padded = np.where(case.mask, case.scores, 0.0)  # far from 1e4, where differences are exact
            measured = numeric_gradient(
                lambda s, known=known, case=case: reference.preservation_loss(s, known, case.mask)[0], padded
            )
            by_hand = reference.preservation_loss_gradient(padded, known, case.mask)
            assert parity_error(measured, by_hand) < 1e-6


def test_preserved_states_and_their_gradient(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(CASES):
        case = random_lists(int(rng.integers(2**32)), width=3)
        shape = case.query_re.shape
        states, targets = (tuple(map(float32_exact, random_states(rng, *shape))) for _ in range(2))
        fixed = (*map(jnp.asarray, targets), jnp.asarray(case.mask))
        ours = jax.jit(lambda re, im, fixed=fixed: preservation.state_preservation_loss(re, im, *fixed))
        expected = numbers(reference.state_preservation_loss(*states, *targets, case.mask))
        assert parity_error(numbers(ours(*map(jnp.asarray, states))), expected) < TOLERANCE
        gradient = jax.grad(lambda *x, ours=ours: ours(*x)[0], argnums=(0, 1))(*map(jnp.asarray, states))
        by_hand = reference.state_preservation_loss_gradient(*targets, case.mask)
        assert max(map(parity_error, gradient, by_hand)) < TOLERANCE
        for place in (0, 1):

            def numerator(
                x: np.ndarray, place: int = place, states: tuple = states, rest: tuple = (*targets, case.mask)
            ) -> float:
                pair = [x if n == place else state for n, state in enumerate(states)]
                return reference.state_preservation_loss(*pair, *rest)[0]

            assert parity_error(numeric_gradient(numerator, states[place]), by_hand[place]) < 1e-6


def reference_state(projector: Projector, hidden: np.ndarray) -> reference_projector.State:
    def layer(linear: nnx.Linear) -> list[np.ndarray]:
        parts = [linear.kernel] if linear.bias is None else [linear.kernel, linear.bias]
        return [np.asarray(part[...], np.float64) for part in parts]

    if projector.parameterisation == "cartesian":
        kernels = [*layer(projector.proj_re), *layer(projector.proj_im)]
        return reference_projector.cartesian(hidden, *kernels, projector.blocks)
    weights = [*layer(projector.magnitude), *layer(projector.phase)]
    return reference_projector.polar(hidden, *weights, projector.blocks)


@pytest.mark.parametrize("parameterisation", ["cartesian", "polar"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_projector_resonance_and_fidelity_with_their_gradients(
    parameterisation: str, blocks: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    projector = Projector(
        5, 6, parameterisation=parameterisation, blocks=blocks, imaginary_start=0.7, rngs=nnx.Rngs(seed)
    )
    if parameterisation == "polar":
        for linear in (projector.magnitude, projector.phase):
            linear.bias[...] = jnp.asarray(rng.normal(size=6), jnp.float32)
    query, passage = float32_exact(rng.normal(size=(2, 3, 5)))
    mix = float32_exact(rng.normal(size=(4, 3)))
    weights = float32_exact(rng.dirichlet(np.ones(blocks)))

    def ours(query: jax.Array) -> jax.Array:
        psi, chi = projector(query), projector(jnp.asarray(passage))
        parts = (
            resonance(psi, chi, blocks),
            *fidelity_factors(psi, chi),
            block_fidelity(psi, chi, jnp.asarray(weights)),
        )
        return jnp.stack(parts)

    def theirs(query: np.ndarray) -> np.ndarray:
        psi, chi = reference_state(projector, query), reference_state(projector, passage)
        parts = (
            reference_projector.resonance(psi, chi, blocks),
            *reference_projector.fidelity_factors(psi, chi),
            reference_projector.block_fidelity(psi, chi, weights),
        )
        return np.stack(parts)

    assert parity_error(jax.jit(ours)(jnp.asarray(query)), theirs(query)) < TOLERANCE
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(mix * ours(x))))(jnp.asarray(query))
    assert (
        parity_error(gradient, numeric_gradient(lambda x: float(np.sum(mix * theirs(x))), query)) < TOLERANCE
    )
