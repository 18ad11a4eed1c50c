"""The preservation losses of retraining against the float64 reference, in JAX alone so far."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from common.reference import losses as reference
from common.reference.cases import float32_exact, numeric_gradient, parity_error, random_lists, random_states
from jax_impl.losses import preservation

TOLERANCE = 1e-5
CASES = 5


def numbers(pair: object) -> np.ndarray:
    """(numerator, denominator)."""
    return np.ravel(np.asarray(pair, np.float64))


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
