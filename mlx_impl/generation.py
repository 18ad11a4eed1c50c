"""Reading tokens step by step, as common.language.generation asks: cache and memory go in and come out.

Twin: jax_impl/generation.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from numpy.typing import NDArray

from mlx_impl.language import load_language_model
from mlx_impl.models.decoder import LanguageModel
from mlx_impl.models.dropout import fold_in, row_keys
from mlx_impl.models.layers import given_parameters


class Reading(NamedTuple):
    """What a model knows of each row of a batch."""

    memory: Any
    cache: Any


class ModelEngine:
    """A language model as common.language.generation.Engine; `set_state` gives it other weights, for
    generating alone."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.context, self.segmented = model.context, model.segmented
        self.vocab_size = int(model.config.vocab_size)
        self._state: Any = None
        model.eval()

    def set_state(self, state: Any) -> None:
        """Generate with these parameters from now on; None: the model's own."""
        self._state = state

    def start(self, rows: int, capacity: int) -> Reading:
        """Rows that have read nothing, with room for `capacity` tokens of a text or segment."""
        memory = self.model.empty_memory(rows)
        return Reading(memory, self.model.recall(memory, self.model.empty_cache(rows, capacity)))

    def read(
        self,
        state: Reading,
        ids: NDArray[np.int32],
        counts: NDArray[np.int32],
        explore: tuple[int, int] | None = None,
    ) -> tuple[Reading, NDArray[np.float32]]:
        """As common.language.generation.Engine; logits [N, V]."""
        key = None if explore is None else fold_in(mx.random.key(explore[0]), explore[1])
        real = mx.array((np.arange(ids.shape[1]) < counts[:, None]).astype(np.int32))  # [N, S]
        with given_parameters(self.model, self._state):
            out = self.model(
                mx.array(ids),
                real,
                memory=state.memory,
                cache=state.cache,
                explore=None if key is None else row_keys(key, ids.shape[0]),
                at=mx.array(np.maximum(counts - 1, 0)),
            )
            logits = out.logits[:, 0]
            mx.eval(logits, out.memory, out.cache)  # else the graph of all calls so far stays
        return Reading(out.memory, out.cache), np.array(logits)

    def renew(self, state: Reading, rows: NDArray[np.bool_]) -> Reading:
        """End the segment of these rows [N]: what is important goes to the memory, the cache begins anew."""
        new, which = self.model.remember(state.memory, state.cache), mx.array(rows)

        def of_rows(a: mx.array, b: mx.array) -> mx.array:
            return mx.where(which.reshape(-1, *[1] * (a.ndim - 1)), a, b)

        memory = None if new is None else tree_map(of_rows, new, state.memory)
        cache = state.cache._replace(length=mx.where(which, 0, state.cache.length))
        return Reading(memory, self.model.recall(memory, cache))


def load_engine(directory: Path, *, dtype: mx.Dtype = mx.float32) -> ModelEngine:
    """The language model of a directory, ready to generate. Raises UserError as load_language_model."""
    return ModelEngine(load_language_model(directory, dtype=dtype)[0])
