"""Text from a language model: sampling rules, stop, batches, streaming, memory carried over segments.

A backend brings an Engine (jax_impl/generation.py, mlx_impl/generation.py); everything else is here, so that
both generate the same tokens from the same logits and seed. The order of the rules is transformers' own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError

Logits = NDArray[np.float32]
FEW = 1024  # the likeliest tokens that top-p looks at before it sorts the whole vocabulary
FINITE = np.finfo(np.float64).max / 4  # scores stay within, so that a difference of two is a number
CHUNK = 256  # tokens of a prompt read at once by a model without a context

Finish = Literal["end", "stop", "length", "context"]


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen. The defaults are greedy."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token, and top-k, top-p and min-p then change nothing."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability, in (0, 1]."""
    min_p: float = 0.0
    """Only tokens with this share of the likeliest one's probability, in [0, 1]."""
    repetition_penalty: float = 1.0
    """> 0; above 1, divides positive logits of tokens already in prompt or text and multiplies negative ones
    (Keskar et al. 2019)."""
    seed: int = 0
    """A row's draws depend on it and on the row's number alone, not on the others of the batch."""
    stop: tuple[str, ...] = ()
    """Texts that end a text; they are not part of it."""
    banned: tuple[int, ...] = ()
    """Ids that are never chosen (`<unk>`)."""
    explore: bool = False
    """Noise on memory queries, as in training; Infinito only."""

    @classmethod
    def of_flags(cls, flags: Any) -> Self:
        """The settings that a command's flags (a dataclass) name alike. UserError for one out of range."""
        names = {field.name for field in dataclasses.fields(cls)} & vars(flags).keys()
        sampling = cls(**{name: getattr(flags, name) for name in names})
        if wrong := sampling.problems("--"):
            raise UserError("; ".join(wrong))
        return sampling

    def problems(self, prefix: str = "") -> list[str]:
        """Every field out of range, in words."""
        checks = [
            ("max_new_tokens", self.max_new_tokens >= 1, ">= 1"),
            ("temperature", self.temperature >= 0, ">= 0; 0 is greedy"),
            ("top_k", self.top_k >= 0, ">= 0; 0 is all"),
            ("top_p", 0 < self.top_p <= 1, "(0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "[0, 1]"),
            ("repetition_penalty", self.repetition_penalty > 0, "> 0"),
            ("seed", self.seed >= 0, ">= 0"),
            ("stop", all(self.stop), "texts that are not empty"),
        ]
        wrong = [(name, allowed) for name, good, allowed in checks if not good]
        said = {name: name.replace("_", "-") if prefix == "--" else name for name, _ in wrong}  # as typed
        return [
            f"{prefix}{said[name]} is {getattr(self, name)!r}; allowed: {allowed}" for name, allowed in wrong
        ]


@dataclasses.dataclass(frozen=True)
class Generated:
    """What came out for one prompt."""

    ids: tuple[int, ...]  # new tokens, without the end and without those of a stop text alone
    text: str  # of the new tokens, cut before a stop text
    finish: Finish  # end: the model's own; stop: a stop text; length; context: there is no more room
    explored: float  # share of the sampled tokens that were not the argmax of the logits


@dataclasses.dataclass(frozen=True)
class Piece:
    """New text of one row, as it comes."""

    row: int
    text: str


class Engine(Protocol):
    """A model that reads tokens. A state is what it knows of each row, opaque here."""

    @property
    def context(self) -> int | None: ...  # tokens of a text or segment at most; None without a limit
    @property
    def segmented(self) -> bool: ...  # a full context ends a segment, which `renew` remembers, not the text
    @property
    def vocab_size(self) -> int: ...
    def start(self, rows: int, capacity: int) -> Any: ...
    def read(
        self,
        state: Any,
        ids: NDArray[np.int32],
        counts: NDArray[np.int32],
        explore: tuple[int, int] | None = None,
    ) -> tuple[Any, Logits]:
        """(state, logits [N, V] after the last token) of ids [N, S], `counts` [N] of them real, the others on
        the right; a row of none stays as it was, with logits without meaning. `explore`, (seed, number of the
        call), turns on exploration. The old state is used up."""
        ...

    def renew(self, state: Any, rows: NDArray[np.bool_]) -> Any: ...  # ends the segment of these rows


class TextDecoder(Protocol):
    """A tokenizer's way back: ids to text, and the id that ends a text (None without one)."""

    @property
    def end(self) -> int | None: ...
    def decode(self, ids: Sequence[int]) -> str: ...


def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    tokenizer: TextDecoder,
    sampling: SamplingConfig | None = None,
    on_text: Callable[[Piece], None] | None = None,
) -> list[Generated]:
    """Continue each prompt of ids; `on_text` hears new text as it comes.

    UserError for settings out of range, an empty prompt, an id outside the vocabulary, and a prompt over
    the context of a model that has one.
    """
    sampling = sampling or SamplingConfig()
    if wrong := sampling.problems():
        raise UserError("sampling out of range: " + "; ".join(wrong))
    _check_prompts(engine, prompts, sampling)
    rows = [_Row(number, prompt, tokenizer, sampling) for number, prompt in enumerate(prompts)]
    reader = _Reader(engine, [len(row.prompt) for row in rows], sampling)
    logits = reader.prompts([row.prompt for row in rows])
    while True:
        for row in rows:
            if row.finish is None:
                row.choose(logits[row.number], on_text)
                if row.finish is None and reader.full(row.number):
                    row.end("context", on_text)
        going = [row for row in rows if row.finish is None]
        if not going:
            return [row.result() for row in rows]
        ids, counts = np.zeros((len(rows), 1), np.int32), np.zeros(len(rows), np.int32)
        for row in going:
            ids[row.number], counts[row.number] = row.ids[-1], 1
        logits = reader.read(ids, counts)


def choose_token(
    logits: Logits, seen: NDArray[np.integer[Any]], sampling: SamplingConfig, rng: np.random.Generator
) -> int:
    """The next token of one row, logits [V]; `seen` are the ids of its prompt and text, in any order."""
    scores = logits.astype(np.float64)
    if sampling.repetition_penalty != 1.0 and len(seen):
        known, penalty = np.unique(seen), sampling.repetition_penalty
        with np.errstate(over="ignore"):
            changed = np.where(scores[known] > 0, scores[known] / penalty, scores[known] * penalty)
        scores[known] = np.clip(changed, -FINITE, FINITE)
    if sampling.banned:
        scores[list(sampling.banned)] = -np.inf
    if sampling.temperature == 0:
        return int(np.argmax(scores))
    with np.errstate(over="ignore"):  # of a temperature near 0 only the largest stay
        scores = (scores - scores.max()) / sampling.temperature
    ids, probabilities = candidates(scores, sampling)
    return int(rng.choice(ids, p=probabilities))


def candidates(
    scores: NDArray[np.float64], sampling: SamplingConfig
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """(ids, probabilities) that top-k, then top-p, then min-p leave of scores [V], likeliest first where any
    of them is on."""
    ids = np.arange(len(scores))
    if 0 < sampling.top_k < len(scores):
        ids = _largest(scores, sampling.top_k)
    powers = np.exp(scores[ids] - scores.max())
    probabilities = powers / powers.sum()
    if sampling.top_p < 1.0:
        kept = _nucleus(probabilities, sampling.top_p)
        ids, probabilities = ids[kept], probabilities[kept]
    if sampling.min_p > 0.0:
        kept = np.flatnonzero(probabilities >= sampling.min_p * probabilities.max())
        ids, probabilities = ids[kept], probabilities[kept]
    return ids, probabilities / probabilities.sum()


def _largest(values: NDArray[np.float64], k: int) -> NDArray[np.intp]:
    """Indices of the k largest, largest first, the lower index first among equal ones."""
    border = -np.partition(-values, k - 1)[k - 1]
    above = np.flatnonzero(values >= border)
    return above[np.argsort(-values[above], kind="stable")][:k]


def _nucleus(probabilities: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """The fewest largest that together have at least top_p."""
    for size in (FEW, len(probabilities)):
        order = _largest(probabilities, min(size, len(probabilities)))
        total = np.cumsum(probabilities[order])
        if total[-1] >= top_p:
            break
    return order[: int(np.searchsorted(total, min(top_p, total[-1]))) + 1]


class _Row:
    """One text in the making."""

    def __init__(
        self, number: int, prompt: Sequence[int], tokenizer: TextDecoder, sampling: SamplingConfig
    ) -> None:
        self.number, self.prompt, self.tokenizer, self.sampling = number, list(prompt), tokenizer, sampling
        self.ids: list[int] = []
        self.finish: Finish | None = None
        self.rng = np.random.default_rng((sampling.seed, number))
        self.explored, self.told, self.text = 0, 0, ""

    def choose(self, logits: Logits, on_text: Callable[[Piece], None] | None) -> None:
        """Take the next token, and see whether it ends the text."""
        token = choose_token(logits, np.array(self.prompt + self.ids), self.sampling, self.rng)
        self.explored += token != int(np.argmax(logits))
        self.ids.append(token)
        if token == self.tokenizer.end:
            self.end("end", on_text)
            return
        if on_text or self.sampling.stop:
            self.text = self.tokenizer.decode(self.ids)
            if (cut := _first(self.text, self.sampling.stop)) is not None:
                self.text = self.text[:cut]
                self.end("stop", on_text)
                return
            self._tell(on_text, whole=False)
        if len(self.ids) == self.sampling.max_new_tokens:
            self.end("length", on_text)

    def end(self, finish: Finish, on_text: Callable[[Piece], None] | None) -> None:
        self.finish = finish
        if finish != "stop":
            self.text = self.tokenizer.decode(self._kept())
        self._tell(on_text, whole=True)

    def result(self) -> Generated:
        assert self.finish is not None
        return Generated(tuple(self._kept()), self.text, self.finish, self.explored / len(self.ids))

    def _kept(self) -> list[int]:
        return self.ids[:-1] if self.finish == "end" else self.ids

    def _tell(self, on_text: Callable[[Piece], None] | None, *, whole: bool) -> None:
        """Tell text that nothing can change any more: no half character, and no beginning of a stop text."""
        if on_text is None:
            return
        sure = len(self.text) if whole else len(self.text.rstrip("�"))
        if not whole:
            starts = [_overlap(self.text[:sure], stop) for stop in self.sampling.stop]
            sure -= max(starts, default=0)
        if sure > self.told:
            on_text(Piece(self.number, self.text[self.told : sure]))
            self.told = sure


class _Reader:
    """Feeds an engine, and ends segments where a context is full."""

    def __init__(self, engine: Engine, lengths: Sequence[int], sampling: SamplingConfig) -> None:
        self.engine, self.sampling = engine, sampling
        self.length = np.zeros(len(lengths), np.int64)  # tokens read of the present segment
        self.steps = 0
        context = engine.context
        wanted = max(lengths) + sampling.max_new_tokens
        capacity = wanted if context is None else context if engine.segmented else min(context, wanted)
        self.state = engine.start(len(lengths), padded(capacity, context))

    def prompts(self, prompts: Sequence[Sequence[int]]) -> Logits:
        """Logits [N, V] after each prompt, however many segments it has."""
        done = np.zeros(len(prompts), np.int64)
        logits = np.zeros((len(prompts), self.engine.vocab_size), np.float32)
        while any(done < [len(prompt) for prompt in prompts]):
            self._renew(np.array([done[n] < len(prompt) for n, prompt in enumerate(prompts)]))
            chunks = [list(p[done[n] : done[n] + self._room(n)]) for n, p in enumerate(prompts)]
            width = padded(max(map(len, chunks)), self.engine.context or CHUNK)
            ids = np.array([chunk + [0] * (width - len(chunk)) for chunk in chunks], np.int32)
            counts = np.array([len(chunk) for chunk in chunks], np.int32)
            found = self._read(ids, counts)
            logits[counts > 0] = found[counts > 0]
            done += counts
        return logits

    def read(self, ids: NDArray[np.int32], counts: NDArray[np.int32]) -> Logits:
        """Logits [N, V] after one more token of the rows with a count of 1."""
        self._renew(counts > 0)
        return self._read(ids, counts)

    def full(self, row: int) -> bool:
        """Whether a row's text can go on no further."""
        return not self.engine.segmented and self.length[row] == self.engine.context

    def _room(self, row: int) -> int:
        return CHUNK if self.engine.context is None else int(self.engine.context - self.length[row])

    def _renew(self, reading: NDArray[np.bool_]) -> None:
        if self.engine.segmented and (full := reading & (self.length == self.engine.context)).any():
            self.state, self.length[full] = self.engine.renew(self.state, full), 0

    def _read(self, ids: NDArray[np.int32], counts: NDArray[np.int32]) -> Logits:
        explore = (self.sampling.seed, self.steps) if self.sampling.explore else None
        self.state, logits = self.engine.read(self.state, ids, counts, explore)
        self.length += counts
        self.steps += 1
        return np.asarray(logits, np.float32)


def padded(size: int, limit: int | None) -> int:
    """The next power of two, or the limit where that is less: few shapes are compiled."""
    power = 1 << max(size - 1, 0).bit_length()
    return power if limit is None else min(power, limit)


def _check_prompts(engine: Engine, prompts: Sequence[Sequence[int]], sampling: SamplingConfig) -> None:
    if not prompts:
        raise UserError("there is no prompt: give at least one")
    for number, prompt in enumerate(prompts, 1):
        if not len(prompt):
            raise UserError(f"prompt {number} is empty: give at least one word, or the id that begins a text")
        if min(prompt) < 0 or max(prompt) >= engine.vocab_size:
            raise UserError(
                f"prompt {number} has an id outside the model's vocabulary of {engine.vocab_size}: use the "
                "tokenizer that was saved with the model"
            )
        if engine.context is not None and not engine.segmented and len(prompt) > engine.context:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens, but the model's context is {engine.context}: "
                "shorten it"
            )
    beyond = [token for token in sampling.banned if not 0 <= token < engine.vocab_size]
    if beyond:
        raise UserError(f"sampling.banned has ids outside the vocabulary of {engine.vocab_size}: {beyond}")


def _first(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the stop texts begins."""
    return min(_places(text, stops), default=None)


def _places(text: str, stops: Sequence[str]) -> Iterator[int]:
    yield from (place for stop in stops if (place := text.find(stop)) >= 0)


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of text that may be the beginning of a stop text."""
    return next(
        (size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0
    )
