"""The losses and the projector of each backend against the float64 reference: values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from common.reference import losses as reference
from common.reference import projector as reference_projector
from common.reference.cases import ListCase, float32_exact, numeric_gradient, parity_error, random_lists
from tests.parity.backends import LOSS_TOLERANCE, Backend, check, mix, mixed

CASES = 5
REFERENCE = "float64 reference"


def flat(result: object) -> np.ndarray:
    """(numerator, denominator) of every pair, one after the other."""
    return np.ravel(np.asarray(result, np.float64))


# name -> (module, function, field of a case), then what the reference's gradient is called where it differs
LIST_LOSSES = {
    "pointwise": ("losses.ranking", "pointwise_bce", "scores"),
    "listwise": ("losses.ranking", "listwise_softmax", "scores"),
    "ranknet": ("losses.ranking", "ranknet", "scores"),
    "lambda": ("losses.ranking", "lambda_loss", "scores"),
    "listnet": ("losses.ranking", "listnet", "scores"),
    "plistmle": ("losses.ranking", "plistmle", "scores"),
    "superposition": ("losses.quantum", "superposition_loss", "scores"),
    "entropy": ("losses.quantum", "superposition_entropy", "scores"),
    "resonance": ("losses.quantum", "resonance_loss", "resonance"),
}


def list_loss(name: str, settings: np.ndarray) -> tuple[Callable, Callable | None, tuple[float, ...]]:
    """The reference loss of (values, labels, mask, *extra), its gradient, and `extra`."""
    temperature, bonus, threshold, sharpness = map(float, settings)
    extra = {
        "superposition": (temperature, bonus),
        "entropy": (temperature,),
        "resonance": (threshold, sharpness),
    }.get(name, ())
    function = LIST_LOSSES[name][1]
    if name == "listwise":
        return (
            reference.listwise_softmax,
            lambda *x: reference.superposition_loss_gradient(*x, 1.0, 0.0),
            extra,
        )
    return getattr(reference, function), getattr(reference, f"{function}_gradient", None), extra


def random_settings(rng: np.random.Generator) -> np.ndarray:
    return float32_exact(rng.uniform([0.5, 0.0, 0.1, 1.0], [3.0, 0.5, 0.9, 15.0]))


@pytest.mark.parametrize("name", LIST_LOSSES)
def test_list_losses_and_their_gradients(backend: Backend, name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    theirs, gradient, extra = list_loss(name, random_settings(rng))
    module, function, field = LIST_LOSSES[name]

    def ours(*inputs: Any) -> Any:
        return getattr(backend.module(module), function)(*inputs, *extra)

    value_of, gradients_of = backend.values(ours), backend.gradients(ours)
    label = f"{module.split('.')[1]} losses, {name}"
    pair = f"{backend.name} with {REFERENCE}"
    for _ in range(CASES):
        case = random_lists(int(rng.integers(2**32)))
        inputs = getattr(case, field), case.labels, case.mask
        check(label, pair, flat(value_of(*inputs)), flat(theirs(*inputs, *extra)), LOSS_TOLERANCE)
        if gradient is None:
            continue
        rows = gradients_of(*inputs)
        analytic = gradient(*inputs, *extra)
        analytic = analytic if name == "resonance" else (analytic,)
        for half, expected in enumerate(analytic):
            check(f"{label} gradient", pair, rows[2 * half][0], expected, LOSS_TOLERANCE)
            assert not rows[2 * half + 1][0].any()  # the denominator depends on the data alone


def test_plistmle_of_a_list_longer_than_float32_has_powers_of_two(backend: Backend, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, labels = float32_exact(rng.normal(size=(2, 140))), rng.integers(0, 3, (2, 140)).astype(float)
    labels[:, 0], mask = 1.0, np.arange(140) < np.array([[140], [3]])
    loss = backend.module("losses.ranking").plistmle
    pair = f"{backend.name} with {REFERENCE}"
    name = "ranking losses, plistmle of long lists"
    expected = reference.plistmle(scores, labels, mask)
    check(name, pair, flat(backend.values(loss)(scores, labels, mask)), flat(expected), LOSS_TOLERANCE)
    gradient = reference.plistmle_gradient(scores, labels, mask)
    check(name, pair, backend.gradients(loss)(scores, labels, mask)[0][0], gradient, LOSS_TOLERANCE)


def test_the_reference_gradients_are_those_of_the_reference_values(seed: int) -> None:
    case = random_lists(seed)
    for name, (_, _, field) in LIST_LOSSES.items():
        theirs, gradient, extra = list_loss(name, np.array([1.7, 0.2, 0.6, 8.0]))
        if gradient is None:
            continue
        point = getattr(case, field).copy()
        if name == "lambda":  # its weights jump where the ranks change, as at equal scores
            point[4] += 0.1 * np.arange(point.shape[1])
        analytic = gradient(point, case.labels, case.mask, *extra)
        for half, row in enumerate(analytic if name == "resonance" else (analytic,)):

            def numerator(
                values: np.ndarray, half: int = half, theirs: Callable = theirs, extra: tuple = extra
            ) -> float:
                return float(flat(theirs(values, case.labels, case.mask, *extra))[2 * half])

            assert parity_error(numeric_gradient(numerator, point), row) < 1e-6, name


@pytest.mark.parametrize("name", ["margin_mse", "soft_labels"])
def test_losses_of_a_teacher_and_their_gradients(backend: Backend, name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    temperature = float(float32_exact(rng.uniform(0.5, 3.0)))
    ours, theirs = getattr(backend.module("losses.ranking"), name), getattr(reference, name)
    for _ in range(CASES):
        case = random_lists(int(rng.integers(2**32)))
        if name == "margin_mse":
            settings: tuple = (case.labels, case.mask, case.teacher)
        else:
            settings = (case.mask, case.teacher, np.asarray(temperature))
        expected = flat(theirs(case.scores, *settings))
        assert expected[1] > 3
        check(
            f"ranking losses, {name}",
            f"{backend.name} with {REFERENCE}",
            flat(backend.values(ours)(case.scores, *settings)),
            expected,
            LOSS_TOLERANCE,
        )
        numerator, denominator = backend.gradients(ours)(case.scores, *settings)
        by_hand = getattr(reference, f"{name}_gradient")(case.scores, *settings)
        check(
            f"ranking losses, {name} gradient",
            f"{backend.name} with {REFERENCE}",
            numerator[0],
            by_hand,
            LOSS_TOLERANCE,
        )
        assert not denominator[0].any()
        padded = np.where(case.mask, case.scores, 0.0)  # far from 1e4, where central differences are exact

        def plain(x: np.ndarray, theirs: Callable = theirs, settings: tuple = settings) -> float:
            return theirs(x, *settings)[0]

        by_hand = getattr(reference, f"{name}_gradient")(padded, *settings)
        assert parity_error(numeric_gradient(plain, padded), by_hand) < 1e-6


def near_the_hinge(case: ListCase, margin: float, query_index: np.ndarray | None) -> bool:
    """Whether a pair lies within 1e-4 of the margin, where the entanglement loss has no gradient."""
    nudged = [
        reference.entanglement_loss(
            case.query_re,
            case.query_im,
            case.labels,
            case.mask,
            case.related,
            margin + step,
            query_index,
        )[1][0]
        for step in (-1e-4, 0.0, 1e-4)
    ]
    return abs(nudged[0] - 2 * nudged[1] + nudged[2]) > 1e-9


@pytest.mark.parametrize("indexed", [True, False])
def test_entanglement_and_its_gradient(backend: Backend, indexed: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ours = backend.module("losses.quantum").entanglement_loss
    compared, redrawn = 0, 0
    while compared < 2:
        case = random_lists(int(rng.integers(2**32)), width=3)
        margin = float32_exact(rng.uniform(-0.3, 0.5))
        query_index = case.query_index if indexed else None
        if near_the_hinge(case, float(margin), query_index):
            redrawn += 1
            continue
        compared += 1
        states = case.query_re, case.query_im
        data = case.labels, case.mask, case.related, margin, *([query_index] if indexed else [])
        expected = flat(reference.entanglement_loss(*states, *data))
        check(
            "quantum losses, entanglement",
            f"{backend.name} with {REFERENCE}",
            flat(backend.values(ours)(*states, *data)),
            expected,
            LOSS_TOLERANCE,
        )
        rows = backend.gradients(ours, (0, 1))(*states, *data)
        for half in (0, 1):
            for side in (0, 1):

                def theirs(
                    x: np.ndarray,
                    half: int = half,
                    side: int = side,
                    states: tuple = states,
                    data: tuple = data,
                ) -> float:
                    moved = (x, states[1]) if side == 0 else (states[0], x)
                    return reference.entanglement_loss(*moved, *data)[half][0]

                by_differences = numeric_gradient(theirs, states[side])
                check(
                    "quantum losses, entanglement gradient",
                    f"{backend.name} with {REFERENCE}",
                    rows[2 * half][side],
                    by_differences,
                    LOSS_TOLERANCE,
                )
            assert not any(gradient.any() for gradient in rows[2 * half + 1])
    print(f"{redrawn} cases drawn again")


def test_alignment_and_its_gradient(backend: Backend, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ours = backend.module("losses.quantum").alignment_loss
    for _ in range(CASES):
        case = random_lists(int(rng.integers(2**32)), width=3)
        targets = float32_exact(rng.normal(size=(2, *case.query_re.shape)))
        inputs = case.query_re, case.query_im, *targets, case.labels, case.mask
        check(
            "quantum losses, alignment",
            f"{backend.name} with {REFERENCE}",
            flat(backend.values(ours)(*inputs)),
            flat(reference.alignment_loss(*inputs)),
            LOSS_TOLERANCE,
        )
        numerator, _ = backend.gradients(ours, (0, 1))(*inputs)
        by_hand = reference.alignment_loss_gradient(*targets, case.labels, case.mask)
        for gradient, expected in zip(numerator, by_hand, strict=True):
            check(
                "quantum losses, alignment gradient",
                f"{backend.name} with {REFERENCE}",
                gradient,
                expected,
                LOSS_TOLERANCE,
            )


def reference_outputs(
    weights: dict[str, np.ndarray], blocks: int, query: np.ndarray, passage: np.ndarray, share: np.ndarray
) -> np.ndarray:
    """r, BC, R and F_w of two vectors, [4, N], through a projector with checkpoint tensors `weights`."""

    def state(hidden: np.ndarray) -> reference_projector.State:
        if "proj_re.weight" in weights:
            kernels = weights["proj_re.weight"].T, weights["proj_im.weight"].T
            return reference_projector.cartesian(hidden, *kernels, blocks)
        layers = [weights[f"{name}.weight"].T for name in ("magnitude", "phase")]
        biases = [weights[f"{name}.bias"] for name in ("magnitude", "phase")]
        return reference_projector.polar(hidden, layers[0], biases[0], layers[1], biases[1], blocks)

    psi, chi = state(query), state(passage)
    parts = (
        reference_projector.resonance(psi, chi, blocks),
        *reference_projector.fidelity_factors(psi, chi),
        reference_projector.block_fidelity(psi, chi, share),
    )
    return np.stack(parts)


@pytest.mark.parametrize("parameterisation", ["cartesian", "polar"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_projector_resonance_and_fidelity_with_their_gradients(
    backend: Backend, parameterisation: str, blocks: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    module = backend.module("models.projector")
    projector = module.Projector(
        5,
        6,
        parameterisation=parameterisation,
        blocks=blocks,
        imaginary_start=0.7,
        rngs=backend.rngs(seed % 2**31),
    )
    start = backend.parameters(projector)
    drawn = {name: float32_exact(value + rng.normal(0, 0.5, value.shape)) for name, value in start.items()}
    backend.set_parameters(projector, drawn)
    query, passage = float32_exact(rng.normal(size=(2, 3, 5)))
    weights = float32_exact(mix((4, 3), np.random.default_rng(seed)))
    share = float32_exact(rng.dirichlet(np.ones(blocks)))

    def ours(projector: Any, query: Any, passage: Any) -> Any:
        psi, chi = projector(query), projector(passage)
        parts = (
            module.resonance(psi, chi, blocks),
            *module.fidelity_factors(psi, chi),
            module.block_fidelity(psi, chi, backend.array(share)),
        )
        return backend.stack(parts)

    def theirs(query: np.ndarray, passage: np.ndarray, **changed: np.ndarray) -> np.ndarray:
        return reference_outputs(drawn | changed, blocks, query, passage, share)

    label, pair = f"projector, {parameterisation}", f"{backend.name} with {REFERENCE}"
    (found,), by_weights = backend.results(projector, lambda *x: [ours(*x)], seed, query, passage)
    check(label, pair, found, theirs(query, passage), LOSS_TOLERANCE)
    ((by_query, by_passage),) = backend.gradients(
        lambda *x: mixed(backend, [ours(projector, *x)], seed), (0, 1)
    )(query, passage)
    expected = numeric_gradient(lambda x: float(np.sum(weights * theirs(x, passage))), query)
    check(f"{label} gradient by query", pair, by_query, expected, LOSS_TOLERANCE)
    expected = numeric_gradient(lambda x: float(np.sum(weights * theirs(query, x))), passage)
    check(f"{label} gradient by passage", pair, by_passage, expected, LOSS_TOLERANCE)
    assert by_weights.keys() == drawn.keys()
    for name, gradient in by_weights.items():

        def moved(x: np.ndarray, name: str = name) -> float:
            return float(np.sum(weights * theirs(query, passage, **{name: x})))

        check(
            f"{label} gradient by {name}",
            pair,
            gradient,
            numeric_gradient(moved, drawn[name]),
            LOSS_TOLERANCE,
        )
