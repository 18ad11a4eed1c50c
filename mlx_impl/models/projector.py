"""The phase/magnitude projector: a real vector to a complex state, and the resonance of two states.

Complex numbers are two real arrays; no angle is taken back out.
Reference: common/reference/projector.py. Twin: jax_impl/models/projector.py.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from mlx_impl.models.layers import Linear, Rngs, orthogonal

State = tuple[mx.array, mx.array]

# Inside every root, so that a zero vector has a finite gradient.
EPSILON = 1e-12


class Projector(nn.Module):
    """Map [..., D] to a normalised state of C complex amplitudes, (re, im) each [..., C], in float32.

    cartesian: Z = (A h, B h), no biases. It starts with A = I and B = `imaginary_start` times an orthogonal
    matrix, so at C = D the resonance of two states is the cosine of their vectors. With `imaginary_start` 0,
    B has a zero gradient under r and stays 0: the real control.
    polar: Z = m e^{i phi}, m = softplus(W_m h + b_m), phi = pi tanh(W_p h + b_p).
    real: Z = W h, real of width 2C, its halves where re and im stand, so that r is the cosine. It starts as
    the cartesian one: the control that has no complex number in it.
    `blocks` cuts C into equal blocks, each normalised.
    """

    def __init__(
        self,
        hidden_size: int,
        state_size: int,
        *,
        parameterisation: str = "cartesian",
        blocks: int = 1,
        imaginary_start: float = 0.1,
        rngs: Rngs,
    ) -> None:
        super().__init__()
        if state_size % blocks:
            raise ValueError(f"state_size {state_size} is not a multiple of blocks {blocks}")
        self.parameterisation, self.blocks = parameterisation, blocks
        if parameterisation == "cartesian":
            self.proj_re = Linear(hidden_size, state_size, use_bias=False, rngs=rngs)
            self.proj_im = Linear(hidden_size, state_size, use_bias=False, rngs=rngs)
            shape = (state_size, hidden_size)
            square = hidden_size == state_size
            self.proj_re.weight = mx.eye(state_size) if square else orthogonal(rngs.params(), shape)
            self.proj_im.weight = imaginary_start * orthogonal(rngs.params(), shape)
        elif parameterisation == "polar":
            self.magnitude = Linear(hidden_size, state_size, rngs=rngs)
            self.phase = Linear(hidden_size, state_size, rngs=rngs)
        elif parameterisation == "real":
            start = Projector(hidden_size, state_size, imaginary_start=imaginary_start, rngs=rngs)
            both = [start.proj_re.weight, start.proj_im.weight]
            self.proj = Linear(hidden_size, 2 * state_size, use_bias=False, rngs=Rngs(0))
            self.proj.weight = mx.concatenate(both, axis=0)
        else:
            raise ValueError(f"parameterisation is {parameterisation!r}; allowed: cartesian, polar, real")

    def __call__(self, hidden: mx.array) -> State:
        return normalise(*self.amplitudes(hidden), self.blocks)

    def amplitudes(self, hidden: mx.array) -> State:
        """Z before it is normalised, (re, im) each [..., C]."""
        if self.parameterisation == "cartesian":
            return self.proj_re(hidden), self.proj_im(hidden)
        if self.parameterisation == "real":
            first, second = mx.split(self.proj(hidden), 2, axis=-1)  # [..., C] each
            return first, second
        magnitude = nn.softplus(self.magnitude(hidden))  # [..., C]
        phase = math.pi * mx.tanh(self.phase(hidden))  # [..., C]
        return magnitude * mx.cos(phase), magnitude * mx.sin(phase)


def normalise(re: mx.array, im: mx.array, blocks: int = 1) -> State:
    """Z / sqrt(|Z|^2 + eps) in each of `blocks` equal blocks of the last axis; [..., C] -> [..., C]."""
    shape = re.shape
    re = re.astype(mx.float32).reshape(*shape[:-1], blocks, -1)  # [..., G, C/G]
    im = im.astype(mx.float32).reshape(*shape[:-1], blocks, -1)  # [..., G, C/G]
    norm = mx.sqrt(mx.sum(re**2 + im**2, axis=-1, keepdims=True) + EPSILON)  # [..., G, 1]
    return (re / norm).reshape(shape), (im / norm).reshape(shape)


def inner(psi: State, chi: State) -> State:
    """<psi|chi> as (re, im), [..., C] -> [...]."""
    re = mx.sum(psi[0] * chi[0] + psi[1] * chi[1], axis=-1)
    im = mx.sum(psi[0] * chi[1] - psi[1] * chi[0], axis=-1)
    return re, im


def resonance(psi: State, chi: State, blocks: int = 1) -> mx.array:
    """r = Re<psi|chi>, the mean over blocks; [..., C] -> [...] in [-1, 1]."""
    return inner(psi, chi)[0] / blocks


def fidelity_factors(psi: State, chi: State) -> tuple[mx.array, mx.array]:
    """(BC, R) in [0, 1], magnitude overlap and phase coherence: |<psi|chi>| = BC R; [..., C] -> [...]."""
    psi_magnitude = mx.sqrt(psi[0] ** 2 + psi[1] ** 2 + EPSILON)  # [..., C]
    chi_magnitude = mx.sqrt(chi[0] ** 2 + chi[1] ** 2 + EPSILON)  # [..., C]
    overlap = mx.sum(psi_magnitude * chi_magnitude, axis=-1)  # [...]
    re, im = inner(psi, chi)
    # eps^2 here keeps R <= 1: the overlap above is at least C eps larger than the true one.
    return overlap, mx.sqrt(re**2 + im**2 + EPSILON**2) / overlap


def block_fidelity(psi: State, chi: State, weights: mx.array) -> mx.array:
    """F_w = sum_g w_g F_g over blocks, each normalised; weights [G] on the simplex; [..., C] -> [...]."""
    shape = (*psi[0].shape[:-1], weights.shape[0], -1)
    re, im = inner(
        (psi[0].reshape(shape), psi[1].reshape(shape)), (chi[0].reshape(shape), chi[1].reshape(shape))
    )  # [..., G]
    return mx.sum(weights * (re**2 + im**2), axis=-1)
