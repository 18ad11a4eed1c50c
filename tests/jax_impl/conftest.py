"""The tiny world, built once, with its own cache."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.tiny import World, build


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Tiny data and a tiny sentence encoder; $RESONANCE_CACHE lies beside them."""
    made = build(tmp_path_factory.mktemp("tiny"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESONANCE_CACHE", str(made.root / "cache"))
        yield made
