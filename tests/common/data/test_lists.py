"""What a user may expect of training lists: who is in them, and that a file gives back what was written."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.data.lists import (
    FEW_CANDIDATES,
    NO_NEGATIVE,
    NO_POSITIVE,
    NOT_RETRIEVED,
    TrainingList,
    build_lists,
    flip_labels,
    given_negatives,
    random_negatives,
    read_lists,
    related_queries,
    unlabelled_lists,
    write_lists,
)
from common.data.records import RankingData
from common.errors import UserError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def data() -> RankingData:
    corpus = {f"p{i}": f"passage {i}" for i in range(8)} | {"copy": "passage 0"}
    queries = {f"q{i}": f"query {i}" for i in range(5)}
    judged = {"q0": {"p0": 1, "p1": 2, "p7": 0}, "q1": {"p2": 1}, "q2": {"p3": 0}, "q3": {"p4": 1}}
    return RankingData("toy", corpus, queries, {"train": judged}, negatives={"q1": ("p6", "p5")})


RUN = {
    "q0": {"p0": 9.0, "copy": 8.0, "p5": 3.0, "p7": 5.0, "p6": 4.0, "p1": 1.0},
    "q1": {"p2": 3.0, "p5": 2.0, "p6": 2.0},
    "q2": {"p5": 1.0},
}


def test_a_list_holds_positives_by_grade_and_the_hardest_passages_that_are_not_relevant(
    data: RankingData,
) -> None:
    lists, _ = build_lists(data, "train", RUN, pool_size=2)
    assert [item.query_id for item in lists] == ["q0", "q1"]
    assert lists[0].positives == ("passage 1", "passage 0")
    assert lists[0].grades == (2.0, 1.0)
    assert lists[0].negatives == ("passage 7", "passage 6")  # no positive, no copy of one, judged 0 stays
    assert lists[1].negatives == ("passage 5", "passage 6")


def test_positives_can_be_held_to_what_the_first_stage_finds(data: RankingData) -> None:
    lists, dropped = build_lists(data, "train", RUN, pool_size=2, retrieved={"q0": {"p0": 1.0, "p7": 2.0}})
    assert [(item.query_id, item.positives) for item in lists] == [("q0", ("passage 0",))]
    assert lists[0].negatives == ("passage 7", "passage 6")  # an unfound positive is no negative either
    assert dropped == {NOT_RETRIEVED: 2, NO_POSITIVE: 1}


def test_queries_that_cannot_teach_are_dropped_and_counted(data: RankingData) -> None:
    _, dropped = build_lists(data, "train", RUN, pool_size=5)
    assert dropped == {NO_POSITIVE: 1, NO_NEGATIVE: 1}
    with pytest.raises(
        UserError, match=r"no training list in split 'train' .*draw from others: --data\.negatives"
    ):
        build_lists(data, "train", {}, pool_size=5)


def test_max_samples_keeps_a_subset_that_the_seed_decides(data: RankingData) -> None:
    run = random_negatives(data, "train", depth=6, seed=1)
    everything, _ = build_lists(data, "train", run, pool_size=5)
    subsets = [build_lists(data, "train", run, 5, max_samples=2, seed=seed)[0] for seed in (0, 0, 1, 2, 3, 4)]
    assert subsets[0] == subsets[1]
    assert all(len(subset) == 2 and set(subset) <= set(everything) for subset in subsets)
    assert len({tuple(subset) for subset in subsets}) > 1


def test_unlabelled_lists_take_the_best_passages_and_read_no_label(data: RankingData, tmp_path: Path) -> None:
    lists, dropped = unlabelled_lists(data, ["q0", "q1", "q2", "q4"], RUN, pool_size=2)
    assert [(item.query_id, item.negatives) for item in lists] == [
        ("q0", ("passage 0", "passage 7")),  # the copy of the relevant passage is the same text
        ("q1", ("passage 2", "passage 5")),  # the relevant one too
    ]
    assert all(not item.positives and not item.grades and not item.teacher for item in lists)
    assert dropped == {FEW_CANDIDATES: 2}
    assert list(read_lists(write_lists(lists, tmp_path))) == lists
    some, _ = unlabelled_lists(data, ["q0", "q1"], RUN, pool_size=2, max_queries=1)
    assert len(some) == 1 and some[0] in lists
    with pytest.raises(UserError, match="toy: none of its 1 queries has two candidates"):
        unlabelled_lists(data, ["q2"], RUN, pool_size=5)


def test_given_negatives_keep_their_order(data: RankingData) -> None:
    lists, _ = build_lists(data, "train", given_negatives(data), pool_size=5)
    assert [(item.query_id, item.negatives) for item in lists] == [("q1", ("passage 6", "passage 5"))]


def test_related_queries_become_positions_among_the_kept_lists(data: RankingData) -> None:
    related = {"q0": {"q2": 0.9, "q1": 0.75}, "q1": {"q0": 0.75}}
    lists, _ = build_lists(data, "train", RUN, pool_size=2, related=related)
    assert [(item.related, item.related_weight) for item in lists] == [((1,), (0.75,)), ((0,), (0.75,))]


def test_related_queries_are_the_nearest_above_the_threshold() -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    vectors = np.random.default_rng(seed).standard_normal((30, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = [f"q{i}" for i in range(30)]
    found = related_queries(vectors, ids, threshold=0.3, top=3)
    for i, query in enumerate(ids):
        cosines = {ids[j]: float(vectors[i] @ vectors[j]) for j in range(30) if j != i}
        nearest = sorted((q for q in cosines if cosines[q] >= 0.3), key=lambda q: -cosines[q])[:3]
        assert list(found.get(query, {})) == nearest
        assert all(abs(weight - cosines[q]) < 1e-5 for q, weight in found.get(query, {}).items())


def some_lists(count: int, seed: int) -> list[TrainingList]:
    rng = random.Random(seed)

    def text() -> str:
        return "".join(rng.choices("abc déf 中文\n", k=rng.randint(1, 300)))

    return [
        TrainingList(
            query_id=f"q{i}",
            query=text(),
            positives=tuple(text() for _ in range(rng.randint(1, 3))),
            grades=(float(rng.randint(1, 3)),),
            negatives=tuple(text() for _ in range(rng.randint(0, 4))),
            related=(rng.randrange(count),) if i % 2 else (),
            related_weight=(0.625,) if i % 2 else (),
        )
        for i in range(count)
    ]


def test_a_file_gives_back_what_was_written_in_order_and_is_written_once(tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    first, second = some_lists(60, seed), some_lists(7, seed + 1)
    path = write_lists(first, tmp_path)
    stored = read_lists(path)
    assert (len(stored), stored[41], list(stored)) == (60, first[41], first)
    made = next(path.glob("*array_record*")).stat().st_mtime_ns
    assert write_lists(first, tmp_path) == path
    assert next(path.glob("*array_record*")).stat().st_mtime_ns == made
    assert list(read_lists(write_lists(second, tmp_path))) == second
    assert list(stored) == first and len(list(tmp_path.iterdir())) == 2  # and nothing half-made


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow_datasets as tfds

    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/lists: the training lists cannot.*\$RESONANCE_CACHE"):
        write_lists(some_lists(3, 0), tmp_path / "file" / "lists")
    monkeypatch.setattr(tfds.core.utils, "has_sufficient_disk_space", lambda *_, **__: False)
    with pytest.raises(UserError, match=r"cannot be written \(Not enough disk space.*Free some space"):
        write_lists(some_lists(3, 0), tmp_path / "lists")


def test_several_processes_may_write_the_same_lists_at_once(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.common.data.test_lists import some_lists; "
        "from common.data.lists import read_lists, write_lists; "
        "print(len(read_lists(write_lists(some_lists(50, 1), Path(sys.argv[1])))))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    running = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in running:
        out, err = process.communicate()
        assert (process.returncode, out) == (0, "50\n"), err
    assert len(list(tmp_path.iterdir())) == 1


def test_a_missing_or_damaged_file_says_how_it_is_written_again(tmp_path: Path) -> None:
    again = r"delete this folder, and the same command writes them again"
    with pytest.raises(UserError, match=again):
        read_lists(tmp_path / "absent")
    path = write_lists(some_lists(60, 0), tmp_path)
    record = next(path.glob("*array_record*"))
    whole = record.read_bytes()
    flipped = bytearray(whole)
    flipped[5000] ^= 0xFF
    for damaged in (whole[: len(whole) // 2], b"", bytes(flipped)):
        record.write_bytes(damaged)
        with pytest.raises(UserError, match=again):
            list(read_lists(path))
    record.unlink()
    with pytest.raises(UserError, match=again):
        read_lists(path)


def test_a_share_of_the_lists_has_its_labels_exchanged() -> None:
    pools = [tuple(f"bad {i} {j}" for j in range(3)) for i in range(40)]
    scores = (9.0, 8.0, 3.0, 2.0, 1.0)
    lists = [
        TrainingList(f"q{i}", "query", (f"good {i}", "second"), (2.0, 1.0), pool, teacher=scores)
        for i, pool in enumerate(pools)
    ]
    wrong = flip_labels(lists, 0.2, seed=3)
    changed = [(a, b) for a, b in zip(lists, wrong, strict=True) if a != b]
    assert len(changed) == 8 and wrong == flip_labels(lists, 0.2, seed=3) != flip_labels(lists, 0.2, seed=4)
    for before, after in changed:
        assert before.positives[0] in after.negatives and after.positives[0] in before.negatives
        assert after.positives[1] == "second" and after.grades == before.grades
        known = dict(zip((*before.positives, *before.negatives), before.teacher, strict=True))
        assert after.teacher == tuple(known[text] for text in (*after.positives, *after.negatives))
    assert flip_labels(lists, 0.0, seed=3) == lists
