"""A language model of LSTM layers: Infinito's recurrent control, of as many parameters.

Source: Hochreiter and Schmidhuber 1997; tied embeddings and dropout between layers as Merity et al. 2018
(AWD-LSTM), arXiv:1708.02182. Twin: mlx_impl/models/lstm.py.

Letters: N rows, S tokens, L layers, D width of embeddings, H width of a state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from common.language.architectures import InfinitoConfig
from jax_impl.models.bert import layer_keys, linear
from jax_impl.models.decoder import LanguageModel, LanguageOutput, chosen, dropped_embeddings
from jax_impl.models.dropout import dropout


class RecurrentState(NamedTuple):
    """What each row carries from token to token, and from segment to segment; zeros at the start."""

    hidden: jax.Array  # [N, L, H]
    cell: jax.Array  # [N, L, H]


class LSTMLayer(nnx.Module):
    """One layer; the forget gate starts open, by a constant 1."""

    def __init__(self, inputs: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.input_proj = linear(inputs, 4 * width, dtype=dtype, rngs=rngs)
        self.hidden_proj = linear(width, 4 * width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, hidden: jax.Array, cell: jax.Array, real: jax.Array, fresh: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Outputs [N, S, H], and hidden and cell [N, H] after x [N, S, D].

        Where `real` [N, S] is false the state stays as it is; where `fresh` [N, S] is true it begins anew.
        """

        def step(state: tuple[jax.Array, jax.Array], now: Any) -> Any:
            before, keep, restart = now
            hidden, cell = (jnp.where(restart[:, None], 0.0, part) for part in state)
            gates = before + self.hidden_proj(hidden)  # [N, 4 H]
            inner, forget, value, outer = jnp.split(gates.astype(jnp.float32), 4, axis=-1)
            new = jax.nn.sigmoid(forget + 1.0) * cell + jax.nn.sigmoid(inner) * jnp.tanh(value)
            out = jax.nn.sigmoid(outer) * jnp.tanh(new)
            kept = tuple(jnp.where(keep[:, None], a, b) for a, b in ((out, hidden), (new, cell)))
            return kept, kept[0]

        before = self.input_proj(x)  # [N, S, 4 H]
        steps = (before.swapaxes(0, 1), real.T, fresh.T)
        (hidden, cell), out = jax.lax.scan(step, (hidden, cell), steps)
        return out.swapaxes(0, 1).astype(x.dtype), hidden, cell


class LSTM(LanguageModel):
    """Embeddings, layers, a projection back to their width, logits; calls as LanguageModel says.

    Its memory is the RecurrentState, so a text has no longest length. A cache is not needed and not returned.

    Args:
      config: the settings of the Infinito that it is compared with.
      dtype: of the computation; parameters stay float32.
      rngs: for fresh parameters.
    """

    context = None

    def __init__(self, config: InfinitoConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        width, hidden = config.hidden_size, config.lstm_width()
        self.embed_tokens = nnx.Embed(config.vocab_size, width, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [
                LSTMLayer(hidden if index else width, hidden, dtype=dtype, rngs=rngs)
                for index in range(config.lstm_layers)
            ]
        )
        self.out_proj = linear(hidden, width, use_bias=False, dtype=dtype, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = linear(width, config.vocab_size, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        input_ids: jax.Array,
        segments: jax.Array | None = None,
        *,
        memory: RecurrentState | None = None,
        cache: Any = None,
        keys: jax.Array | None = None,
        explore: jax.Array | None = None,
        at: jax.Array | None = None,
        attention: bool = False,
    ) -> LanguageOutput:
        config = self.config
        if memory is None:
            memory = self.empty_memory(input_ids.shape[0])
        real = jnp.ones(input_ids.shape, bool) if segments is None else segments > 0  # [N, S]
        fresh = jnp.zeros(input_ids.shape, bool)
        if segments is not None:
            fresh = fresh.at[:, 1:].set(real[:, 1:] & (segments[:, 1:] != segments[:, :-1]))
        x = dropped_embeddings(config.blocks(), self.embed_tokens(input_ids), keys)  # [N, S, D]
        after = []
        for index, layer in enumerate(self.layers):
            x, hidden, cell = layer(x, memory.hidden[:, index], memory.cell[:, index], real, fresh)
            x = dropout(x, config.hidden_dropout, layer_keys(keys, index), site=1)  # [N, S, H]
            after.append((hidden, cell))
        out = self.out_proj(x)  # [N, S, D]
        hiddens, cells = zip(*after, strict=True)
        return LanguageOutput(
            logits=self.logits(chosen(out, at)),
            hidden=out,
            memory=RecurrentState(jnp.stack(hiddens, axis=1), jnp.stack(cells, axis=1)),
        )

    def empty_memory(self, rows: int) -> RecurrentState:
        shape = (rows, self.config.lstm_layers, self.config.lstm_width())
        return RecurrentState(jnp.zeros(shape), jnp.zeros(shape))

    def empty_cache(self, rows: int, capacity: int) -> None:
        return None
