"""What a training run may expect of its batches: which lists, which candidates, in what order."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import DataConfig
from common.data.lists import TrainingList
from common.data.original import OriginalOutputs
from common.data.pipeline import ListBatch, ListPlan, Share, device_order
from common.errors import UserError
from common.text import PASSAGE, QUERY, PairTokenizer

WORDS = [f"w{i}" for i in range(200)]
CONFIG = DataConfig(list_size=4, max_positives=2, length_buckets=(16, 32, 64))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PairTokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    return PairTokenizer(directory, max_query_tokens=12, max_passage_tokens=40)


@pytest.fixture
def rng() -> random.Random:
    seed = random.randrange(10**6)
    print("seed", seed)
    return random.Random(seed)


def text(rng: random.Random, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def make_lists(rng: random.Random, count: int, negatives: int = 6) -> list[TrainingList]:
    """Lists with one to three positives of grades 1 to 3; neighbours 2k, 2k+1 are related."""
    lists = []
    for i in range(count):
        grades = sorted((float(rng.randint(1, 3)) for _ in range(rng.randint(1, 3))), reverse=True)
        positives, pool = [text(rng, 45) for _ in grades], [text(rng, 45) for _ in range(negatives)]
        lists.append(
            TrainingList(
                query_id=f"q{i}",
                query=text(rng, 12),
                positives=tuple(positives),
                grades=tuple(grades),
                negatives=tuple(pool),
                related=(i ^ 1,) if i ^ 1 < count else (),
                related_weight=(0.75,) if i ^ 1 < count else (),
            )
        )
    return lists


def same(a: ListBatch, b: ListBatch) -> bool:
    return all(np.array_equal(x, vars(b)[name], equal_nan=x.dtype.kind == "f") for name, x in vars(a).items())


def loader(
    lists: list[TrainingList], tokenizer: PairTokenizer, seed: int = 0, *, steps: int = 0, epochs: int = 0
) -> Any:
    plan = ListPlan(lists, tokenizer, CONFIG, batch_size=4, seed=seed, pair_related=True)
    return plan.loader(steps or epochs * len(plan))


def words_of(batch: ListBatch, row: int, column: int, side: int) -> list[str]:
    ids = batch.input_ids[row, column][batch.sides[row, column] == side]
    return [WORDS[i - 5] for i in ids if i >= 5]


def test_a_batch_shows_the_best_positives_and_negatives_of_the_pool(
    tokenizer: PairTokenizer, rng: random.Random
) -> None:
    lists = make_lists(rng, 9)
    for batch in loader(lists, tokenizer, epochs=2):
        assert batch.input_ids.shape == batch.sides.shape == (4, 4, batch.input_ids.shape[-1])
        assert batch.mask.all()
        for row, index in enumerate(batch.query_index):
            item = lists[index]
            positives = batch.labels[row] > 0
            assert sorted(batch.labels[row][positives], reverse=True) == list(item.grades[:2])
            shown = [" ".join(words_of(batch, row, column, PASSAGE)) for column in range(4)]
            assert all(words_of(batch, row, column, QUERY) == item.query.split() for column in range(4))
            cut: dict[float, list[str]] = {grade: [] for grade in (*item.grades, 0.0)}
            for passage, grade in [
                *zip(item.positives, item.grades, strict=True),
                *((p, 0.0) for p in item.negatives),
            ]:
                cut[grade].append(" ".join(passage.split()[:40]))
            for passage, grade in zip(shown, batch.labels[row].tolist(), strict=True):
                cut[grade].remove(passage)  # without replacement, and of that grade


def test_each_candidate_carries_its_own_teacher_score(tokenizer: PairTokenizer, rng: random.Random) -> None:
    lists = make_lists(rng, 9)
    for number, item in enumerate(lists[1:], start=1):  # the first has no teacher
        scores = [rng.gauss(0, 1) for _ in (*item.positives, *item.negatives)]
        scores[number % len(scores)] = float("nan")
        lists[number] = replace(item, teacher=tuple(scores))
    for batch in loader(lists, tokenizer, epochs=3):
        for row, index in enumerate(batch.query_index):
            item = lists[index]
            taught = zip((*item.positives, *item.negatives), item.teacher or [math.nan] * 99, strict=False)
            known = {" ".join(passage.split()[:40]): score for passage, score in taught}
            for column in range(4):
                expected = known[" ".join(words_of(batch, row, column, PASSAGE))]
                assert batch.teacher[row, column] == pytest.approx(expected, nan_ok=True)


def test_in_batch_negatives_are_the_positives_of_unrelated_others(
    tokenizer: PairTokenizer, rng: random.Random
) -> None:
    lists = make_lists(rng, 24)
    cfg = replace(CONFIG, in_batch_negatives=2, max_positives=1)
    plan = ListPlan(lists, tokenizer, cfg, batch_size=6, seed=rng.randrange(99), pair_related=True)
    for number in range(len(plan)):
        batch = plan.batch(number)
        own = {
            int(index): [" ".join(p.split()[:40]) for p in lists[index].positives]
            for index in batch.query_index
        }
        for row, index in enumerate(map(int, batch.query_index)):
            assert batch.labels[row].tolist()[1:] == [0.0, 0.0, 0.0] and batch.mask[row].all()
            assert words_of(batch, row, 0, QUERY) == words_of(batch, row, 3, QUERY)
            for column in (2, 3):
                passage = " ".join(words_of(batch, row, column, PASSAGE))
                owners = [other for other, texts in own.items() if passage in texts]
                assert owners and index not in owners and (index ^ 1) not in owners
                assert np.isnan(batch.teacher[row, column])


def test_positives_of_equal_grade_and_negatives_take_turns(
    tokenizer: PairTokenizer, rng: random.Random
) -> None:
    lists = [
        replace(item, positives=("w1", "w2", "w3"), grades=(1.0, 1.0, 1.0)) for item in make_lists(rng, 4)
    ]
    seen: Counter[str] = Counter()
    for batch in loader(lists, tokenizer, epochs=60):
        row = int(np.flatnonzero(batch.query_index == 0)[0])
        seen.update(" ".join(words_of(batch, row, column, PASSAGE)) for column in range(4))
    assert {"w1", "w2", "w3", *(" ".join(p.split()[:40]) for p in lists[0].negatives)} == set(seen)


def test_short_lists_are_padded_with_the_mask_false(tokenizer: PairTokenizer, rng: random.Random) -> None:
    lists = [
        replace(item, negatives=item.negatives[:1], positives=("w1",), grades=(1.0,))
        for item in make_lists(rng, 4)
    ]
    batch = next(loader(lists, tokenizer, epochs=1))
    assert batch.mask.tolist() == [[True, True, False, False]] * 4
    assert (batch.sides[~batch.mask] == 0).all()
    assert (batch.input_ids[~batch.mask] == tokenizer.pad_id).all()
    assert (batch.labels[~batch.mask] == 0).all()


def test_an_epoch_holds_each_list_at_most_once_and_all_batches_are_full(
    tokenizer: PairTokenizer, rng: random.Random
) -> None:
    lists = make_lists(rng, 11)
    batches = list(loader(lists, tokenizer, epochs=30))
    assert len(batches) == 30 * (11 // 4)
    for epoch in range(30):
        shown = np.concatenate([batch.query_index for batch in batches[2 * epoch : 2 * epoch + 2]])
        assert len(set(shown.tolist())) == 8
    assert {int(i) for batch in batches for i in batch.query_index} == set(range(11))


def test_the_padded_length_is_the_smallest_bucket_that_fits(
    tokenizer: PairTokenizer, rng: random.Random
) -> None:
    for batch in loader(make_lists(rng, 12), tokenizer, epochs=2):
        longest = int((batch.sides > 0).sum(axis=-1).max())
        assert batch.input_ids.shape[-1] == min(b for b in CONFIG.length_buckets if b >= longest)


def test_lists_of_similar_length_share_a_batch(tokenizer: PairTokenizer, rng: random.Random) -> None:
    lists = make_lists(rng, 64)
    for i, item in enumerate(lists):
        passage = "w1" if i < 32 else "w1 " * 30
        lists[i] = TrainingList(item.query_id, item.query, (passage,), (1.0,), (passage + " w2",) * 3)
    for related in (False, True):
        plan = ListPlan(lists, tokenizer, CONFIG, batch_size=4, seed=rng.randrange(99), pair_related=related)
        kinds = [set((plan.batch(i).query_index < 32).tolist()) for i in range(len(plan))]
        assert all(len(kind) == 1 for kind in kinds)
        assert 0.5 < np.mean([plan.batch(i).token_share for i in range(len(plan))]) <= 1


def test_related_queries_stand_together_only_when_asked(tokenizer: PairTokenizer, rng: random.Random) -> None:
    lists = make_lists(rng, 64)
    active = {}
    for related in (True, False):
        plan = ListPlan(lists, tokenizer, CONFIG, batch_size=4, seed=rng.randrange(99), pair_related=related)
        batches = [plan.batch(i) for i in range(len(plan))]
        active[related] = sum(int((batch.related > 0).sum()) for batch in batches)
        for batch in batches:
            partner = batch.query_index[:, None] ^ 1 == batch.query_index[None, :]
            assert np.array_equal(batch.related, np.where(partner, np.float32(0.75), np.float32(0)))
    assert active[True] == 64
    assert active[False] < 32


def test_a_weight_stated_by_one_list_counts_for_both(tokenizer: PairTokenizer, rng: random.Random) -> None:
    lists = [replace(item, related=(), related_weight=()) for item in make_lists(rng, 4)]
    lists[2] = replace(lists[2], related=(0,), related_weight=(0.5,))
    batch = next(loader(lists, tokenizer, epochs=1))
    place = {int(index): row for row, index in enumerate(batch.query_index)}
    assert batch.related[place[0], place[2]] == batch.related[place[2], place[0]] == 0.5
    assert batch.related.sum() == 1


def test_a_restored_loader_gives_exactly_what_would_have_come(
    tokenizer: PairTokenizer, rng: random.Random
) -> None:
    lists = make_lists(rng, 11)
    whole = list(loader(lists, tokenizer, seed=5, steps=9))
    for stop in (0, 1, 2, 5, 9):
        first = loader(lists, tokenizer, seed=5, steps=9)
        assert all(same(a, b) for a, b in zip(islice(first, stop), whole, strict=False))
        second = loader(lists, tokenizer, seed=5, steps=9)
        second.set_state(first.get_state())
        rest = list(second)
        assert len(rest) == 9 - stop
        assert all(same(a, b) for a, b in zip(rest, whole[stop:], strict=True))


def test_epochs_and_seeds_differ(tokenizer: PairTokenizer, rng: random.Random) -> None:
    lists = make_lists(rng, 32)
    order = [batch.query_index.tolist() for batch in loader(lists, tokenizer, epochs=2)]
    other = [batch.query_index.tolist() for batch in loader(lists, tokenizer, seed=1, epochs=1)]
    assert order[:8] != order[8:]
    assert order[:8] != other


def recalled(lists: list[TrainingList], tokenizer: PairTokenizer, **more: Any) -> ListPlan:
    """A plan whose original says of a pair its number of tokens, then 4 x 2 of its last token."""

    def recall(pairs: Any) -> OriginalOutputs:
        rows = [[len(pair.ids), *[pair.ids[-2]] * 8] for pair in pairs]
        return OriginalOutputs([np.asarray(rows, np.float32)])

    return ListPlan(lists, tokenizer, CONFIG, 4, seed=3, pair_related=False, recall=recall, **more)


def test_fixed_lists_show_the_same_candidates_in_every_epoch(
    tokenizer: PairTokenizer, rng: random.Random
) -> None:
    lists = make_lists(rng, 12)
    for fixed in (True, False):
        plan = ListPlan(lists, tokenizer, CONFIG, 4, seed=1, pair_related=False, fixed=fixed)
        shown: dict[int, set[tuple]] = {}
        for step in range(4 * len(plan)):
            batch = plan.batch(step)
            for row, index in enumerate(batch.query_index.tolist()):
                texts = tuple(" ".join(words_of(batch, row, c, PASSAGE)) for c in range(4))
                shown.setdefault(index, set()).add(texts)
        assert all(len(seen) == 1 for seen in shown.values()) is fixed
    order = [plan.batch(step).query_index.tolist() for step in range(2 * len(plan))]
    assert order[: len(plan)] != order[len(plan) :]  # the epochs' order still differs


def test_each_candidate_carries_what_the_original_said_of_it(
    tokenizer: PairTokenizer, rng: random.Random
) -> None:
    lists = make_lists(rng, 9, negatives=2)
    plan = recalled(lists, tokenizer)
    for step in range(2 * len(plan)):
        batch = plan.batch(step)
        assert batch.original_query.shape == batch.original_passage.shape == (4, 4, 2, 2)
        lengths = (batch.sides > 0).sum(-1)
        np.testing.assert_array_equal(np.isfinite(batch.original_scores), batch.mask)
        np.testing.assert_array_equal(batch.original_scores[batch.mask], lengths[batch.mask])
        for row, column in np.argwhere(batch.mask):
            last = batch.input_ids[row, column, lengths[row, column] - 2]
            assert (batch.original_passage[row, column] == last).all()
        assert not batch.original_query[~batch.mask].any()


def test_lists_of_the_old_domain_stand_behind_the_new_ones_without_labels(
    tokenizer: PairTokenizer, rng: random.Random
) -> None:
    long = " ".join(WORDS[:39])
    old_lists = [TrainingList(f"o{i}", "w7", (), (), (long, "w3", f"w{i}", "w5", "w6")) for i in range(6)]
    old = recalled(old_lists, tokenizer)
    new = make_lists(rng, 8)
    plan = recalled(new, tokenizer, beside=old)
    alone = recalled(new, tokenizer)
    assert len(plan) == len(alone) == 2
    seen = set()
    for step in range(6):
        batch, own, behind = plan.batch(step), alone.batch(step), old.batch(step)
        assert batch.mask.shape == (8, 4) and not batch.labels[4:].any() and batch.mask[4:].all()
        for name, value in vars(own).items():
            whole = vars(batch)[name]
            if name == "related":
                whole = whole[:4, :4]
            elif name in ("input_ids", "sides"):
                whole = whole[..., : value.shape[-1]]
            assert np.array_equal(whole[:4], value, equal_nan=value.dtype.kind == "f"), name
        assert not batch.sides[:4, :, own.sides.shape[-1] :].any()
        np.testing.assert_array_equal(batch.original_scores[4:], (batch.sides[4:] > 0).sum(-1))
        np.testing.assert_array_equal(-1 - batch.query_index[4:], behind.query_index)
        assert not batch.related[4:].any() and not batch.related[:, 4:].any()
        seen.update(batch.query_index[4:].tolist())
    assert seen == {-1, -2, -3, -4, -5, -6}  # other ones in its other epochs


def test_a_restored_loader_of_both_domains_gives_what_would_have_come(
    tokenizer: PairTokenizer, rng: random.Random
) -> None:
    old_lists = [TrainingList(f"o{i}", f"w{i}", (), (), ("w1", "w2", "w3 w4")) for i in range(6)]
    new = make_lists(rng, 8)

    def plan() -> ListPlan:
        return recalled(new, tokenizer, beside=recalled(old_lists, tokenizer))

    whole = list(plan().loader(7))
    first, second = plan().loader(7), plan().loader(7)
    assert all(same(a, b) for a, b in zip(islice(first, 3), whole, strict=False))
    second.set_state(first.get_state())
    assert all(same(a, b) for a, b in zip(second, whole[3:], strict=True))


def test_truncated_pairs_are_counted(tmp_path: Path, tokenizer: PairTokenizer) -> None:
    fresh = PairTokenizer(tokenizer.directory, max_query_tokens=2, max_passage_tokens=3)
    long, short = "w1 w2 w3 w4", "w1 w2"
    lists = [
        TrainingList(f"q{i}", query, (short,), (1.0,), (long, short)) for i, query in enumerate((long, short))
    ]
    ListPlan(lists, fresh, CONFIG, batch_size=1, seed=0, pair_related=False)
    assert (fresh.truncation.query_share, fresh.truncation.passage_share) == (3 / 6, 2 / 6)


def test_what_cannot_be_batched_is_a_user_error(tokenizer: PairTokenizer, rng: random.Random) -> None:
    lists = [
        replace(item, query="w1 " * 12, positives=("w2 " * 40,), grades=(1.0,)) for item in make_lists(rng, 5)
    ]
    with pytest.raises(UserError, match="cannot fill a batch of 6"):
        ListPlan(lists, tokenizer, CONFIG, batch_size=6, seed=0, pair_related=False)
    with pytest.raises(UserError, match="55 tokens is longer than every length bucket"):
        ListPlan(lists, tokenizer, replace(CONFIG, length_buckets=(16, 48)), 4, seed=0, pair_related=False)


def test_the_shares_of_all_processes_are_the_batch_each_with_its_own_lists_alone(
    tokenizer: PairTokenizer, rng: random.Random
) -> None:
    """6 lists in 2 micro-batches over 4 devices of 2 processes: of each, one place in four is empty."""
    plan = ListPlan(make_lists(rng, 13), tokenizer, CONFIG, batch_size=6, seed=1, pair_related=True)
    order = device_order(6, 2, 4)
    assert order.reshape(4, 2).tolist() == [[0, 3], [1, 4], [2, 5], [-1, -1]]
    for step in (0, 1, 2):
        whole = plan.batch(step)
        shares = [plan.batch(step, Share(rows.ravel(), order.ravel())) for rows in (order[:2], order[2:])]
        for place, row in enumerate(order.ravel()):
            share, here = shares[place // 4], place % 4
            if row < 0:
                assert not share.mask[here].any() and not share.related[here].any()
                continue
            for name, values in vars(whole).items():
                if name != "related":
                    np.testing.assert_array_equal(vars(share)[name][here], values[row])
            expected = np.where(order.ravel() < 0, 0, whole.related[row, order.ravel()])
            np.testing.assert_array_equal(share.related[here], expected)
    loaded = plan.loader(3, Share(order[:2].ravel(), order.ravel()))
    assert same(next(loaded), plan.batch(0, Share(order[:2].ravel(), order.ravel())))
    assert loaded.get_state() == first_state(plan)


def first_state(plan: ListPlan) -> Any:
    """Where a loader of whole batches stands after the first."""
    loader = plan.loader(3)
    next(loader)
    return loader.get_state()


def test_a_share_of_new_and_old_lists_is_cut_from_the_joined_batch(
    tokenizer: PairTokenizer, rng: random.Random
) -> None:
    def plan(count: int, size: int, beside: ListPlan | None = None) -> ListPlan:
        made = make_lists(rng, count)
        return ListPlan(made, tokenizer, CONFIG, size, 0, beside is not None, fixed=True, beside=beside)

    both = plan(8, 4, plan(6, 3))
    order = device_order(7, 1, 2)  # the last place is empty
    whole, share = both.batch(1), both.batch(1, Share(order[1].ravel(), order.ravel()))
    assert order[1].tolist() == [[4, 5, 6, -1]] and len(share.mask) == 4
    for name in ("input_ids", "labels", "query_index"):
        np.testing.assert_array_equal(vars(share)[name][:3], vars(whole)[name][4:])
    np.testing.assert_array_equal(share.related[:3, :7], whole.related[4:])
    assert not share.mask[3].any()
