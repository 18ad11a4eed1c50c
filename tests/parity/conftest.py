"""What the parity tests ask for: a backend by name, or both at once."""

from __future__ import annotations

import pytest

from tests.parity.backends import Backend, backend_of


@pytest.fixture(params=["jax", "mlx"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend in turn."""
    return backend_of(request.param)


@pytest.fixture
def twins() -> tuple[Backend, Backend]:
    """JAX and MLX."""
    return backend_of("jax"), backend_of("mlx")
