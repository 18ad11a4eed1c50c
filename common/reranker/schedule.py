"""Superposition to collapse to resonance: the loss settings as a function of training progress.

A pure function on the host, so that both backends pass the same three scalars into their steps.
"""

from __future__ import annotations

from dataclasses import dataclass

PHASES = ("superposition", "collapse", "resonance", "auto")
# Where `auto` begins to collapse and where it reaches resonance, as shares of the steps.
AUTO_COLLAPSE, AUTO_RESONANCE = 0.2, 0.5


@dataclass(frozen=True)
class Phase:
    """What the quantum losses need to know about the moment of training."""

    temperature: float  # tau of p = softmax(s / tau), > 0
    entropy_bonus: float  # beta of -beta * H(p), >= 0
    ramp: float  # factor on the resonance and entanglement weights, in [0, 1]


def phase_at(
    progress: float, phase: str = "auto", *, tau0: float = 2.0, tau1: float = 1.0, beta: float = 0.1
) -> Phase:
    """The phase at `progress` in [0, 1], the share of the steps already taken.

    superposition: (tau0, beta, 0). collapse: tau falls geometrically to tau1, beta linearly to 0, the ramp
    rises linearly to 1. resonance: (tau1, 0, 1). auto: the three in turn, at 0, 20 and 50 % of the steps.
    Raises ValueError for an unknown phase, a progress outside [0, 1] or a temperature that is not positive.
    """
    if phase not in PHASES:
        raise ValueError(f"phase is {phase!r}; allowed: {', '.join(PHASES)}")
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress is {progress}; it must lie in [0, 1]")
    if tau0 <= 0.0 or tau1 <= 0.0:
        raise ValueError(f"tau0 is {tau0} and tau1 is {tau1}; both must be > 0")
    collapsed = _collapsed(progress, phase)
    return Phase(tau0 * (tau1 / tau0) ** collapsed, beta * (1.0 - collapsed), collapsed)


def openness_at(progress: float, share: float) -> float:
    """How far attention between query and passage is open, in [0, 1]: linearly over the first `share` of the
    steps, `progress` of which are taken; 1 throughout when `share` is 0."""
    return min(1.0, progress / share) if share else 1.0


def _collapsed(progress: float, phase: str) -> float:
    """How far the collapse has gone, from 0 (superposition) to 1 (resonance)."""
    if phase == "superposition":
        return 0.0
    if phase == "resonance":
        return 1.0
    if phase == "collapse":
        return progress
    return min(1.0, max(0.0, (progress - AUTO_COLLAPSE) / (AUTO_RESONANCE - AUTO_COLLAPSE)))
