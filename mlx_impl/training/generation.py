"""Batched generation: each prompt is read once for all its continuations; greedy, sampled, or held to a
grammar.

On mlx-lm's batch cache. The tokens depend on the prompts, the settings and the seed alone. No twin yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import BatchKVCache

from common.errors import UserError
from common.expansion.grammar import Grammar
from common.expansion.qmd import Sampling
from mlx_impl.models.qwen import head

CHECKED_EVERY = 8  # tokens between looks at which rows have ended
_DROPPED = 0.25  # share of ended rows from which on they are taken out of a batch


def greedy(max_tokens: int) -> Sampling:
    """The likeliest token each time."""
    return Sampling(temperature=0.0, top_k=0, top_p=1.0, presence_penalty=0.0, max_tokens=max_tokens)


class Continuation(NamedTuple):
    """Generated token ids without the end of turn, and whether that was reached."""

    ids: list[int]
    ended: bool


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    end: int,
    sampling: Sampling,
    copies: int = 1,
    seed: int = 0,
    batch_size: int = 16,
    grammar: Grammar | None = None,
) -> list[Continuation]:
    """`copies` continuations of each prompt, those of a prompt together, in the order of `prompts`.

    Temperature 0 is greedy, top_k 0 and top_p 1 take all tokens; the presence penalty looks at the answer
    alone.
    `batch_size` counts rows (at least one prompt's copies); prompts of like length share a batch. `end` is
    the token that ends a turn. UserError where a prompt and max_tokens exceed the model's context.
    """
    _check_room(model, prompts, sampling.max_tokens)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    size = max(1, batch_size // copies)
    found: list[list[Continuation]] = [[] for _ in prompts]
    for number, first in enumerate(range(0, len(order), size)):
        chosen = order[first : first + size]
        batch = _Batch(model, end, sampling, grammar)
        keys = mx.random.split(mx.random.key(seed * 100_003 + number), sampling.max_tokens)
        rows = batch.run([prompts[i] for i in chosen], copies, keys)
        for place, i in enumerate(chosen):
            found[i] = rows[place * copies : (place + 1) * copies]
    mx.clear_cache()
    return [row for rows in found for row in rows]


def _check_room(model: Any, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    context = model.args.max_position_embeddings
    longest = max(map(len, prompts), default=0)
    if longest + max_tokens > context:
        raise UserError(
            f"the longest prompt has {longest} tokens, and up to {max_tokens} are to follow; the model's "
            f"context is {context}. Shorten the query, or lower the limit of new tokens (max_tokens)."
        )


class _Batch:
    """Rows that are continued together; ended ones are taken out now and then."""

    def __init__(self, model: Any, end: int, sampling: Sampling, grammar: Grammar | None) -> None:
        self.model, self.end, self.sampling, self.grammar = model, end, sampling, grammar
        self.every = 1 if grammar or sampling.presence_penalty else CHECKED_EVERY
        self.cache: list[Any] = []
        self.rows: list[int] = []  # of each row in the cache, its place in `written`
        self.written: list[list[int]] = []

    def run(self, prompts: Sequence[Sequence[int]], copies: int, keys: mx.array) -> list[Continuation]:
        """Continue each prompt `copies` times by at most len(keys) tokens."""
        logits = self._read(prompts, copies)  # [N, V]
        self.rows = list(range(len(logits)))
        self.written = [[] for _ in self.rows]
        states = [self.grammar.start for _ in self.rows] if self.grammar else []
        pending: list[mx.array] = []
        for step in range(len(keys)):
            tokens = _draw(self._held(logits, states), self.sampling, keys[step])  # [N]
            pending.append(tokens)
            last = step + 1 == len(keys)
            if len(pending) == self.every or last:
                for row, new in zip(self.rows, np.array(mx.stack(pending, axis=1)).tolist(), strict=True):
                    self.written[row] += new
                pending = []
                if self.grammar:
                    now = [self.written[row][-1] for row in self.rows]
                    states = [self.grammar.advance(s, t) for s, t in zip(states, now, strict=True)]
                kept = self._living()
                if last or not kept:
                    break
                states = [states[place] for place in kept] if states else []
                tokens = mx.array([self.written[row][-1] for row in self.rows])
            logits = self._forward(tokens[:, None])
        return [_cut(ids, self.end) for ids in self.written]

    def _read(self, prompts: Sequence[Sequence[int]], copies: int) -> mx.array:
        """Fill the cache from left-padded prompts, then repeat each row `copies` times."""
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        ids = np.zeros((len(prompts), longest), np.int32)
        for row, (prompt, left) in enumerate(zip(prompts, padding, strict=True)):
            ids[row, left:] = prompt
        self.cache = [BatchKVCache(padding) for _ in self.model.layers]
        logits = self._forward(mx.array(ids))
        if copies > 1:
            for layer in self.cache:
                layer.keys, layer.values = (mx.repeat(x, copies, axis=0) for x in (layer.keys, layer.values))
                layer.offset = mx.repeat(layer.offset, copies)
                layer.left_padding = mx.repeat(layer.left_padding, copies)
            logits = mx.repeat(logits, copies, axis=0)
        mx.eval(logits, [layer.keys for layer in self.cache], [layer.values for layer in self.cache])
        return logits

    def _forward(self, ids: mx.array) -> mx.array:
        """Logits [N, V] of the token after the last one of ids [N, S], in float32."""
        logits = head(self.model, self.model.model(ids, self.cache)[:, -1])
        mx.async_eval(logits)
        return logits.astype(mx.float32)

    def _held(self, logits: mx.array, states: Sequence[Any]) -> mx.array:
        """The logits with the presence penalty, and without what the grammar forbids."""
        if self.sampling.presence_penalty:
            window = self.sampling.penalty_window
            for place, row in enumerate(self.rows):
                recent = sorted(set(self.written[row][-window:]))
                if recent:
                    logits[place, mx.array(recent)] -= self.sampling.presence_penalty
        if self.grammar:
            allowed = np.stack([self.grammar.allowed(state) for state in states])
            logits = mx.where(mx.array(allowed), logits, -mx.inf)
        return logits

    def _living(self) -> list[int]:
        """Take ended rows out of the cache when they are many; the places that stay, none when all ended."""
        living = [place for place, row in enumerate(self.rows) if self.end not in self.written[row]]
        if not living or len(living) > (1 - _DROPPED) * len(self.rows):
            return list(range(len(self.rows))) if living else []
        for layer in self.cache:
            layer.filter(mx.array(living))
        self.rows = [self.rows[place] for place in living]
        return living


def _draw(logits: mx.array, sampling: Sampling, key: mx.array) -> mx.array:
    """A token for each row of logits [N, V]."""
    if sampling.temperature == 0:
        return mx.argmax(logits, axis=-1)
    if not sampling.top_k and sampling.top_p >= 1:
        return mx.random.categorical(logits / sampling.temperature, key=key)
    size = logits.shape[-1]
    order = mx.argsort(-logits, axis=-1)[:, : min(sampling.top_k or size, size)]  # [N, K]
    best = mx.take_along_axis(logits, order, axis=-1)
    probabilities = mx.softmax(best, axis=-1)
    before = mx.cumsum(probabilities, axis=-1) - probabilities
    best = mx.where(before < sampling.top_p, best, -mx.inf)
    choice = mx.random.categorical(best / sampling.temperature, key=key)
    return mx.take_along_axis(order, choice[:, None], axis=-1)[:, 0]


def _cut(ids: list[int], end: int) -> Continuation:
    return Continuation(ids[: ids.index(end)], True) if end in ids else Continuation(ids, False)
