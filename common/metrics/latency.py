"""How long something takes, as a service's users feel it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PERCENTILES = (50, 95, 99)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 of durations, in milliseconds."""
    values = np.percentile(np.asarray(seconds) * 1e3, PERCENTILES)
    return {f"p{part}": float(value) for part, value in zip(PERCENTILES, values, strict=True)}
