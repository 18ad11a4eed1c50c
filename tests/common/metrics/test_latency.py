"""Percentiles of durations, in milliseconds."""

from __future__ import annotations

import pytest

from common.metrics.latency import percentiles


def test_percentiles_are_milliseconds() -> None:
    found = percentiles([n / 100 for n in range(101)])  # 0 to 1 second
    assert found == pytest.approx({"p50": 500.0, "p95": 950.0, "p99": 990.0})
