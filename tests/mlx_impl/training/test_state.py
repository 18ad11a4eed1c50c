"""MLX's training state on disk: exact, whole, the last two kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="needs MLX: install the extra `mlx`")

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from common.checkpoint import read_tensors
from common.config import ModelConfig, TrainConfig
from common.errors import UserError
from mlx_impl.loading import load_cross_encoder
from mlx_impl.training.optimizer import make_optimizer
from mlx_impl.training.state import StateFolder
from mlx_impl.training.step import TrainState
from tests.tiny import write_base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


def state_after(base: Path, steps: int, seed: int = 0) -> TrainState:
    """A model that random gradients have moved."""
    model = load_cross_encoder(base, ModelConfig(), seed=seed).model
    state = TrainState(model, make_optimizer(TrainConfig(), 10))
    state.optimizer.init(model.trainable_parameters())
    for step in range(steps):
        key = mx.random.key(step)
        gradients = tree_map(lambda x, key=key: mx.random.normal(x.shape, key=key), model.parameters())
        state.optimizer.update(model, gradients)
    return state


def arrays(state: TrainState) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(state.arrays())}


def assert_same(a: TrainState, b: TrainState) -> None:
    ours, theirs = arrays(a), arrays(b)
    assert ours.keys() == theirs.keys() and int(a.step) == int(b.step)
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
        assert value.dtype == theirs[name].dtype, name


def test_a_state_comes_back_bit_for_bit_with_its_notes(base: Path, tmp_path: Path) -> None:
    notes = {"best": 0.123456789012345, "best_step": None, "data": {"next_index": 7}, "collapsed": 0}
    states = StateFolder(tmp_path / "state")
    assert states.latest() is None
    saved = state_after(base, 3)
    states.save(saved, notes)
    fresh = state_after(base, 0, seed=1)
    containers = [id(part) for part in fresh.arrays()[1]["states"]]
    loaded, found = StateFolder(tmp_path / "state").load(fresh)
    assert found == notes
    assert_same(loaded, saved)
    # what a compiled step has captured is filled, not replaced
    assert [id(part) for part in loaded.arrays()[1]["states"]] == containers
    assert int(loaded.step) == 3


def test_the_last_two_are_kept_and_a_step_is_written_once(base: Path, tmp_path: Path) -> None:
    states = StateFolder(tmp_path / "state")
    for step in (1, 2, 4):
        states.save(state_after(base, step), {"step": step})
    states.save(state_after(base, 4), {"step": "again"})
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["2", "4"]
    assert states.load(state_after(base, 0))[1] == {"step": 4}


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "notes.json"])
def test_a_torn_state_is_named_and_the_one_before_loads_without_it(
    base: Path, tmp_path: Path, file: str
) -> None:
    states = StateFolder(tmp_path / "state")
    for step in (2, 4):
        states.save(state_after(base, step), {"step": step})
    torn = tmp_path / "state" / "4"
    (torn / file).write_bytes((torn / file).read_bytes()[:-9])
    with pytest.raises(UserError, match=r"state of step 4 cannot be read(?s:.*)Delete the folder 4"):
        states.load(state_after(base, 0))
    for path in torn.iterdir():
        path.unlink()
    torn.rmdir()
    loaded, notes = states.load(state_after(base, 0))
    assert notes == {"step": 2}
    assert_same(loaded, state_after(base, 2))


def test_a_disk_that_fills_up_while_saving_leaves_the_state_before(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_impl.training import state as module

    states = StateFolder(tmp_path / "state")
    states.save(state_after(base, 1), {"best": 0.5})
    write = module.write_file

    def full(path: Path, data: bytes) -> None:
        if path.name == "optimizer.safetensors":
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(module, "write_file", full)
    with pytest.raises(UserError, match=r"state of step 2 cannot be written(?s:.*)Free some space"):
        states.save(state_after(base, 2), {})
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["1"]
    assert StateFolder(tmp_path / "state").latest() == 1


def test_what_a_killed_save_left_behind_is_removed(base: Path, tmp_path: Path) -> None:
    remains = tmp_path / "state" / ".partial-7"
    remains.mkdir(parents=True)
    (remains / "model.safetensors").write_bytes(b"half")
    states = StateFolder(tmp_path / "state")
    assert states.latest() is None and not remains.exists()


def test_a_state_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    states = StateFolder(tmp_path / "state")
    states.save(state_after(base, 3), {})
    other: Any = write_base(tmp_path / "other", intermediate_size=48)
    with pytest.raises(UserError, match=r"state of step 3 cannot be read(?s:.*)wrong shape: bert\.encoder"):
        states.load(state_after(other, 0))
    assert read_tensors(tmp_path / "state" / "3" / "optimizer.safetensors")["states.0.step"] == 3
