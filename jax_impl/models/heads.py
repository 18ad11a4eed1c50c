"""The heads: what the score makes of the states of query and passage, one number that gamma multiplies.

Each is an amplitude: the square of its positive part is the fidelity that the resonance term reads.
Reference: common/reference/projector.py. Twin: mlx_impl/models/heads.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from common.config import FIDELITY_BLOCKS
from jax_impl.models.projector import (
    EPSILON,
    State,
    block_fidelity,
    fidelity_factors,
    inner,
    normalise,
    resonance,
)

Compare = Callable[[State, State], jax.Array]  # two states, each part [..., C] -> [...]


def nothing(psi: State, chi: State) -> jax.Array:
    """0 for any two states: the score is that of [CLS] alone."""
    return jnp.zeros_like(psi[0][..., 0])


def root_fidelity(psi: State, chi: State) -> jax.Array:
    """|<psi|chi>| in [0, 1]; its gradient at 0 is 0."""
    re, im = inner(psi, chi)
    return jnp.sqrt(re**2 + im**2 + EPSILON**2)


def overlap(psi: State, chi: State) -> jax.Array:
    """BC in [0, 1], the inner product of the magnitudes: |<psi|chi>| if the phases agreed."""
    return fidelity_factors(psi, chi)[0]


class BlockFidelity(nnx.Module):
    """sqrt(F_w) in [0, 1], F_w = sum_g w_g F_g over blocks of the states, each normalised here.

    w = softmax(`logits`) starts equal. With one block it is root_fidelity; its gradient at 0 is 0.
    """

    def __init__(self) -> None:
        self.logits = nnx.Param(jnp.zeros(FIDELITY_BLOCKS))

    def __call__(self, psi: State, chi: State) -> jax.Array:
        weights = jax.nn.softmax(self.logits[...])  # [G]
        blocks = weights.shape[0]
        fidelity = block_fidelity(normalise(*psi, blocks), normalise(*chi, blocks), weights)  # [...]
        return jnp.sqrt(fidelity + EPSILON**2)


# model.head -> what it changes of the projector, and what makes its function of two states
HEADS: dict[str, tuple[dict[str, Any], Callable[[], Compare]]] = {
    "resonance": ({}, lambda: resonance),
    "cls": ({}, lambda: nothing),
    "real": ({"parameterisation": "real"}, lambda: resonance),
    "real_part": ({"imaginary_start": 0.0}, lambda: resonance),
    "root_fidelity": ({}, lambda: root_fidelity),
    "block_fidelity": ({}, BlockFidelity),
    "overlap": ({}, lambda: overlap),
}
