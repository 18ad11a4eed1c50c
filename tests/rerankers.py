"""A reranker's checkpoint directory without training: a tiny base whose head is drawn anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from common.config import ModelConfig
from common.text import PairTokenizer
from jax_impl.loading import LoadedReranker, load_cross_encoder, save_cross_encoder
from tests.tiny import write_base


def reranker(
    folder: Path, seed: int, head: str = "resonance", base: Path | None = None, **model: Any
) -> Path:
    """A checkpoint directory as a run writes it, its head drawn anew so that no part is trivial."""
    base = base or write_base(folder / "base", num_hidden_layers=2)
    settings = ModelConfig(base=str(base), head=head, start="masked_lm", **model)
    loaded = load_cross_encoder(base, settings, seed=seed)
    part, rng = loaded.model.resonance, np.random.default_rng(seed)
    part.u[...] = rng.normal(0, 0.3, part.u[...].shape)
    part.gamma[...], part.b[...] = np.asarray(7.0), np.asarray(-1.5)
    stored = loaded.settings | {"start": "masked_lm", "fusion_weight": 0.4}
    stored |= {"max_query_tokens": 8, "max_passage_tokens": 32}
    save_cross_encoder(
        folder / "best",
        LoadedReranker(loaded.model, loaded.config, stored, loaded.start),
        training={},
        tokenizer_save=PairTokenizer(base).save,
        card="",
    )
    return folder / "best"
