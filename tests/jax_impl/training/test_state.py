"""Training state on disk: exact, whole, the last two kept."""

from __future__ import annotations

import gc
import shutil
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from jax_impl.training.state import StateFolder
from jax_impl.training.step import TrainState


def make_state(step: int, seed: int = 0, width: int = 5) -> TrainState:
    rng = np.random.default_rng((seed, step))
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    learned = {"a": draw(3, width), "b": draw()}
    state = TrainState(learned, {"c": draw(2)}, (draw(3, width), jnp.asarray(step)), jnp.asarray(step))
    return jax.device_put(state, jax.devices()[0])


def assert_same(a: TrainState, b: TrainState) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(left, right)
        assert left.dtype == right.dtype


# Orbax leaves the rest of an operation that failed to the garbage collector, which tells of it
failed_operation = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_a_state_comes_back_bit_for_bit_in_another_process_with_its_notes(tmp_path: Path) -> None:
    notes = {"best": 0.123456789012345, "best_step": None, "data": {"next_index": 7}, "collapsed": 0}
    with closing(StateFolder(tmp_path / "state")) as states:
        assert states.latest() is None
        states.save(make_state(3), notes)
    with closing(StateFolder(tmp_path / "state")) as states:
        assert states.latest() == 3
        loaded, found = states.load(make_state(0))
    assert_same(loaded, make_state(3))
    assert found == notes


def test_the_last_two_are_kept_and_the_last_is_loaded(tmp_path: Path) -> None:
    with closing(StateFolder(tmp_path / "state")) as states:
        for step in (2, 4, 6):
            states.save(make_state(step), {"step": step})
        states.save(make_state(6), {"step": "again"})  # a step is written once
    assert sorted(int(path.name) for path in (tmp_path / "state").iterdir() if path.name.isdigit()) == [4, 6]
    with closing(StateFolder(tmp_path / "state")) as states:
        loaded, notes = states.load(make_state(0))
    assert_same(loaded, make_state(6))
    assert notes == {"step": 6}


@failed_operation
def test_the_one_before_is_whole_when_the_last_is_deleted_as_the_message_says(tmp_path: Path) -> None:
    with closing(StateFolder(tmp_path / "state")) as states:
        for step in (2, 4):
            states.save(make_state(step), {"step": step})
    for file in (tmp_path / "state" / "4").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with (
        closing(StateFolder(tmp_path / "state")) as states,
        pytest.raises(UserError, match=r"state of step 4 cannot be read(?s:.*)Delete the folder 4"),
    ):
        states.load(make_state(0))
    gc.collect()
    shutil.rmtree(tmp_path / "state" / "4")
    with closing(StateFolder(tmp_path / "state")) as states:
        loaded, _ = states.load(make_state(0))
    assert_same(loaded, make_state(2))


@failed_operation
@failed_operation
def test_a_disk_that_fills_up_while_saving_leaves_the_state_before(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="needs a limit on file sizes")
    states = StateFolder(tmp_path / "state")
    first, second = make_state(1), make_state(2)
    states.save(first, {"best": 0.5})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        with pytest.raises(UserError, match=r"state of step 2 cannot be written(?s:.*)Free some space"):
            states.save(second, {"best": 0.6})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        states.close()
    again = StateFolder(tmp_path / "state")
    assert again.latest() == 1
    loaded, notes = again.load(make_state(0))
    again.close()
    assert_same(loaded, first)
    assert notes == {"best": 0.5}
    del states, again
    gc.collect()


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    with closing(StateFolder(tmp_path / "state")) as states:
        states.save(make_state(3), {})
        with pytest.raises(UserError, match="state of step 3 cannot be read"):
            states.load(make_state(0, width=6))
    gc.collect()


@failed_operation
def test_a_state_whose_notes_are_lost_cannot_be_read(tmp_path: Path) -> None:
    with closing(StateFolder(tmp_path / "state")) as states:
        states.save(make_state(4), {"step": 4})
    (tmp_path / "state" / "4" / "_CHECKPOINT_METADATA").unlink()
    with (
        closing(StateFolder(tmp_path / "state")) as states,
        pytest.raises(UserError, match="state of step 4 cannot be read"),
    ):
        states.load(make_state(0))
    gc.collect()
