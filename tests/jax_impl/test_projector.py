"""The projector's starts and the laws of resonance and fidelity."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.reference.cases import parity_error, random_states
from jax_impl.models.projector import (
    Projector,
    State,
    block_fidelity,
    fidelity_factors,
    inner,
    normalise,
    resonance,
)

D = 12


def vectors(seed: int, size: int = D) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(5, size)), jnp.float32), jnp.asarray(
        rng.normal(size=(5, size)), jnp.float32
    )


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(a * b, axis=-1) / (jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1))


def random_pair(seed: int, *shape: int) -> tuple[State, State]:
    rng = np.random.default_rng(seed)
    states = random_states(rng, *shape), random_states(rng, *shape)
    return jax.tree.map(lambda part: jnp.asarray(part, jnp.float32), states)


@pytest.mark.parametrize("imaginary_start", [0.0, 0.1, 1.0])
def test_the_cartesian_start_is_the_cosine_of_the_vectors(seed: int, imaginary_start: float) -> None:
    query, passage = vectors(seed)
    projector = Projector(D, D, imaginary_start=imaginary_start, rngs=nnx.Rngs(seed))
    r = resonance(projector(query), projector(passage))
    assert parity_error(r, cosine(query, passage)) < 1e-6


def test_a_wider_cartesian_start_keeps_the_cosine(seed: int) -> None:
    query, passage = vectors(seed)
    wide = Projector(D, 2 * D, rngs=nnx.Rngs(seed))
    assert parity_error(resonance(wide(query), wide(passage)), cosine(query, passage)) < 1e-6


def test_the_cartesian_resonance_is_the_cosine_of_a_real_head_of_twice_the_width(seed: int) -> None:
    query, passage = vectors(seed)
    projector = Projector(D, 7, imaginary_start=0.8, rngs=nnx.Rngs(seed))
    real_head = jnp.concatenate([projector.proj_re.kernel[...], projector.proj_im.kernel[...]], axis=1)
    r = resonance(projector(query), projector(passage))
    assert parity_error(r, cosine(query @ real_head, passage @ real_head)) < 1e-6


def test_the_imaginary_part_learns_unless_it_starts_at_zero(seed: int) -> None:
    query, passage = vectors(seed)

    def largest_gradient(imaginary_start: float) -> float:
        projector = Projector(D, D, imaginary_start=imaginary_start, rngs=nnx.Rngs(seed))
        gradients = nnx.grad(lambda model: resonance(model(query), model(passage))[0])(projector)
        return float(jnp.abs(gradients["proj_im"]["kernel"][...]).max())

    assert largest_gradient(0.1) > 1e-4
    assert largest_gradient(0.0) == 0.0


@pytest.mark.parametrize("parameterisation", ["cartesian", "polar"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_each_block_of_a_state_has_length_one(seed: int, parameterisation: str, blocks: int) -> None:
    projector = Projector(D, 6, parameterisation=parameterisation, blocks=blocks, rngs=nnx.Rngs(seed))
    re, im = projector(vectors(seed)[0])
    norms = jnp.sum((re**2 + im**2).reshape(5, blocks, -1), axis=-1)
    assert parity_error(norms, np.ones((5, blocks))) < 1e-6
    r = resonance((re, im), (re, im), blocks)
    assert parity_error(r, np.ones(5)) < 1e-6


def test_fidelity_is_the_product_of_overlap_and_coherence_squared(seed: int) -> None:
    psi, chi = random_pair(seed, 50, 8)
    overlap, coherence = fidelity_factors(psi, chi)
    re, im = inner(psi, chi)
    assert parity_error(overlap**2 * coherence**2, re**2 + im**2) < 1e-6
    for factor in (overlap, coherence):
        assert ((factor >= 0) & (factor <= 1 + 1e-6)).all()
    # Without phases the coherence is 1 and the fidelity is that of the magnitudes.
    magnitudes = [(jnp.abs(state[0]), 0 * state[1]) for state in (psi, chi)]
    assert parity_error(fidelity_factors(*magnitudes)[1], np.ones(50)) < 1e-6


def test_a_phase_common_to_both_states_changes_nothing_and_one_on_a_single_state_keeps_the_fidelity(
    seed: int,
) -> None:
    psi, chi = random_pair(seed, 20, 8)
    angle = np.random.default_rng(seed).uniform(0.5, 2.5)

    def turn(state: State) -> State:
        return (
            jnp.cos(angle) * state[0] - jnp.sin(angle) * state[1],
            jnp.sin(angle) * state[0] + jnp.cos(angle) * state[1],
        )

    assert parity_error(resonance(turn(psi), turn(chi)), resonance(psi, chi)) < 1e-6
    assert parity_error(resonance(turn(psi), chi), resonance(psi, chi)) > 1e-3
    for turned, kept in zip(fidelity_factors(turn(psi), chi), fidelity_factors(psi, chi), strict=True):
        assert parity_error(turned, kept) < 1e-6


def test_random_states_have_an_expected_fidelity_of_one_over_their_width(seed: int) -> None:
    pairs, width, blocks = 20_000, 12, 3
    psi, chi = random_pair(seed, pairs, width)
    overlap, coherence = fidelity_factors(psi, chi)
    fidelity = np.asarray(overlap * coherence) ** 2
    error = float(fidelity.std()) / pairs**0.5
    assert float(fidelity.mean()) == pytest.approx(1 / width, abs=6 * error)

    weights = jnp.array([0.5, 0.3, 0.2])
    in_blocks = block_fidelity(normalise(*psi, blocks), normalise(*chi, blocks), weights)
    error = float(in_blocks.std()) / pairs**0.5
    assert float(in_blocks.mean()) == pytest.approx(blocks / width, abs=6 * error)


@pytest.mark.parametrize("parameterisation", ["cartesian", "polar"])
def test_a_zero_vector_has_finite_values_and_gradients(seed: int, parameterisation: str) -> None:
    projector = Projector(D, D, parameterisation=parameterisation, rngs=nnx.Rngs(seed))
    query = vectors(seed)[0].at[0].set(0.0)

    def everything(model: Projector, a: jax.Array, b: jax.Array) -> jax.Array:
        psi, chi = model(a), model(b)
        overlap, coherence = fidelity_factors(psi, chi)
        return jnp.sum(resonance(psi, chi) + overlap + coherence)

    for other in (query, jnp.zeros_like(query)):
        value, gradients = nnx.value_and_grad(everything, argnums=(0, 1, 2))(projector, query, other)
        assert np.isfinite(value)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_a_wrong_setting_is_named() -> None:
    with pytest.raises(ValueError, match="allowed: cartesian, polar"):
        Projector(D, D, parameterisation="spherical", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="state_size 12 is not a multiple of blocks 5"):
        Projector(D, 12, blocks=5, rngs=nnx.Rngs(0))
