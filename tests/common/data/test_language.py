"""What a user may expect of token batches: every token once, the text's order, the same after a resume."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from common.data.corpora import Corpus, Document, row_document
from common.data.language import (
    PackedRows,
    Streams,
    TokenDocuments,
    WholeRows,
    evaluation_batches,
    read_tokens,
    write_tokens,
)
from common.errors import UserError
from common.language.text import LanguageTokenizer, corpus_tokenizer

END = 0


def documents(lengths: list[int], first: int = 1) -> TokenDocuments:
    """Documents whose tokens count on, so that each says where it stands."""
    starts = np.concatenate(([0], np.cumsum(lengths)))
    ids = np.arange(first, first + starts[-1], dtype=np.int32)
    numbers = np.asarray(lengths, np.int64)
    return TokenDocuments(ids, np.ones(len(ids), bool), starts, numbers, 3 * numbers)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> LanguageTokenizer:
    text = " ".join(f"word{i % 37} follows <unk> and others" for i in range(500))
    return corpus_tokenizer([Document(text, 2500)], 600, tmp_path_factory.mktemp("cache"))


def test_what_was_written_is_read_and_counts_neither_unknown_words_nor_prompts(
    tmp_path: Path, tokenizer: LanguageTokenizer
) -> None:
    row = row_document({"instruction": "Say <unk>.", "output": "Ünï two\nthree <unk>"})
    corpus = Corpus("c", {"train": (row, Document("plain <unk> text\n", 4)), "dev": (row,), "test": ()})
    place = write_tokens(corpus, tokenizer, tmp_path, mask_unknown=True, mask_prompt=True)
    train = read_tokens(place, "train")
    assert [tokenizer.decode(train.ids[train.document(i)]) for i in range(2)] == [
        row.text,
        "plain <unk> text\n",
    ]
    answer = train.document(0)
    counted = tokenizer.decode(train.ids[answer][train.counted[answer]])
    assert counted == "Ünï two\nthree "
    assert train.words.tolist() == [6 - 1, 4 - 1]
    assert train.bytes.tolist() == [len("Ünï two\nthree ".encode()), len("plain  text\n")]
    whole = write_tokens(corpus, tokenizer, tmp_path, mask_unknown=False, mask_prompt=False)
    everything = read_tokens(whole, "train")
    assert everything.counted.all() and everything.bytes[0] == len(row.text.encode())
    assert (
        whole != place
        and write_tokens(corpus, tokenizer, tmp_path, mask_unknown=True, mask_prompt=True) == place
    )


def test_damaged_tokens_say_how_they_are_written_again(tmp_path: Path, tokenizer: LanguageTokenizer) -> None:
    items = tuple(Document(f"text number {i} with words", 6) for i in range(50))
    corpus = Corpus("c", {"train": items})
    place = write_tokens(corpus, tokenizer, tmp_path, mask_unknown=False, mask_prompt=False)
    file = next(place.glob("*array_record*"))
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b""):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"the tokens of a corpus cannot be read.*delete this folder"):
            read_tokens(place, "train")


def test_packed_rows_show_every_token_once_an_epoch_in_an_order_of_its_own() -> None:
    plan = PackedRows(documents([5, 17, 9, 30, 6]), 8, 3, END, seed=3)
    epochs = []
    for epoch in range(2):
        batches = [plan.batch(epoch * len(plan) + i) for i in range(len(plan))]
        labels = np.concatenate([b.labels[b.mask] for b in batches])
        assert sorted(labels[labels != END]) == list(range(1, 68)) and (labels == END).sum() == 5
        for batch in batches:
            assert batch.input_ids.shape == (3, 1, 8) and batch.reset.all()
            shown = batch.mask[..., 1:] & batch.mask[..., :-1]
            assert (batch.input_ids[..., 1:] == batch.labels[..., :-1])[shown].all()
            begins = (batch.input_ids == END)[..., 1:] & (batch.segments[..., 1:] > 0)
            assert (np.diff(batch.segments) == begins)[batch.segments[..., 1:] > 0].all()
        epochs.append(labels.tolist())
    assert epochs[0] != epochs[1]


def test_streams_go_on_where_the_step_before_stopped_and_reset_at_articles() -> None:
    plan = Streams(documents([40, 25, 3, 60, 4]), 8, 2, END, seed=0, unroll=2, reset_rate=0.0)
    batches = [plan.batch(i) for i in range(len(plan))]
    labels = np.concatenate([b.labels[b.mask] for b in batches])
    assert sorted(labels[labels != END]) == list(range(1, 133)) and (labels == END).sum() == 5
    for row in range(2):
        segments = [
            (b.input_ids[row, k], b.labels[row, k], b.mask[row, k], b.reset[row, k])
            for b in batches
            for k in range(2)
        ]
        assert segments[0][3]
        for (_, before, counted, _), (inputs, _, mask, reset) in pairwise(segments):
            if mask.any() and not reset:  # the article goes on: its next input is the label before
                assert counted.all() and inputs[0] == before[-1]
            elif mask.any():
                assert inputs[0] == END
    assert sum(int(b.reset[b.mask.any(-1)].sum()) for b in batches) in (5, 6)


def test_random_resets_come_at_their_rate_and_the_same_again() -> None:
    plans = [Streams(documents([4000]), 8, 4, END, seed=1, unroll=5, reset_rate=0.3) for _ in range(2)]
    resets = np.stack([plans[0].batch(i).reset for i in range(25)])
    assert 0.2 < resets.mean() < 0.4
    assert (resets == np.stack([plans[1].batch(i).reset for i in range(25)])).all()


def test_a_resumed_loader_goes_on_with_the_next_batch() -> None:
    plan = Streams(documents([90, 70, 33]), 8, 2, END, seed=5, unroll=2, reset_rate=0.2)
    loader = plan.loader(20)
    for _ in range(7):
        next(loader)
    state = loader.get_state()
    rest = [next(loader).input_ids for _ in range(5)]
    again = Streams(documents([90, 70, 33]), 8, 2, END, seed=5, unroll=2, reset_rate=0.2).loader(20)
    again.set_state(state)
    assert all((next(again).input_ids == ids).all() for ids in rest)


def test_a_corpus_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(UserError, match=r"has 2 rows of 8 tokens, fewer than the 4 of one step"):
        PackedRows(documents([12]), 8, 4, END, seed=0)
    with pytest.raises(UserError, match=r"has 2 segments of 8 tokens, fewer than the 8 of one step"):
        Streams(documents([12]), 8, 4, END, seed=0, unroll=2, reset_rate=0.0)


@pytest.mark.parametrize(("stride", "carry"), [(8, False), (3, False), (1, False), (8, True)])
def test_evaluation_counts_every_token_once(stride: int, carry: bool) -> None:
    split = documents([30, 1, 8, 9, 17])
    batches = list(evaluation_batches(split, 8, 2, END, stride=stride, carry=carry))
    labels = np.concatenate([b.labels[b.mask] for b in batches])
    assert sorted(labels.tolist()) == list(range(1, 66))
    for batch in batches:
        for row, number in enumerate(batch.row_index):
            shown = batch.labels[row][batch.mask[row]]
            if number >= 0:  # the row says whose tokens it counts
                assert ((shown > split.starts[number]) & (shown <= split.starts[number + 1])).all()
            else:
                assert not batch.mask[row].any()
    if carry:
        assert sum(int((~b.reset)[b.mask.any(-1)].sum()) for b in batches) == 3 + 0 + 0 + 1 + 2
    else:
        contexts = [
            int(b.mask[r, 0].argmax()) for b in batches for r in range(2) if b.input_ids[r, 0, 0] != END
        ]
        assert all(count >= 8 - stride for count in contexts)


def test_whole_rows_hold_every_document_once_an_epoch_and_cut_none() -> None:
    split = documents([5, 40, 7, 31, 32, 6, 9])
    plan = WholeRows(split, 64, 3, END, END, seed=3)
    assert len(plan) == 3
    for epoch in range(2):
        batches = [plan.batch(epoch * 3 + step) for step in range(3)]
        rows = [batch.row_index.tolist() for batch in batches]
        assert sorted(row for part in rows for row in part) == [-1, -1, *range(7)]
        for batch in batches:
            assert batch.input_ids.shape[2] % 32 == 0
            for place, row in enumerate(batch.row_index.tolist()):
                inputs, labels = batch.input_ids[place, 0], batch.labels[place, 0]
                ids = split.ids[split.document(row)].tolist() if row >= 0 else []
                length = len(ids) + 1 if row >= 0 else 0
                assert inputs[:length].tolist() == ([END, *ids] if ids else [])
                assert labels[batch.mask[place, 0]].tolist() == ([*ids, END] if ids else [])
                assert batch.segments[place, 0].tolist() == [1] * length + [0] * (len(inputs) - length)
    first = [plan.batch(step).row_index.tolist() for step in range(3)]
    assert first != [plan.batch(3 + step).row_index.tolist() for step in range(3)]


def test_rows_of_several_forms_take_them_in_turn_over_the_epochs() -> None:
    """Three rows; their second forms are documents 3 to 5. No token is put behind them."""
    split = documents([4, 5, 6, 14, 15, 16])
    plan = WholeRows(split, 32, 3, END, None, seed=0, forms=2)
    for epoch in range(3):
        batch = plan.batch(epoch)
        for place, row in enumerate(batch.row_index.tolist()):
            ids = split.ids[split.document(row + 3 * ((row + epoch) % 2))]
            assert batch.labels[place, 0][batch.mask[place, 0]].tolist() == ids.tolist()


def test_whole_rows_go_on_where_they_stopped_and_are_never_longer_than_the_context() -> None:
    split = documents([5, 39, 7, 31])
    plan = WholeRows(split, 40, 2, END, END, seed=1)
    steps = plan.loader(4)
    next(steps)
    state, expected = steps.get_state(), [batch.input_ids for batch in steps]
    again = WholeRows(split, 40, 2, END, END, seed=1).loader(4)
    again.set_state(state)
    found = [batch.input_ids for batch in again]
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert max(ids.shape[2] for ids in expected) == 40
    with pytest.raises(UserError, match="has 4 rows, fewer than the 5 of one step"):
        WholeRows(split, 40, 5, END, END, seed=1)
