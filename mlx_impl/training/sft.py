"""Supervised fine-tuning of a query expander: LoRA on golden rows, loss on the completion's tokens.

Batches follow from the seed and the step alone. Source: tobi/qmd, finetune/train.py. No twin: JAX trains the
same as a fine-tuning of its decoder (common/expansion/sft.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from common.data.expansion import ExpansionData, ExpansionRow
from common.data.language import batch_order, padded_length
from common.errors import UserError, listed
from common.expansion.config import SftConfig
from common.expansion.prompts import ExpansionPrompts
from common.metrics.expansion import score
from mlx_impl.models.qwen import LanguageModel, head, hidden_states
from mlx_impl.training.adapters import AdapterTrainer, Logged
from mlx_impl.training.generation import greedy


class TokenBatch(NamedTuple):
    """Token ids [B, S], padded with 0, and which of them (not the first) the loss is taken on.

    Where several rows stand in one sequence, `rows` [B, S] numbers them, and no token sees another row.
    """

    ids: mx.array
    mask: mx.array
    rows: mx.array | None = None


class SftTrainer(AdapterTrainer):
    """An SFT run of `data` on a model with a fresh adapter.

    UserError for rows that are longer than training.max_length.
    """

    def __init__(
        self,
        config: SftConfig,
        loaded: LanguageModel,
        prompts: ExpansionPrompts,
        data: ExpansionData,
        *,
        say: Callable[[str], None] = print,
    ) -> None:
        self.prompts, self.settings = prompts, config
        self.rows, self.held_out = data.train[: config.dataset.max_samples], data.val
        self._encoded: dict[tuple[int, int], tuple[list[int], int]] = {}
        self._check_lengths()
        training = config.training
        self.packs = self._packed() if training.packing else None
        batches = -(-len(self.packs or self.rows) // training.batch_size)
        self.per_epoch = -(-batches // training.gradient_accumulation_steps)
        steps = max(1, round(training.epochs * self.per_epoch))
        steps = min(steps, training.max_steps or steps)
        super().__init__(config, loaded, {"name": data.name}, steps, say=say)
        self._gradient = make_gradient(self.model, config.training.grad_checkpoint)
        self._loss = make_loss(self.model)

    def train_step(self, step: int) -> Logged:
        """One optimizer step: the mean loss over the tokens of its batches."""
        began = time.perf_counter()
        batches = self.batches(step)
        tokens = sum(int(batch.mask.sum()) for batch in batches)
        mx.random.seed(self.settings.training.seed * 1_000_003 + step)  # dropout
        loss, gradients = 0.0, None
        for batch in batches:
            part, found = self._gradient(batch, mx.array(1.0 / max(1, tokens)))
            gradients = found if gradients is None else tree_map(mx.add, gradients, found)
            mx.eval(part, gradients)  # one batch's activations at a time
            loss += float(part)
        rate = float(self.rate(step - 1))
        norm = float(self.update(gradients))
        seconds = time.perf_counter() - began
        return {
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": rate,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
        }

    def batches(self, step: int) -> list[TokenBatch]:
        """The batches of a step, numbered from 1."""
        training = self.settings.training
        epoch, place = divmod(step - 1, self.per_epoch)
        packs = self.packs or [[row] for row in range(len(self.rows))]
        lengths = [sum(len(self._row(row, epoch)[0]) for row in pack) for pack in packs]
        order = batch_order(lengths, training.batch_size, training.seed, epoch, training.length_buckets)
        each = training.gradient_accumulation_steps
        return [
            self._batch([packs[i] for i in chosen], epoch)
            for chosen in order[place * each : (place + 1) * each]
        ]

    def evaluate(self) -> Logged:
        """Loss and token accuracy on validation rows, and the mean score of greedy expansions."""
        rows = self.held_out
        loss = correct = tokens = 0.0
        size = self.settings.training.batch_size
        order = sorted(range(len(rows)), key=lambda i: len(self._example(rows[i], i)[0]))
        for first in range(0, len(order), size):
            batch = _padded([[self._example(rows[i], i)] for i in order[first : first + size]], size)
            found = [float(value) for value in self._loss(batch)]
            loss, correct, tokens = loss + found[0], correct + found[1], tokens + found[2]
        logged = {"loss": loss / max(1, tokens), "token_accuracy": correct / max(1, tokens)}
        return logged | self._scored() if self.settings.evaluation.queries else logged

    def _scored(self) -> Logged:
        settings = self.settings.evaluation
        chosen = self.held_out[: settings.queries]
        written = self.answers([row.query for row in chosen], greedy(settings.max_tokens))
        texts = [self.prompts.decode(row.ids) for row in written]
        scores = [score(row.query, text).reward for row, text in zip(chosen, texts, strict=True)]
        return {"score": float(np.mean(scores)), "ended": float(np.mean([row.ended for row in written]))}

    def _example(self, row: ExpansionRow, turn: int) -> tuple[list[int], int]:
        """Ids, and where the loss begins."""
        example = self.prompts.example(row, turn)
        return list(example.ids), example.start if self.settings.training.loss_on == "completion" else 1

    def _row(self, index: int, epoch: int) -> tuple[list[int], int]:
        key = index, (index + epoch) % 2
        if key not in self._encoded:
            self._encoded[key] = self._example(self.rows[index], key[1])
        return self._encoded[key]

    def _batch(self, packs: Sequence[Sequence[int]], epoch: int) -> TokenBatch:
        rows = [[self._row(index, epoch) for index in pack] for pack in packs]
        return _padded(rows, self.settings.training.batch_size, packed=self.packs is not None)

    def _packed(self) -> list[list[int]]:
        training = self.settings.training
        lengths = [(len(self._row(i, 0)[0]), len(self._row(i, 1)[0])) for i in range(len(self.rows))]
        return pack_rows(lengths, training.max_length, training.seed)

    def _check_lengths(self) -> None:
        limit = self.settings.training.max_length
        long = [
            f"{row.query!r}: {length} tokens"
            for index, row in enumerate(self.rows)
            if (length := max(len(self._row(index, turn)[0]) for turn in (0, 1))) > limit
        ]
        if long:
            raise UserError(
                f"{len(long)} of {len(self.rows)} rows are longer than training.max_length ({limit} "
                f"tokens):\n{listed(long, 5)}\nRaise it, or shorten them (dataset.trim_hyde: true)."
            )
        if not self.rows or not self.held_out:
            raise UserError(
                f"the data has {len(self.rows)} training and {len(self.held_out)} validation rows; both "
                "need one. Name a dataset.eval_split, or give more rows."
            )


def pack_rows(lengths: Sequence[tuple[int, int]], limit: int, seed: int) -> list[list[int]]:
    """Rows that share a sequence of at most `limit` tokens: first fit in a random order.

    A row has two lengths, of even and of odd epochs; a pack holds in both, so that the packs, and the steps
    of an epoch, stay the same.
    """
    packs: list[list[int]] = []
    free: list[tuple[int, int]] = []
    for row in np.random.default_rng(seed).permutation(len(lengths)).tolist():
        even, odd = lengths[row]
        fits = (i for i, left in enumerate(free) if left[0] >= even and left[1] >= odd)
        place = next(fits, len(packs))
        if place == len(packs):
            packs.append([])
            free.append((limit, limit))
        packs[place].append(row)
        free[place] = free[place][0] - even, free[place][1] - odd
    return packs


def learned_places(mask: mx.array) -> tuple[mx.array, mx.array]:
    """Of mask [B, S], the places before the tokens that the loss is taken on, [B, T], and which of them
    count.

    The head is computed at these places alone: in a large vocabulary most of its cost is saved.
    """
    rows = [np.flatnonzero(row) for row in np.array(mask)[:, 1:]]
    longest = padded_length(max(1, *map(len, rows)))
    places = np.zeros((len(rows), longest), np.int32)
    counted = np.zeros((len(rows), longest), bool)
    for number, row in enumerate(rows):
        places[number, : len(row)] = row
        counted[number, : len(row)] = True
    return mx.array(places), mx.array(counted)


def token_losses(
    model: Any, ids: mx.array, places: mx.array, rows: mx.array | None = None, *, checkpoint: bool = False
) -> tuple[mx.array, mx.array]:
    """Cross entropy of the tokens after `places` [B, T], and whether each was the likeliest, [B, T]."""
    rows = None if rows is None else rows[:, :-1]
    hidden = hidden_states(model, ids[:, :-1], rows, checkpoint=checkpoint)  # [B, S - 1, D]
    logits = head(model, mx.take_along_axis(hidden, places[..., None], axis=1))  # [B, T, V]
    targets = mx.take_along_axis(ids, places + 1, axis=1)
    losses = nn.losses.cross_entropy(logits.astype(mx.float32), targets)
    return losses, mx.argmax(logits, axis=-1) == targets


def make_gradient(
    model: Any, checkpoint: bool = False
) -> Callable[[TokenBatch, mx.array], tuple[mx.array, Any]]:
    """A compiled (batch, scale) -> scale times the summed loss, and its gradient; leaves the model as it
    is.
    """

    def total(
        ids: mx.array, places: mx.array, counted: mx.array, rows: mx.array | None, scale: mx.array
    ) -> mx.array:
        losses, _ = token_losses(model, ids, places, rows, checkpoint=checkpoint)
        return scale * (losses * counted).sum()

    value_and_gradient = nn.value_and_grad(model, total)
    captured = [model.state, mx.random.state]

    @partial(mx.compile, inputs=captured, outputs=[mx.random.state])
    def gradient(*batch: Any) -> tuple[mx.array, Any]:
        before = model.trainable_parameters()
        found = value_and_gradient(*batch)
        model.update(before)  # else what the trace has put there would stay
        return found

    return lambda batch, scale: gradient(batch.ids, *learned_places(batch.mask), batch.rows, scale)


def make_loss(model: Any) -> Callable[[TokenBatch], tuple[mx.array, mx.array, mx.array]]:
    """A compiled batch of single rows -> summed loss, correct tokens, tokens."""

    @partial(mx.compile, inputs=[model.state])
    def loss(ids: mx.array, places: mx.array, counted: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        losses, right = token_losses(model, ids, places)
        return (losses * counted).sum(), (right & counted).sum(), counted.sum()

    return lambda batch: loss(batch.ids, *learned_places(batch.mask))


def _padded(packs: Sequence[Sequence[tuple[list[int], int]]], size: int, packed: bool = False) -> TokenBatch:
    """Packs of rows as `size` sequences, the missing ones empty, their length a multiple of PADDED_TO,
    plus 1.
    """
    longest = max(sum(len(ids) for ids, _ in pack) for pack in packs)
    length = 1 + padded_length(longest - 1)
    ids, mask = np.zeros((size, length), np.int32), np.zeros((size, length), bool)
    numbers = np.zeros((size, length), np.int32)  # 0: padding
    for place, pack in enumerate(packs):
        at = 0
        for number, (row, start) in enumerate(pack, start=1):
            end = at + len(row)
            ids[place, at:end], numbers[place, at:end] = row, number
            mask[place, at + max(1, start) : end] = True
            at = end
    return TokenBatch(mx.array(ids), mx.array(mask), mx.array(numbers) if packed else None)
