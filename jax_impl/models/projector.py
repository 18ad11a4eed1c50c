"""The phase/magnitude projector: a real vector to a complex state, and the resonance of two states.

Complex numbers are two real arrays; no angle is taken back out.
Reference: common/reference/projector.py. Twin: mlx_impl/models/projector.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

State = tuple[jax.Array, jax.Array]

# Inside every root, so that a zero vector has a finite gradient.
EPSILON = 1e-12


class Projector(nnx.Module):
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
        rngs: nnx.Rngs,
    ) -> None:
        if state_size % blocks:
            raise ValueError(f"state_size {state_size} is not a multiple of blocks {blocks}")
        self.parameterisation, self.blocks = parameterisation, blocks
        if parameterisation == "cartesian":
            self.proj_re = nnx.Linear(hidden_size, state_size, use_bias=False, rngs=rngs)
            self.proj_im = nnx.Linear(hidden_size, state_size, use_bias=False, rngs=rngs)
            orthogonal = nnx.initializers.orthogonal()
            shape = (hidden_size, state_size)
            square = hidden_size == state_size
            self.proj_re.kernel[...] = jnp.eye(state_size) if square else orthogonal(rngs.params(), shape)
            self.proj_im.kernel[...] = imaginary_start * orthogonal(rngs.params(), shape)
        elif parameterisation == "polar":
            self.magnitude = nnx.Linear(hidden_size, state_size, rngs=rngs)
            self.phase = nnx.Linear(hidden_size, state_size, rngs=rngs)
        elif parameterisation == "real":
            start = Projector(hidden_size, state_size, imaginary_start=imaginary_start, rngs=rngs)
            both = start.proj_re.kernel[...], start.proj_im.kernel[...]
            self.proj = nnx.Linear(hidden_size, 2 * state_size, use_bias=False, rngs=nnx.Rngs(0))
            self.proj.kernel[...] = jnp.concatenate(both, axis=1)
        else:
            raise ValueError(f"parameterisation is {parameterisation!r}; allowed: cartesian, polar, real")

    def __call__(self, hidden: jax.Array) -> State:
        return normalise(*self.amplitudes(hidden), self.blocks)

    def amplitudes(self, hidden: jax.Array) -> State:
        """Z before it is normalised, (re, im) each [..., C]."""
        if self.parameterisation == "cartesian":
            return self.proj_re(hidden), self.proj_im(hidden)
        if self.parameterisation == "real":
            first, second = jnp.split(self.proj(hidden), 2, axis=-1)  # [..., C] each
            return first, second
        magnitude = jax.nn.softplus(self.magnitude(hidden))  # [..., C]
        phase = jnp.pi * jnp.tanh(self.phase(hidden))  # [..., C]
        return magnitude * jnp.cos(phase), magnitude * jnp.sin(phase)


def normalise(re: jax.Array, im: jax.Array, blocks: int = 1) -> State:
    """Z / sqrt(|Z|^2 + eps) in each of `blocks` equal blocks of the last axis; [..., C] -> [..., C]."""
    shape = re.shape
    re = re.astype(jnp.float32).reshape(*shape[:-1], blocks, -1)  # [..., G, C/G]
    im = im.astype(jnp.float32).reshape(*shape[:-1], blocks, -1)  # [..., G, C/G]
    norm = jnp.sqrt(jnp.sum(re**2 + im**2, axis=-1, keepdims=True) + EPSILON)  # [..., G, 1]
    return (re / norm).reshape(shape), (im / norm).reshape(shape)


def inner(psi: State, chi: State) -> State:
    """<psi|chi> as (re, im), [..., C] -> [...]."""
    re = jnp.sum(psi[0] * chi[0] + psi[1] * chi[1], axis=-1)
    im = jnp.sum(psi[0] * chi[1] - psi[1] * chi[0], axis=-1)
    return re, im


def resonance(psi: State, chi: State, blocks: int = 1) -> jax.Array:
    """r = Re<psi|chi>, the mean over blocks; [..., C] -> [...] in [-1, 1]."""
    return inner(psi, chi)[0] / blocks


def fidelity_factors(psi: State, chi: State) -> tuple[jax.Array, jax.Array]:
    """(BC, R) in [0, 1], magnitude overlap and phase coherence: |<psi|chi>| = BC R; [..., C] -> [...]."""
    psi_magnitude = jnp.sqrt(psi[0] ** 2 + psi[1] ** 2 + EPSILON)  # [..., C]
    chi_magnitude = jnp.sqrt(chi[0] ** 2 + chi[1] ** 2 + EPSILON)  # [..., C]
    overlap = jnp.sum(psi_magnitude * chi_magnitude, axis=-1)  # [...]
    re, im = inner(psi, chi)
    # eps^2 here keeps R <= 1: the overlap above is at least C eps larger than the true one.
    return overlap, jnp.sqrt(re**2 + im**2 + EPSILON**2) / overlap


def block_fidelity(psi: State, chi: State, weights: jax.Array) -> jax.Array:
    """F_w = sum_g w_g F_g over blocks, each normalised; weights [G] on the simplex; [..., C] -> [...]."""
    shape = (*psi[0].shape[:-1], weights.shape[0], -1)
    re, im = inner(
        (psi[0].reshape(shape), psi[1].reshape(shape)), (chi[0].reshape(shape), chi[1].reshape(shape))
    )  # [..., G]
    return jnp.sum(weights * (re**2 + im**2), axis=-1)
