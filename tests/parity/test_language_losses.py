"""The losses of language models against the float64 reference: values and gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from common.reference import language as reference
from common.reference.cases import float32_exact, numeric_gradient, parity_error
from tests.parity.backends import LOSS_TOLERANCE, Backend, check

ROWS, TOKENS, VOCABULARY, WIDTH = 3, 4, 7, 5
REFERENCE = "float64 reference"
# what a teacher of few stored logits leaves to the rest is 1 minus their mass: float32 cancels there, the
# more the larger the logits are (80 here)
TAIL_TOLERANCE = 5e-5


class Case:
    """Logits of a student and a teacher, labels, and a mask: a row of padding alone, a certain teacher, equal
    logits, padding inside."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        shape = (ROWS, TOKENS, VOCABULARY)
        self.logits, self.teacher = float32_exact(rng.normal(0, 2, (2, *shape)))
        self.teacher[0, 0] *= 20  # nearly certain
        self.logits[0, 1] = self.logits[0, 1, 0]
        self.labels = rng.integers(0, VOCABULARY, (ROWS, TOKENS)).astype(np.int32)
        self.mask = rng.random((ROWS, TOKENS)) < 0.8
        self.mask[0], self.mask[1] = True, False
        self.temperature = float(float32_exact(rng.uniform(0.7, 4.0)))
        self.re, self.im = float32_exact(rng.normal(size=(2, ROWS, TOKENS, WIDTH)))
        self.certainty = float32_exact(rng.random((ROWS, TOKENS)))


def numbers(pair: object) -> np.ndarray:
    return np.ravel(np.asarray(pair, np.float64))


def losses(backend: Backend) -> Any:
    return backend.module("losses.language")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_and_its_gradient(backend: Backend, smoothing: float, seed: int) -> None:
    case, pair = Case(seed), f"{backend.name} with {REFERENCE}"
    data = case.labels, case.mask

    def ours(logits: Any, labels: Any, mask: Any) -> Any:
        return losses(backend).cross_entropy(logits, labels, mask, smoothing)

    expected = numbers(reference.cross_entropy(case.logits, *data, smoothing))
    assert expected[1] >= TOKENS
    found = numbers(backend.values(ours)(case.logits, *data))
    check("language losses, cross-entropy", pair, found, expected, LOSS_TOLERANCE)
    (gradient,), (of_count,) = backend.gradients(ours)(case.logits, *data)
    by_hand = reference.cross_entropy_gradient(case.logits, *data, smoothing)
    check("language losses, cross-entropy gradient", pair, gradient, by_hand, LOSS_TOLERANCE)
    assert not of_count.any() and not gradient[1].any()
    measured = numeric_gradient(lambda x: reference.cross_entropy(x, *data, smoothing)[0], case.logits)
    assert parity_error(measured, by_hand) < 1e-6


def test_distillation_and_its_gradient(backend: Backend, seed: int) -> None:
    case, pair = Case(seed), f"{backend.name} with {REFERENCE}"
    data = case.teacher, case.mask

    def ours(logits: Any, teacher: Any, mask: Any) -> Any:
        return losses(backend).distillation(logits, teacher, mask, case.temperature)

    expected = numbers(reference.distillation(case.logits, *data, case.temperature))
    found = numbers(backend.values(ours)(case.logits, *data))
    check("language losses, distillation", pair, found, expected, LOSS_TOLERANCE)
    by_student, by_teacher = backend.gradients(ours, (0, 1))(case.logits, *data)[0]
    by_hand = reference.distillation_gradient(case.logits, *data, case.temperature)
    check("language losses, distillation gradient", pair, by_student, by_hand, LOSS_TOLERANCE)
    assert not by_teacher.any() and not by_student[1].any()
    measured = numeric_gradient(lambda x: reference.distillation(x, *data, case.temperature)[0], case.logits)
    assert parity_error(measured, by_hand) < 1e-6


@pytest.mark.parametrize("k", [1, 3, VOCABULARY])
def test_stored_distillation_and_its_gradient(backend: Backend, k: int, seed: int) -> None:
    case, pair = Case(seed), f"{backend.name} with {REFERENCE}"
    stored = reference.store_teacher(case.teacher, k, case.temperature)
    kept = backend.values(lambda x: losses(backend).store_teacher(x, k, case.temperature))(case.teacher)
    for one, other, name in zip(kept, stored, stored._fields, strict=True):
        check(f"language losses, stored {name}", pair, one, other, LOSS_TOLERANCE)

    def ours(logits: Any, ids: Any, values: Any, log_total: Any, mask: Any) -> Any:
        teacher = losses(backend).StoredTeacher(ids, values, log_total, log_total)
        return losses(backend).stored_distillation(logits, teacher, mask, case.temperature)

    data = stored.ids.astype(np.int32), stored.values, stored.log_total, case.mask
    expected = numbers(reference.stored_distillation(case.logits, stored, case.mask, case.temperature))
    found = numbers(backend.values(ours)(case.logits, *data))
    check(f"language losses, {k} stored", pair, found, expected, TAIL_TOLERANCE)
    online = reference.distillation(case.logits, case.teacher, case.mask, case.temperature)
    assert found[0] <= online[0] + 1e-4 * abs(online[0])
    if k == VOCABULARY:
        check(f"language losses, all {k} stored", pair, found, numbers(online), LOSS_TOLERANCE)
    gradient = backend.gradients(ours)(case.logits, *data)[0][0]
    measured = numeric_gradient(
        lambda x: reference.stored_distillation(x, stored, case.mask, case.temperature)[0], case.logits
    )
    check(f"language losses, {k} stored gradient", pair, gradient, measured, TAIL_TOLERANCE)


def test_phase_and_magnitude_and_their_gradients(backend: Backend, seed: int) -> None:
    case, pair = Case(seed), f"{backend.name} with {REFERENCE}"
    ours, data = losses(backend).phase_magnitude, (case.certainty, case.mask)
    expected = numbers(reference.phase_magnitude(case.re, case.im, *data))
    found = numbers(backend.values(ours)(case.re, case.im, *data))
    check("language losses, phase and magnitude", pair, found, expected, LOSS_TOLERANCE)
    rows = backend.gradients(ours, (0, 1))(case.re, case.im, *data)
    for half in (0, 1):
        for side in (0, 1):

            def theirs(x: np.ndarray, half: int = half, side: int = side) -> float:
                state = (x, case.im) if side == 0 else (case.re, x)
                return reference.phase_magnitude(*state, *data)[half][0]

            measured = numeric_gradient(theirs, (case.re, case.im)[side])
            check(
                "language losses, phase and magnitude gradient",
                pair,
                rows[2 * half][side],
                measured,
                LOSS_TOLERANCE,
            )


def test_the_gradients_are_finite_where_magnitude_and_coherence_vanish(backend: Backend) -> None:
    ours = losses(backend).phase_magnitude
    re = np.array([[[0.0, 0.0], [1.0, -1.0]]], np.float32)
    rows = backend.gradients(ours, (0, 1))(re, np.zeros_like(re), np.ones((1, 2)), np.ones((1, 2), bool))
    assert all(np.isfinite(gradient).all() for row in rows for gradient in row)


def test_certainty_is_one_for_a_certain_teacher_and_zero_for_an_even_one(backend: Backend) -> None:
    module = losses(backend)
    logits = np.zeros((1, 2, VOCABULARY), np.float32)
    logits[0, 0, 3] = 100.0
    (found,) = backend.values(lambda x: [module.certainty(module.entropy(x), VOCABULARY)])(logits)
    assert np.abs(found - [[1.0, 0.0]]).max() < 1e-5
