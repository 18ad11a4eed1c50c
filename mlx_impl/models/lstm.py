"""A language model of LSTM layers: Infinito's recurrent control, of as many parameters.

Source: Hochreiter and Schmidhuber 1997; tied embeddings and dropout between layers as Merity et al. 2018
(AWD-LSTM), arXiv:1708.02182. Twin: jax_impl/models/lstm.py.

Letters: N rows, S tokens, L layers, D width of embeddings, H width of a state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from common.language.architectures import InfinitoConfig
from mlx_impl.models.bert import layer_keys, linear
from mlx_impl.models.decoder import LanguageModel, LanguageOutput, chosen, dropped_embeddings
from mlx_impl.models.dropout import dropout
from mlx_impl.models.layers import Embed, Rngs


class RecurrentState(NamedTuple):
    """What each row carries from token to token, and from segment to segment; zeros at the start."""

    hidden: mx.array  # [N, L, H]
    cell: mx.array  # [N, L, H]


class LSTMLayer(nn.Module):
    """One layer; the forget gate starts open, by a constant 1."""

    def __init__(self, inputs: int, width: int, *, dtype: mx.Dtype, rngs: Rngs) -> None:
        super().__init__()
        self.input_proj = linear(inputs, 4 * width, dtype=dtype, rngs=rngs)
        self.hidden_proj = linear(width, 4 * width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: mx.array, hidden: mx.array, cell: mx.array, real: mx.array, fresh: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Outputs [N, S, H], and hidden and cell [N, H] after x [N, S, D].

        Where `real` [N, S] is false the state stays as it is; where `fresh` [N, S] is true it begins anew.
        """

        before = self.input_proj(x)  # [N, S, 4 H]
        outputs = []
        for place in range(x.shape[1]):
            keep, restart = real[:, place, None], fresh[:, place, None]
            hidden, cell = (mx.where(restart, 0.0, part) for part in (hidden, cell))
            gates = before[:, place] + self.hidden_proj(hidden)  # [N, 4 H]
            inner, forget, value, outer = mx.split(gates.astype(mx.float32), 4, axis=-1)
            new = mx.sigmoid(forget + 1.0) * cell + mx.sigmoid(inner) * mx.tanh(value)
            out = mx.sigmoid(outer) * mx.tanh(new)
            hidden, cell = mx.where(keep, out, hidden), mx.where(keep, new, cell)
            outputs.append(hidden)
        return mx.stack(outputs, axis=1).astype(x.dtype), hidden, cell


class LSTM(LanguageModel):
    """Embeddings, layers, a projection back to their width, logits; calls as LanguageModel says.

    Its memory is the RecurrentState, so a text has no longest length. A cache is not needed and not returned.

    Args:
      config: the settings of the Infinito that it is compared with.
      dtype: of the computation; parameters stay float32.
      rngs: for fresh parameters.
    """

    context = None

    def __init__(self, config: InfinitoConfig, *, dtype: mx.Dtype = mx.float32, rngs: Rngs) -> None:
        super().__init__()
        self.config = config
        width, hidden = config.hidden_size, config.lstm_width()
        self.embed_tokens = Embed(config.vocab_size, width, dtype=dtype, rngs=rngs)
        self.layers = [
            LSTMLayer(hidden if index else width, hidden, dtype=dtype, rngs=rngs)
            for index in range(config.lstm_layers)
        ]
        self.out_proj = linear(hidden, width, use_bias=False, dtype=dtype, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = linear(width, config.vocab_size, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        input_ids: mx.array,
        segments: mx.array | None = None,
        *,
        memory: RecurrentState | None = None,
        cache: Any = None,
        keys: mx.array | None = None,
        explore: mx.array | None = None,
        at: mx.array | None = None,
        attention: bool = False,
    ) -> LanguageOutput:
        config = self.config
        if memory is None:
            memory = self.empty_memory(input_ids.shape[0])
        real = mx.ones(input_ids.shape, mx.bool_) if segments is None else segments > 0  # [N, S]
        fresh = mx.zeros(input_ids.shape, mx.bool_)
        if segments is not None:
            changed = real[:, 1:] & (segments[:, 1:] != segments[:, :-1])
            fresh = mx.concatenate([fresh[:, :1], changed], axis=1)
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
            memory=RecurrentState(mx.stack(list(hiddens), axis=1), mx.stack(list(cells), axis=1)),
        )

    def empty_memory(self, rows: int) -> RecurrentState:
        shape = (rows, self.config.lstm_layers, self.config.lstm_width())
        return RecurrentState(mx.zeros(shape), mx.zeros(shape))

    def empty_cache(self, rows: int, capacity: int) -> None:
        return None
