"""The phase/magnitude projector, the resonance of two states and the heads, in float64 NumPy.

A state is a pair (re, im) of real arrays [..., C]. Twins: {jax_impl,mlx_impl}/models/{projector,heads}.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
State = tuple[Array, Array]

# Inside every root, so that a zero vector has a finite gradient.
EPSILON = 1e-12


def cartesian(hidden: Array, kernel_re: Array, kernel_im: Array, blocks: int = 1) -> State:
    """Z = (A h, B h), normalised: hidden [..., D], kernels [D, C] -> state [..., C]."""
    return normalise(hidden @ kernel_re, hidden @ kernel_im, blocks)


def polar(
    hidden: Array,
    magnitude_kernel: Array,
    magnitude_bias: Array,
    phase_kernel: Array,
    phase_bias: Array,
    blocks: int = 1,
) -> State:
    """Z = m e^{i phi}, normalised: m = softplus(W_m h + b_m), phi = pi tanh(W_p h + b_p) -> [..., C]."""
    magnitude = np.logaddexp(0.0, hidden @ magnitude_kernel + magnitude_bias)
    phase = np.pi * np.tanh(hidden @ phase_kernel + phase_bias)
    return normalise(magnitude * np.cos(phase), magnitude * np.sin(phase), blocks)


def real(hidden: Array, kernel: Array, blocks: int = 1) -> State:
    """A real projection of width 2C, normalised, its halves as (re, im): kernel [D, 2C] -> state [..., C]."""
    first, second = np.split(hidden @ kernel, 2, axis=-1)
    return normalise(first, second, blocks)


def normalise(re: Any, im: Any, blocks: int = 1) -> State:
    """Z / sqrt(|Z|^2 + eps) in each of `blocks` equal blocks of the last axis; [..., C] -> [..., C]."""
    re, im = np.asarray(re, np.float64), np.asarray(im, np.float64)
    shape = re.shape
    re, im = (part.reshape(*shape[:-1], blocks, -1) for part in (re, im))
    norm = np.sqrt(np.sum(re**2 + im**2, axis=-1, keepdims=True) + EPSILON)
    return (re / norm).reshape(shape), (im / norm).reshape(shape)


def inner(psi: State, chi: State) -> State:
    """<psi|chi> as (re, im), [..., C] -> [...]."""
    re = np.sum(psi[0] * chi[0] + psi[1] * chi[1], axis=-1)
    im = np.sum(psi[0] * chi[1] - psi[1] * chi[0], axis=-1)
    return re, im


def resonance(psi: State, chi: State, blocks: int = 1) -> Array:
    """r = Re<psi|chi>, the mean over blocks; [..., C] -> [...] in [-1, 1]."""
    return inner(psi, chi)[0] / blocks


def fidelity_factors(psi: State, chi: State) -> tuple[Array, Array]:
    """(BC, R) in [0, 1], magnitude overlap and phase coherence: |<psi|chi>| = BC R; [..., C] -> [...]."""
    overlap = np.sum(
        np.sqrt(psi[0] ** 2 + psi[1] ** 2 + EPSILON) * np.sqrt(chi[0] ** 2 + chi[1] ** 2 + EPSILON), axis=-1
    )
    re, im = inner(psi, chi)
    return overlap, np.sqrt(re**2 + im**2 + EPSILON**2) / overlap


def block_fidelity(psi: State, chi: State, weights: Array) -> Array:
    """F_w = sum_g w_g F_g over blocks, each normalised; weights [G] on the simplex; [..., C] -> [...]."""
    shape = (*psi[0].shape[:-1], len(weights), -1)
    re, im = inner(
        (psi[0].reshape(shape), psi[1].reshape(shape)), (chi[0].reshape(shape), chi[1].reshape(shape))
    )
    return np.sum(weights * (re**2 + im**2), axis=-1)


def root_fidelity(psi: State, chi: State) -> Array:
    """|<psi|chi>|, [..., C] -> [...] in [0, 1]."""
    re, im = inner(psi, chi)
    return np.sqrt(re**2 + im**2 + EPSILON**2)


def root_block_fidelity(psi: State, chi: State, logits: Array) -> Array:
    """sqrt(F_w) of blocks normalised here, w = softmax(logits [G]); [..., C] -> [...] in [0, 1]."""
    weights = np.exp(logits - logits.max())
    blocks = len(weights)
    fidelity = block_fidelity(normalise(*psi, blocks), normalise(*chi, blocks), weights / weights.sum())
    return np.sqrt(fidelity + EPSILON**2)


# model.head -> the number that gamma multiplies, of two states and, where weights are learned, their logits
HEADS: dict[str, Callable[..., Array]] = {
    "resonance": resonance,
    "cls": lambda psi, chi: np.zeros(psi[0].shape[:-1]),
    "real": resonance,
    "real_part": resonance,
    "root_fidelity": root_fidelity,
    "block_fidelity": root_block_fidelity,
    "overlap": lambda psi, chi: fidelity_factors(psi, chi)[0],
}
