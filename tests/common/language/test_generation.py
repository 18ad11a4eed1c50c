"""Generation's rules on logits that are given: what may be chosen, when a text ends, what is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from common.errors import UserError
from common.language.generation import (
    Piece,
    SamplingConfig,
    candidates,
    choose_token,
    generate,
    padded,
)

LETTERS = "abcdefgh"
END = len(LETTERS)


class Letters:
    """A tokenizer of single letters, and an end."""

    end: int | None = END

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(LETTERS[i] for i in ids)

    def encode(self, text: str) -> list[int]:
        return [LETTERS.index(letter) for letter in text]


class Alphabet:
    """An engine that says the next letter of the alphabet; its state is what it has read of each row."""

    vocab_size = END + 1

    def __init__(self, context: int | None = None, segmented: bool = False) -> None:
        self.context, self.segmented, self.renewed = context, segmented, []  # type: ignore[var-annotated]

    def start(self, rows: int, capacity: int) -> list[list[int]]:
        self.capacity = capacity
        return [[] for _ in range(rows)]

    def read(self, state: list[list[int]], ids: Any, counts: Any, explore: Any = None) -> Any:
        logits = np.zeros((len(state), self.vocab_size), np.float32)
        for row, known in enumerate(state):
            known += ids[row, : counts[row]].tolist()
            assert self.context is None or len(known) <= self.context
            if known:
                logits[row, (known[-1] + 1) % self.vocab_size] = 5.0
        return state, logits

    def renew(self, state: list[list[int]], rows: Any) -> list[list[int]]:
        self.renewed.append(np.flatnonzero(rows).tolist())
        return [[] if gone else known for known, gone in zip(state, rows, strict=True)]


def continued(*prompts: str, engine: Alphabet | None = None, **sampling: Any) -> list[Any]:
    letters = Letters()
    return generate(
        engine or Alphabet(), [letters.encode(p) for p in prompts], letters, SamplingConfig(**sampling)
    )


def test_a_text_ends_at_the_models_end_at_its_length_or_at_a_stop_text() -> None:
    whole, short = continued("e", "a", max_new_tokens=5)
    assert (whole.text, whole.finish) == ("fgh", "end") and whole.ids == (5, 6, 7)
    assert (short.text, short.finish) == ("bcdef", "length")
    (stopped,) = continued("a", stop=("xy", "de"))
    assert (stopped.text, stopped.finish) == ("bc", "stop")


def test_a_model_without_segments_ends_where_its_context_is_full() -> None:
    (found,) = continued("ab", engine=Alphabet(context=4))
    assert (found.text, found.finish) == ("cde", "context")
    (found,) = continued("abcd", engine=Alphabet(context=4))
    assert (found.text, found.finish) == ("e", "context")


def test_segments_are_ended_for_each_row_where_it_is_full() -> None:
    engine = Alphabet(context=3, segmented=True)
    long, short = continued("abcd", "e", engine=engine, max_new_tokens=4)
    assert (long.text, short.text) == ("efgh", "fgh")
    # the first row holds abc, then def, then gh; the second one efg, then h, which the model ends
    assert engine.renewed == [[0], [0, 1]]
    assert engine.capacity == 3


def test_streamed_pieces_make_the_text_and_hold_back_what_may_be_a_stop_text() -> None:
    letters, heard = Letters(), []
    sampling = SamplingConfig(stop=("efx", "gh"))
    found = generate(Alphabet(), [[0], [3]], letters, sampling, heard.append)
    for row, result in enumerate(found):
        pieces = [piece.text for piece in heard if piece.row == row]
        assert "".join(pieces) == result.text and all(pieces)
    assert [result.text for result in found] == ["bcdef", "ef"]
    assert heard[:3] == [Piece(0, "b"), Piece(0, "c"), Piece(0, "d")]
    assert Piece(0, "ef") in heard  # only once `efx` is ruled out


def test_half_a_character_is_not_told() -> None:
    class Bytes(Letters):
        def decode(self, ids: Sequence[int]) -> str:
            return {(1,): "\ufffd", (1, 2): "é"}[tuple(ids)]

    heard: list[Piece] = []
    generate(Alphabet(), [[0]], Bytes(), SamplingConfig(max_new_tokens=2), heard.append)
    assert heard == [Piece(0, "é")]


def test_top_k_top_p_and_min_p_leave_the_likeliest() -> None:
    scores = np.log(np.array([0.1, 0.4, 0.05, 0.25, 0.2]))
    for sampling, kept in (
        (SamplingConfig(top_k=2), [1, 3]),
        (SamplingConfig(top_p=0.6), [1, 3]),
        (SamplingConfig(top_p=0.66), [1, 3, 4]),
        (SamplingConfig(top_p=1e-9), [1]),
        (SamplingConfig(min_p=0.4), [1, 3, 4]),
        (SamplingConfig(top_k=3, top_p=0.7), [1, 3]),
        (SamplingConfig(), [0, 1, 2, 3, 4]),
    ):
        ids, probabilities = candidates(scores, sampling)
        assert sorted(ids.tolist()) == kept, sampling
        expected = np.exp(scores[ids])
        assert np.abs(probabilities - expected / expected.sum()).max() < 1e-12


def test_top_p_beyond_the_first_thousand_tokens_is_the_same_as_a_full_sort(seed: int) -> None:
    scores = np.random.default_rng(seed).normal(0, 0.1, 5000)
    ids, _ = candidates(scores, SamplingConfig(top_p=0.9))
    order = np.argsort(-scores)
    total = np.cumsum(np.exp(scores[order]) / np.exp(scores).sum())
    assert set(ids.tolist()) == set(order[: int((total < 0.9).sum()) + 1].tolist())


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.4},
    ],
)
def test_the_distribution_is_that_of_transformers_rules(settings: dict[str, Any], seed: int) -> None:
    torch = pytest.importorskip("torch", reason="the oracle needs torch: install the extra `peers`")
    from transformers import generation as theirs

    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, 40).astype(np.float32)
    seen = rng.integers(0, 40, 6)
    sampling = SamplingConfig(**settings)
    rules: list[Any] = []
    if sampling.repetition_penalty != 1:
        rules.append(theirs.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    rules.append(theirs.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        rules.append(theirs.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        rules.append(theirs.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        rules.append(theirs.MinPLogitsWarper(sampling.min_p))
    scores = torch.tensor(logits, dtype=torch.float64)[None]
    for rule in rules:
        scores = rule(torch.tensor(seen)[None], scores)
    expected = torch.softmax(scores, -1)[0].numpy()

    class Recorded:
        def choice(self, ids: Any, p: Any) -> int:
            self.found = np.bincount(ids, p, 40)
            return int(ids[0])

    recorded = Recorded()
    choose_token(logits, seen, sampling, recorded)  # type: ignore[arg-type]
    assert np.abs(recorded.found - expected).max() < 1e-6


def test_greedy_takes_the_likeliest_after_penalty_and_ban() -> None:
    logits, rng = np.array([3.0, 2.9, 1.0, -1.0], np.float32), np.random.default_rng(0)
    none = np.array([], np.int64)
    assert choose_token(logits, none, SamplingConfig(), rng) == 0
    assert choose_token(logits, np.array([0]), SamplingConfig(repetition_penalty=1.1), rng) == 1
    assert choose_token(logits, none, SamplingConfig(banned=(0, 1)), rng) == 2
    drawn = {
        choose_token(logits, none, SamplingConfig(temperature=5.0, banned=(0, 2)), rng) for _ in range(200)
    }
    assert drawn == {1, 3}


@pytest.mark.filterwarnings("error")
def test_the_least_temperature_is_greedy_and_extreme_penalties_stay_numbers() -> None:
    logits, rng = np.array([3.0, 2.9, 1.0, -1.0], np.float32), np.random.default_rng(0)
    none = np.array([], np.int64)
    for temperature in (5e-324, 1e-310, 1e-100):
        assert choose_token(logits, none, SamplingConfig(temperature=temperature, banned=(3,)), rng) == 0
    for penalty, token in ((5e-324, 1), (1e308, 0)):
        least = SamplingConfig(temperature=1.0, repetition_penalty=penalty)
        seen = np.array([1, 3]) if penalty < 1 else np.array([1, 2, 3])
        assert choose_token(logits, seen, least, np.random.default_rng(0)) == token


def test_a_seed_repeats_a_text_and_a_row_does_not_depend_on_its_neighbours() -> None:
    settings = {"temperature": 3.0, "max_new_tokens": 20}
    first, second = continued("a", "b", seed=5, **settings)
    assert continued("a", "b", seed=5, **settings) == [first, second]
    assert continued("a", seed=5, **settings) == [first]
    assert first.ids != continued("a", seed=6, **settings)[0].ids
    assert 0 < first.explored <= 1 and continued("a")[0].explored == 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; allowed: >= 0"),
        ({"top_p": 0.0}, r"top_p is 0.0; allowed: \(0, 1\]"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": 2.0}, "min_p is 2.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; allowed: > 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"stop": ("",)}, "stop is"),
        ({"banned": (99,)}, "banned has ids outside the vocabulary of 9"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        continued("a", **settings)


def test_prompts_that_cannot_be_continued_are_refused() -> None:
    with pytest.raises(UserError, match="there is no prompt"):
        continued()
    with pytest.raises(UserError, match="prompt 2 is empty"):
        continued("a", "")
    with pytest.raises(UserError, match="prompt 1 has 5 tokens, but the model's context is 4: shorten it"):
        continued("abcde", engine=Alphabet(context=4))
    with pytest.raises(UserError, match="an id outside the model's vocabulary of 9"):
        generate(Alphabet(), [[9]], Letters())
    assert continued("abcde", engine=Alphabet(context=4, segmented=True))[0].text == "fgh"


def test_lengths_are_padded_to_powers_of_two_up_to_the_limit() -> None:
    assert [padded(n, 12) for n in (1, 2, 3, 5, 9, 12)] == [1, 2, 4, 8, 12, 12]
    assert padded(300, None) == 512
