"""What the frozen original says of its pairs is computed once, and again only when something changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from common.data import original
from common.data.original import original_outputs
from common.errors import UserError
from common.text import Encoded

WIDTH = 3


class Frozen:
    """Says of a pair its first token and noise that its tokens decide."""

    def __init__(self, identity: str = "frozen", fails_after: int | None = None) -> None:
        self.identity, self.fails_after, self.scored = identity, fails_after, 0

    def outputs(
        self, encodeds: Sequence[Encoded], on_batch: Callable[[int], None] | None = None
    ) -> np.ndarray:
        if self.fails_after is not None and self.scored >= self.fails_after:
            raise KeyboardInterrupt
        self.scored += len(encodeds)
        return np.stack([self.of(encoded) for encoded in encodeds])

    @staticmethod
    def of(encoded: Encoded) -> np.ndarray:
        rng = np.random.default_rng(encoded.ids.tolist())
        return np.asarray([encoded.ids[0], *rng.normal(size=4 * WIDTH)], np.float32)


@pytest.fixture
def pairs(seed: int, monkeypatch: pytest.MonkeyPatch) -> list[Encoded]:
    monkeypatch.setattr(original, "_PIECE", 4)
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 9, 11)
    return [Encoded(rng.integers(0, 99, n).astype(np.int32), np.ones(n, np.int8)) for n in sizes]


def test_each_pair_keeps_its_own_outputs_and_nothing_is_computed_twice(
    pairs: list[Encoded], tmp_path: Path
) -> None:
    first, again = Frozen(), Frozen()
    for frozen in (first, again):
        outputs = original_outputs(frozen, pairs, tmp_path)
        assert outputs.state_size == WIDTH
        for start, count in ((0, 1), (3, 4), (8, 3)):  # within a piece, over its border, the last ones
            expected = np.stack([Frozen.of(pair) for pair in pairs[start : start + count]])
            np.testing.assert_array_equal(outputs.rows(start, count), expected)
    assert (first.scored, again.scored) == (11, 0)


def test_an_interrupted_computation_goes_on_where_it_was(pairs: list[Encoded], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        original_outputs(Frozen(fails_after=8), pairs, tmp_path)
    rest = Frozen()
    original_outputs(rest, pairs, tmp_path)
    assert rest.scored == 3


def test_another_model_or_other_pairs_are_computed_anew(pairs: list[Encoded], tmp_path: Path) -> None:
    original_outputs(Frozen(), pairs, tmp_path)
    other = Frozen("another")
    original_outputs(other, pairs, tmp_path)
    assert other.scored == 11
    changed = Frozen()
    longer = [
        *pairs[:-1],
        Encoded(np.append(pairs[-1].ids, 5).astype(np.int32), np.append(pairs[-1].sides, 2)),
    ]
    original_outputs(changed, longer, tmp_path)
    assert changed.scored == 3  # the piece that holds it
    sides = Frozen()
    original_outputs(sides, [Encoded(pair.ids, pair.sides * 2) for pair in pairs], tmp_path)
    assert sides.scored == 11


def test_outputs_that_are_not_finite_are_refused_and_not_kept(pairs: list[Encoded], tmp_path: Path) -> None:
    class Broken(Frozen):
        def outputs(
            self, encodeds: Sequence[Encoded], on_batch: Callable[[int], None] | None = None
        ) -> np.ndarray:
            return super().outputs(encodeds) * np.nan

    with pytest.raises(UserError, match=r"not finite: model\.base is damaged"):
        original_outputs(Broken(), pairs, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_file_is_named(pairs: list[Encoded], tmp_path: Path) -> None:
    original_outputs(Frozen(), pairs, tmp_path)
    file = sorted(tmp_path.glob("original-*.npy"))[0]
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(UserError, match=rf"{file.name}: a broken cache file"):
        original_outputs(Frozen(), pairs, tmp_path)
