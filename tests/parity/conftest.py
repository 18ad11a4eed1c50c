"""What the parity tests ask for: a backend by name, or both at once; and their table."""

from __future__ import annotations

import pytest

from tests.parity.backends import FOUND, Backend, backend_of, table


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity-table", action="store_true", help="end with the table of all comparisons")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--parity-table", False) and FOUND:
        terminalreporter.section("parity: the largest |a - b| / max(1, largest |b|)")
        for line in table(FOUND):
            terminalreporter.write_line(line)


@pytest.fixture(params=["jax", "mlx"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend in turn."""
    return backend_of(request.param)


@pytest.fixture
def twins() -> tuple[Backend, Backend]:
    """JAX and MLX."""
    return backend_of("jax"), backend_of("mlx")
