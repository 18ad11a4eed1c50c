"""Reading tokens step by step, as common.language.generation asks: cache and memory go in and come out.

Twin: mlx_impl/generation.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from numpy.typing import NDArray

from jax_impl.language import load_language_model
from jax_impl.models.decoder import LanguageModel
from jax_impl.models.dropout import row_keys


class Reading(NamedTuple):
    """What a model knows of each row of a batch."""

    memory: Any
    cache: Any


class ModelEngine:
    """A language model as common.language.generation.Engine, compiled once for each shape of a call;
    `set_state` gives it other weights."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.context, self.segmented = model.context, model.segmented
        self.vocab_size = int(model.config.vocab_size)
        self._graphdef, self._weights = nnx.split(model)
        self._read = jax.jit(self._compute, donate_argnums=1)
        self._renew = jax.jit(self._remember, donate_argnums=1)

    def set_state(self, state: Any) -> None:
        """Generate with these parameters from now on."""
        self._weights = state

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
        key = None if explore is None else jax.random.fold_in(jax.random.key(explore[0]), explore[1])
        state, logits = self._read(self._weights, state, ids, counts, key)
        return state, np.asarray(logits)

    def renew(self, state: Reading, rows: NDArray[np.bool_]) -> Reading:
        """End the segment of these rows [N]: what is important goes to the memory, the cache begins anew."""
        return self._renew(self._weights, state, rows)

    def _compute(self, weights: Any, state: Reading, ids: Any, counts: Any, key: Any) -> Any:
        model = nnx.merge(self._graphdef, weights)
        real = (jnp.arange(ids.shape[1]) < counts[:, None]).astype(jnp.int32)  # [N, S]
        explore = None if key is None else row_keys(key, ids.shape[0])
        last = jnp.maximum(counts - 1, 0)
        out = model(ids, real, memory=state.memory, cache=state.cache, explore=explore, at=last)
        return Reading(out.memory, out.cache), out.logits[:, 0]

    def _remember(self, weights: Any, state: Reading, rows: Any) -> Reading:
        model = nnx.merge(self._graphdef, weights)
        new = model.remember(state.memory, state.cache)

        def of_rows(a: jax.Array, b: jax.Array) -> jax.Array:
            return jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b)

        memory = jax.tree.map(of_rows, new, state.memory)
        cache = state.cache._replace(length=jnp.where(rows, 0, state.cache.length))
        return Reading(memory, model.recall(memory, cache))


def load_engine(directory: Path, *, dtype: DTypeLike = jnp.float32) -> ModelEngine:
    """The language model of a directory, ready to generate. Raises UserError as load_language_model."""
    return ModelEngine(load_language_model(directory, dtype=dtype)[0])
