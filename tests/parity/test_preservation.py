"""The preservation losses of retraining against the float64 reference: values and gradients."""

from __future__ import annotations

from typing import Any

import numpy as np

from common.reference import losses as reference
from common.reference.cases import float32_exact, numeric_gradient, parity_error, random_lists, random_states
from tests.parity.backends import LOSS_TOLERANCE, Backend, check

CASES = 5


def numbers(pair: object) -> np.ndarray:
    """(numerator, denominator)."""
    return np.ravel(np.asarray(pair, np.float64))


def test_preserved_lists_and_their_gradient(backend: Backend, seed: int) -> None:
    rng, pair = np.random.default_rng(seed), f"{backend.name} with float64 reference"
    ours = backend.module("losses.preservation").preservation_loss
    value_of, gradients_of = backend.values(ours), backend.gradients(ours)
    for _ in range(CASES):
        case = random_lists(int(rng.integers(2**32)))
        # what the frozen original said: of every real candidate, or not of all of them
        original = np.where(case.mask, float32_exact(rng.normal(0.0, 3.0, case.scores.shape)), np.nan)
        for known in (original, case.teacher):
            inputs = case.scores, known, case.mask
            expected = numbers(reference.preservation_loss(*inputs))
            assert expected[1] > 3 and expected[0] > 0
            check("preservation losses, lists", pair, numbers(value_of(*inputs)), expected, LOSS_TOLERANCE)
            (numerator,), (denominator,) = gradients_of(*inputs)
            by_hand = reference.preservation_loss_gradient(*inputs)
            check("preservation losses, lists gradient", pair, numerator, by_hand, LOSS_TOLERANCE)
            assert not denominator.any()
            padded = np.where(case.mask, case.scores, 0.0)  # far from 1e4, where differences are exact
            measured = numeric_gradient(
                lambda s, known=known, case=case: reference.preservation_loss(s, known, case.mask)[0], padded
            )
            by_hand = reference.preservation_loss_gradient(padded, known, case.mask)
            assert parity_error(measured, by_hand) < 1e-6


def test_preserved_states_and_their_gradient(backend: Backend, seed: int) -> None:
    rng, pair = np.random.default_rng(seed), f"{backend.name} with float64 reference"
    ours = backend.module("losses.preservation").state_preservation_loss
    for _ in range(CASES):
        case = random_lists(int(rng.integers(2**32)), width=3)
        shape = case.query_re.shape
        states, targets = (tuple(map(float32_exact, random_states(rng, *shape))) for _ in range(2))
        inputs: tuple[Any, ...] = (*states, *targets, case.mask)
        expected = numbers(reference.state_preservation_loss(*inputs))
        found = numbers(backend.values(ours)(*inputs))
        check("preservation losses, states", pair, found, expected, LOSS_TOLERANCE)
        gradient, _ = backend.gradients(ours, (0, 1))(*inputs)
        by_hand = reference.state_preservation_loss_gradient(*targets, case.mask)
        for side, wanted in zip(gradient, by_hand, strict=True):
            check("preservation losses, states gradient", pair, side, wanted, LOSS_TOLERANCE)
        for place in (0, 1):

            def numerator(
                x: np.ndarray, place: int = place, states: tuple = states, rest: tuple = (*targets, case.mask)
            ) -> float:
                pair = [x if n == place else state for n, state in enumerate(states)]
                return reference.state_preservation_loss(*pair, *rest)[0]

            assert parity_error(numeric_gradient(numerator, states[place]), by_hand[place]) < 1e-6
