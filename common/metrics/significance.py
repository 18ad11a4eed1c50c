"""Is a difference real? Paired randomisation test and bootstrap intervals over queries.

Smucker, Allan, Carterette 2007, A Comparison of Statistical Significance Tests for IR Evaluation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

_EXACT = 13  # queries, up to which all signs are fewer than the usual draws
_CELLS = 4_000_000  # random numbers held at a time


def paired_randomisation(a: ArrayLike, b: ArrayLike, n: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value, in (0, 1], that paired values a [Q] and b [Q] have the same mean.

    Under the null hypothesis the sign of each query's difference is a coin toss; p is the share of n such
    tosses (and of the observed one) whose mean is at least as far from 0, up to 13 queries the share of all
    2^Q. Equal inputs give 1.
    """
    difference = _paired(a, b)
    observed = abs(difference.sum()) - 1e-12 * np.abs(difference).sum()
    if len(difference) <= _EXACT:
        every = np.array(list(itertools.product((-1.0, 1.0), repeat=len(difference))))  # [2^Q, Q]
        return float(np.mean(np.abs(every @ difference) >= observed))
    rng = np.random.default_rng(seed)
    extreme = 0
    for rows in _chunks(n, len(difference)):
        signs = rng.integers(0, 2, size=(rows, len(difference)), dtype=np.int8) * 2.0 - 1.0
        extreme += int(np.count_nonzero(np.abs(signs @ difference) >= observed))
    return (extreme + 1) / (n + 1)


def randomisation_draws(queries: int, n: int = 10_000) -> str:
    """What `paired_randomisation` of so many queries counts, in words for a table's note."""
    return f"all {2**queries:,} signs" if queries <= _EXACT else f"{n:,} draws"


def bootstrap_interval(
    a: ArrayLike, b: ArrayLike | None = None, n: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval (low, high) of the mean of a [Q], or of a - b when b [Q] is given."""
    values = np.asarray(a, np.float64) if b is None else _paired(a, b)
    if values.size == 0:
        raise ValueError("no queries to draw from")
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [
            values[rng.integers(0, len(values), size=(rows, len(values)))].mean(axis=1)
            for rows in _chunks(n, len(values))
        ]
    )
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return float(low), float(high)


def _paired(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"paired values need one shape [Q], got {first.shape} and {second.shape}")
    if first.size == 0:
        raise ValueError("no queries to compare")
    return first - second


def _chunks(n: int, width: int) -> Iterator[int]:
    step = max(1, _CELLS // max(1, width))
    for start in range(0, n, step):
        yield min(step, n - start)
