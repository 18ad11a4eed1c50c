"""What every test may ask for: a seed that is printed, a tiny world, the collections; no GPU, no hub."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny import World, build

ROOT = Path(__file__).resolve().parents[1]

# before anything imports jax or huggingface_hub; set them yourself to run the gpu and network tests
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, with the reason, what this machine cannot run."""
    if item.get_closest_marker("network") and os.environ["HF_HUB_OFFLINE"] == "1":
        pytest.skip("needs the network: set HF_HUB_OFFLINE=0")
    if item.get_closest_marker("apple") and sys.platform != "darwin":
        pytest.skip("needs Apple Silicon")
    if item.get_closest_marker("gpu"):
        import jax

        if jax.default_backend() != "gpu":
            pytest.skip("needs a CUDA device: install the extra `cuda` and set JAX_PLATFORMS=cuda")


@pytest.fixture
def seed() -> int:
    """A fresh seed, shown when the test fails; RESONANCE_TEST_SEED=<seed> repeats it.

    .ci/run sets one: what turns a check red is the change under check, not the draw.
    """
    value = int(os.environ.get("RESONANCE_TEST_SEED") or secrets.randbits(32))
    print(f"RESONANCE_TEST_SEED={value}")
    return value


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Tiny data and a tiny sentence encoder; $RESONANCE_CACHE lies beside them."""
    made = build(tmp_path_factory.mktemp("tiny"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESONANCE_CACHE", str(made.root / "cache"))
        yield made


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of local collections: $RESONANCE_DATA, or ../shared/data beside the clone."""
    given = os.environ.get("RESONANCE_DATA")
    folder = Path(given) if given else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no collections at {folder}: set RESONANCE_DATA to a folder that has them")
    return folder
