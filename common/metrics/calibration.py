"""Confidence that the top passage is relevant (logistic, then isotonic regression) and how good it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

ISOTONIC_FROM = 1000  # events; a step function learns the noise of fewer (Niculescu-Mizil and Caruana 2005)


def confidence_features(
    scores: ArrayLike, resonance: ArrayLike, temperature: float = 1.0, best: int | None = None
) -> Array:
    """[3] for one query's candidates [L], p = softmax(s/temperature): normalised entropy of p in [0, 1],
    margin of the two highest p in [0, 1], resonance of the top one in [-1, 1]. One candidate: (0, 1, r).
    With `best`, only so many candidates count, those with the highest scores: entropy and margin depend on
    the length of a list."""
    values = np.asarray(scores, np.float64) / temperature
    if values.size == 0:
        raise ValueError("a query without candidates has no confidence")
    top = float(np.asarray(resonance, np.float64)[int(np.argmax(values))])
    if values.size == 1:
        return np.array([0.0, 1.0, top])
    values = np.sort(values)[-best:] if best else values
    p = np.exp(values - values.max())
    p /= p.sum()
    entropy = -float(np.sum(p * np.log(np.maximum(p, 1e-300)))) / np.log(values.size)
    second, first = np.partition(p, -2)[-2:]
    return np.array([entropy, first - second, top])


@dataclass(frozen=True)
class Confidence:
    """A fitted map from features [N, F] to a probability; plain numbers, so that it can be stored as JSON."""

    centre: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float
    logits: tuple[float, ...]  # knots of the isotonic step, rising; none for the logistic curve
    levels: tuple[float, ...]  # its values at the knots, in (0, 1); the logistic curve's least and greatest
    candidates: int  # of each list that it was fitted on

    @classmethod
    def fit(cls, features: ArrayLike, correct: ArrayLike, candidates: int, ridge: float = 1.0) -> Confidence:
        """Fit on features [N, F] of lists of `candidates` and events [N] (1: the top passage is relevant).

        The curve is the logistic one, and from ISOTONIC_FROM events a rising step function of the same logit.
        `ridge` > 0 holds the weights of standardised features finite; N events never give a level nearer to 0
        or 1 than 1/(N + 2), Laplace's rule. Raises ValueError without both kinds of event.
        """
        x, y = np.asarray(features, np.float64), np.asarray(correct, np.float64)
        if x.ndim != 2 or y.shape != x.shape[:1]:
            raise ValueError(f"features [N, F] and events [N] do not fit: {x.shape} and {y.shape}")
        if y.size == 0 or y.min() == y.max():
            raise ValueError("confidence needs queries whose top passage is relevant and others whose is not")
        centre, scale = x.mean(axis=0), x.std(axis=0)
        scale[scale < 1e-12] = 1.0
        weights, bias = _logistic((x - centre) / scale, y, ridge)
        logits, levels = np.zeros(0), np.array([0.0, 1.0])
        if y.size >= ISOTONIC_FROM:
            logits, levels = _isotonic((x - centre) / scale @ weights + bias, y)
        levels = np.clip(levels, 1.0 / (y.size + 2), 1.0 - 1.0 / (y.size + 2))
        numbers = [tuple(map(float, column)) for column in (centre, scale, weights, logits, levels)]
        return cls(numbers[0], numbers[1], numbers[2], bias, numbers[3], numbers[4], candidates)

    def of(self, scores: ArrayLike, resonance: ArrayLike) -> float | None:
        """Probability that the top of one query's candidates [L] is relevant; of a longer list than it was
        fitted on the best count. None for less than half as many: nothing is known of so short lists."""
        if 2 * np.size(scores) < self.candidates:
            return None
        return float(self.predict(confidence_features(scores, resonance, best=self.candidates)[None])[0])

    def predict(self, features: ArrayLike) -> Array:
        """Probability [N] in (0, 1) for features [N, F]; between the knots it is interpolated."""
        x = (np.asarray(features, np.float64) - np.array(self.centre)) / np.array(self.scale)
        logit = x @ np.array(self.weights) + self.bias
        if self.logits:
            return np.asarray(np.interp(logit, self.logits, self.levels))
        low, high = self.levels
        return np.clip(0.5 * (1.0 + np.tanh(0.5 * logit)), low, high)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Confidence:
        numbers = {"bias": float(stored["bias"]), "candidates": int(stored["candidates"])}
        return cls(**numbers, **{key: tuple(value) for key, value in stored.items() if key not in numbers})  # type: ignore[arg-type]


def reliability(probability: ArrayLike, correct: ArrayLike, bins: int = 15) -> Array:
    """[bins, 3], a row (mean confidence, accuracy, queries) for each bin of equally many queries, by rising
    confidence; empty bins are left out. Raises ValueError without queries."""
    p, y = np.asarray(probability, np.float64), np.asarray(correct, np.float64)
    if p.size == 0:
        raise ValueError("no queries to calibrate on")
    parts = [part for part in np.array_split(np.argsort(p, kind="stable"), bins) if part.size]
    return np.array([[p[part].mean(), y[part].mean(), part.size] for part in parts])


def expected_calibration_error(probability: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """Mean |confidence - accuracy| in [0, 1] over `bins` bins that hold equally many queries."""
    confidence, accuracy, queries = reliability(probability, correct, bins).T
    return float(np.sum(np.abs(confidence - accuracy) * queries) / queries.sum())


def auroc(score: ArrayLike, correct: ArrayLike) -> float:
    """Chance in [0, 1] that a correct case scores above another, ties count half; NaN without both kinds."""
    from scipy.stats import rankdata

    s, y = np.asarray(score, np.float64), np.asarray(correct, bool)
    positives, others = int(y.sum()), int((~y).sum())
    if positives == 0 or others == 0:
        return float("nan")
    return float((rankdata(s)[y].sum() - positives * (positives + 1) / 2) / (positives * others))


def _logistic(x: Array, y: Array, ridge: float) -> tuple[Array, float]:
    """Minimise sum log(1 + e^z) - y z + ridge/2 |w|^2, z = x w + b."""
    from scipy.optimize import minimize

    design = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    penalty = np.full(design.shape[1], ridge)
    penalty[-1] = 0.0

    def loss(w: Array) -> tuple[float, Array]:
        z = design @ w
        value = float(np.sum(np.logaddexp(0.0, z) - y * z) + 0.5 * np.sum(penalty * w * w))
        return value, design.T @ (0.5 * (1.0 + np.tanh(0.5 * z)) - y) + penalty * w

    solution = minimize(loss, np.zeros(design.shape[1]), jac=True, method="L-BFGS-B").x
    return solution[:-1], float(solution[-1])


def _isotonic(x: Array, y: Array) -> tuple[Array, Array]:
    """Rising least-squares fit of y on x; equal x share one knot, only the ends of flat parts are kept."""
    from scipy.optimize import isotonic_regression

    knots, place = np.unique(x, return_inverse=True)
    weight = np.bincount(place).astype(np.float64)
    fitted = isotonic_regression(np.bincount(place, weights=y) / weight, weights=weight).x
    keep = np.ones(len(knots), bool)
    keep[1:-1] = (fitted[1:-1] != fitted[:-2]) | (fitted[1:-1] != fitted[2:])
    return knots[keep], np.clip(fitted[keep], 0.0, 1.0)
