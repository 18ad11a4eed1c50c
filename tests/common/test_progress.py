"""Progress: what a log file gets to see."""

from __future__ import annotations

import pytest

from common import progress as module
from common.progress import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as its only element."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_long_work_prints_lines_with_an_estimate_and_its_end(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with progress(12, "training", start=2) as bar:
        for step in range(3, 13):
            clock[0] += 10
            bar.update(step, f"loss {step}")
    lines = capsys.readouterr().err.splitlines()
    # the first update, which compiles, does not count: 10 s a step
    assert lines[0] == "training 4/12  1:20 left  loss 4"
    assert len(lines) == 5 and lines[-1] == "training 12/12  loss 12"


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with progress(3000, "pairs") as bar:
        for _ in range(3):
            clock[0] += 5
            bar.advance(1000)
    assert capsys.readouterr().err == ""


def test_counts_add_up(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with progress(3000, "pairs") as bar:
        for _ in range(3):
            clock[0] += 30
            bar.advance(1000)
    assert capsys.readouterr().err.splitlines() == [
        "pairs 1,000/3,000",
        "pairs 2,000/3,000  0:30 left",
        "pairs 3,000/3,000",
    ]
