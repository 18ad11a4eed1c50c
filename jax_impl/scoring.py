"""Encoder and Scorer of a checkpoint directory: texts in, vectors or scores out, batched by length.

Twin: mlx_impl/scoring.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from common.backends import Scores, checkpoint_identity, checkpoint_name
from common.checkpoint import surviving
from common.config import DataConfig, RerankerConfig
from common.reranker.loading import longest_input, stored_precision
from common.text import Encoded, PairTokenizer, length_batches
from jax_impl.loading import load_bi_encoder, load_cross_encoder
from jax_impl.models.cross_encoder import CrossEncoder
from jax_impl.models.projector import fidelity_factors

TOKENS_PER_BATCH = {"cpu": 2048, "gpu": 131072}  # tokens, padding included
LENGTHS = DataConfig.length_buckets  # padded to; each is compiled once


def default_dtype(precision: str = "auto") -> DTypeLike:
    """bfloat16 on GPU and float32 elsewhere, unless named: XLA's CPU runs bfloat16 slower than float32."""
    if precision == "auto":
        return jnp.dtype(jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32)
    return jnp.dtype(precision)


def accelerator() -> str | None:
    """The devices in words; None where the CPU computes."""
    devices = jax.devices()
    return None if devices[0].platform == "cpu" else f"{len(devices)} x {devices[0].device_kind}"


def batches_by_length(
    encodeds: Sequence[Encoded], limit: int | None = None
) -> Iterator[tuple[np.ndarray, int, int]]:
    """`length_batches` of as many tokens as suit the device."""
    budget = TOKENS_PER_BATCH.get(jax.default_backend(), TOKENS_PER_BATCH["gpu"])
    return length_batches(encodeds, LENGTHS, budget, limit)


def run_batched(
    encodeds: Sequence[Encoded],
    pad: Callable[[Sequence[Encoded], int], tuple[np.ndarray, np.ndarray]],
    call: Callable[[jax.Array, jax.Array], Any],
    on_batch: Callable[[int], None] | None = None,
    *,
    limit: int | None = None,
) -> list[np.ndarray]:
    """Apply `call` (arrays or a tuple of arrays, rows first) to all texts and return its outputs in order.

    The next batch is sent off before the last one is fetched, so that a GPU never waits for the host.
    """
    outputs: list[np.ndarray] = []
    pending: tuple[np.ndarray, Any] | None = None

    def collect(indices: np.ndarray, result: Any) -> None:
        arrays = [np.asarray(a)[: len(indices)] for a in jax.tree.leaves(result)]
        if not outputs:
            outputs.extend(np.empty((len(encodeds), *a.shape[1:]), a.dtype) for a in arrays)
        for output, array in zip(outputs, arrays, strict=True):
            output[indices] = array
        if on_batch is not None:
            on_batch(len(indices))

    for indices, rows, length in batches_by_length(encodeds, limit):
        ids, sides = pad([encodeds[i] for i in indices], length)
        missing = ((0, rows - len(indices)), (0, 0))
        result = call(jnp.asarray(np.pad(ids, missing)), jnp.asarray(np.pad(sides, missing)))
        if pending is not None:
            collect(*pending)
        pending = (indices, result)
    if pending is not None:
        collect(*pending)
    return outputs


class JaxEncoder:
    """A sentence encoder for the dense first stage."""

    def __init__(self, directory: Path, max_tokens: int | None = None) -> None:
        directory = surviving(directory)
        self.name = checkpoint_name(directory)
        dtype = default_dtype()
        model = load_bi_encoder(directory, dtype=dtype)
        self.tokenizer = PairTokenizer(directory)
        self._positions = model.encoder.config.positions
        self.max_tokens = min(max_tokens or longest_input(directory), self._positions)
        self.dim = model.encoder.config.hidden_size
        self.identity = checkpoint_identity(directory, self.max_tokens, str(dtype))
        graphdef, state = nnx.split(model)
        self._call = functools.partial(jax.jit(lambda s, i, m: nnx.merge(graphdef, s)(i, m > 0)), state)

    def encode(self, texts: Sequence[str], *, kind: Literal["query", "passage"] = "passage") -> np.ndarray:
        """Unit vectors [N, dim], float32. The two kinds of text are encoded alike."""
        if not texts:
            return np.zeros((0, self.dim), np.float32)
        encodeds = self.tokenizer.encode_texts(texts, self.max_tokens)
        return run_batched(encodeds, self.tokenizer.pad, self._call, limit=self._positions)[0]


class JaxOriginal:
    """The frozen reranker that a retraining preserves (common.data.original); `states` asks for those too."""

    def __init__(self, model: CrossEncoder, tokenizer: PairTokenizer, identity: str, *, states: bool) -> None:
        self.identity = f"{identity}{'-states' if states else ''}"
        self._tokenizer, self._positions = tokenizer, model.encoder.config.positions
        graphdef, state = nnx.split(model)
        self._call = functools.partial(jax.jit(functools.partial(_outputs, graphdef, states)), state)

    def outputs(
        self, encodeds: Sequence[Encoded], on_batch: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """float32 [N, 1 + 4C]: the full score, then query re and im, passage re and im (none: [N, 1])."""
        return run_batched(encodeds, self._tokenizer.pad, self._call, on_batch, limit=self._positions)[0]


class JaxScorer:
    """A reranker: pairs of texts in, scores out. `fusion_weight` is the first stage's, chosen on dev."""

    def __init__(
        self,
        model: CrossEncoder,
        tokenizer: PairTokenizer,
        *,
        name: str,
        identity: str = "",
        fusion_weight: float = 0.0,
    ) -> None:
        self.name, self.identity = name, identity
        self.fusion_weight, self.tokenizer = fusion_weight, tokenizer
        self._positions = model.encoder.config.positions
        self._graphdef, self._state = nnx.split(model)
        self._call = jax.jit(functools.partial(_score, self._graphdef))

    def score(
        self,
        queries: Sequence[str],
        passages: Sequence[str],
        on_batch: Callable[[int], None] | None = None,
    ) -> Scores:
        """Scores of the pairs (queries[i], passages[i]), each [N] float32.

        `on_batch` is told the number of pairs done after each batch.
        """
        return self.score_encoded(self.tokenizer.encode_pairs(queries, passages), on_batch)

    def score_encoded(
        self, encodeds: Sequence[Encoded], on_batch: Callable[[int], None] | None = None
    ) -> Scores:
        """As `score`, for pairs that are tokens already."""
        if not encodeds:
            return Scores(*(np.zeros(0, np.float32) for _ in range(5)))
        call = functools.partial(self._call, self._state)
        return Scores(*run_batched(encodeds, self.tokenizer.pad, call, on_batch, limit=self._positions))

    def set_state(self, state: Any) -> None:
        """Score with other parameters of the same model."""
        self._state = state


def load_encoder(directory: Path) -> JaxEncoder:
    """The Encoder of a directory (common.backends)."""
    return JaxEncoder(Path(directory))


def load_scorer(directory: Path, recipe: RerankerConfig | None = None) -> JaxScorer:
    """The Scorer of a directory (common.backends); a base that was never trained starts as `recipe` says."""
    directory, recipe = surviving(Path(directory)), recipe or RerankerConfig()
    dtype, seed = default_dtype(stored_precision(directory, recipe)), recipe.train.seed
    loaded = load_cross_encoder(directory, recipe.model, dtype=dtype, seed=seed)
    tokenizer = PairTokenizer(
        directory,
        loaded.settings.get("max_query_tokens", recipe.data.max_query_tokens),
        loaded.settings.get("max_passage_tokens", recipe.data.max_passage_tokens),
    )
    limits = (tokenizer.max_query_tokens, tokenizer.max_passage_tokens)
    start = () if loaded.start == "resumed" else (recipe.model, seed)
    return JaxScorer(
        loaded.model,
        tokenizer,
        name=checkpoint_name(directory),
        identity=checkpoint_identity(directory, *limits, str(dtype), *start),
        fusion_weight=float(loaded.settings.get("fusion_weight", 0.0)),
    )


def _score(
    graphdef: nnx.GraphDef[CrossEncoder], state: Any, ids: jax.Array, sides: jax.Array
) -> tuple[jax.Array, ...]:
    out = nnx.merge(graphdef, state)(ids, sides)
    overlap, coherence = fidelity_factors(out.query, out.passage)
    return out.score, out.portable, out.resonance, overlap, coherence


def _outputs(
    graphdef: nnx.GraphDef[CrossEncoder], states: bool, state: Any, ids: jax.Array, sides: jax.Array
) -> jax.Array:
    out = nnx.merge(graphdef, state)(ids, sides)
    parts = (*out.query, *out.passage) if states else ()
    return jnp.concatenate([out.score[:, None], *parts], axis=1)  # [N, 1 + 4C]
