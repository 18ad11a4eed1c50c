"""The phases of training: superposition, collapse, resonance, and the walk through them."""

from __future__ import annotations

import itertools

import pytest

from common.reranker.schedule import Phase, openness_at, phase_at


def test_auto_walks_through_the_three_phases_at_0_20_50_and_100_percent() -> None:
    assert phase_at(0.0) == phase_at(0.2) == Phase(2.0, 0.1, 0.0)
    halfway = phase_at(0.35)
    assert halfway.temperature == pytest.approx(2.0**0.5)
    assert (halfway.entropy_bonus, halfway.ramp) == (pytest.approx(0.05), pytest.approx(0.5))
    assert phase_at(0.5) == phase_at(1.0) == Phase(1.0, 0.0, 1.0)


def test_a_fixed_phase_keeps_its_settings_and_collapse_spans_the_whole_run() -> None:
    settings = {"tau0": 4.0, "tau1": 0.5, "beta": 0.3}
    for progress in (0.0, 0.4, 1.0):
        assert phase_at(progress, "superposition", **settings) == Phase(4.0, 0.3, 0.0)
        assert phase_at(progress, "resonance", **settings) == Phase(0.5, 0.0, 1.0)
    temperatures = [phase_at(step / 10, "collapse", **settings).temperature for step in range(11)]
    assert (temperatures[0], temperatures[-1]) == (4.0, 0.5)
    ratios = [b / a for a, b in itertools.pairwise(temperatures)]
    assert ratios == pytest.approx([ratios[0]] * 10)  # geometric


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"progress": 0.5, "phase": "decoherence"}, "allowed: superposition, collapse, resonance, auto"),
        ({"progress": 1.5}, r"progress is 1.5; it must lie in \[0, 1\]"),
        ({"progress": 0.5, "tau1": 0.0}, "both must be > 0"),
    ],
)
def test_a_wrong_setting_is_named(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        phase_at(**arguments)  # type: ignore[arg-type]


def test_a_separable_start_opens_linearly_over_its_share_and_stays_open() -> None:
    assert [openness_at(progress, 0.4) for progress in (0.0, 0.1, 0.4, 0.9)] == [0.0, 0.25, 1.0, 1.0]
    assert openness_at(0.0, 0.0) == 1.0
