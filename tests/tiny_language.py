"""A tiny corpus and recipes of language models that train in seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.language.config import (
    DecoderConfig,
    DecoderRecipe,
    FineTuneRecipe,
    IndraConfig,
    IndraRecipe,
    InfinitoConfig,
    InfinitoRecipe,
    LanguageDataConfig,
    LanguageEvalConfig,
    LanguageTrainConfig,
)

NAMES = ("Ada", "Bob", "Cleo", "Dan", "Eve")
THINGS = ("red kite", "blue boat", "green hat", "old map")
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def write_corpus(file: Path, paragraphs: int = 200) -> Path:
    """Paragraphs of a few sentences: what follows a name can be learned."""
    rng = np.random.default_rng(0)
    sentences = [f"{name} has the {thing}." for name, thing in zip(NAMES, THINGS * 2, strict=False)]
    file.write_text(
        "\n\n".join(" ".join(rng.choice(sentences, rng.integers(2, 6))) for _ in range(paragraphs)) + "\n"
    )
    return file


def write_articles(folder: Path, articles: int = 12) -> Path:
    """A folder in WikiText's form, with `<unk>`."""
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True)
    for part in ("train", "valid", "test"):
        lines = []
        for number in range(articles if part == "train" else 3):
            lines += [" ", f" = Article {number} = ", " "]
            for _ in range(int(rng.integers(3, 7))):
                lines.append(
                    f" {rng.choice(NAMES)} has the {rng.choice(THINGS)} , and <unk> @-@ like words . "
                )
        (folder / f"wiki.{part}.tokens").write_text("".join(f"{line}\n" for line in lines))
    return folder


def recipe(kind: str, data: Path, **train: Any) -> DecoderRecipe | IndraRecipe | InfinitoRecipe:
    """A run of 8 steps over rows of 16 tokens; `train` changes LanguageTrainConfig."""
    settings = {
        "epochs": 0.0,
        "max_steps": 8,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "checkpoint_every": 2,
        "evaluations": 2,
    }
    shared: dict[str, Any] = {
        "name": kind,
        "data": LanguageDataConfig(name=str(data), vocab_size=512),
        "evaluation": LanguageEvalConfig(batch_size=2),
    }
    if kind == "decoder":
        model = DecoderConfig(**SIZES, max_position_embeddings=16, hidden_dropout=0.1)
        return DecoderRecipe(model=model, train=LanguageTrainConfig(**(settings | train)), **shared)
    if kind == "indra":
        indra = IndraConfig(**SIZES, context=16, complex_width=8)
        return IndraRecipe(model=indra, train=LanguageTrainConfig(**(settings | train)), **shared)
    infinito = InfinitoConfig(**SIZES, context=16, memory_slots=8, memory_writes=4, hidden_dropout=0.1)
    streams = {"unroll": 2, "reset_rate": 0.1}
    return InfinitoRecipe(model=infinito, train=LanguageTrainConfig(**(settings | streams | train)), **shared)


def write_tasks(file: Path, extra: Sequence[Mapping[str, str]] = ()) -> Path:
    """40 rows that ask for the thing of a name, and others."""
    rows: list[Mapping[str, str]] = [
        {"instruction": f"Name thing {number} of {name}.", "output": f"the {thing}"}
        for number in range(8)
        for name, thing in zip(NAMES, THINGS * 2, strict=False)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *extra]))
    return file


def finetune_recipe(data: Path, base: Path, **train: Any) -> FineTuneRecipe:
    """A run of 6 steps of 4 rows."""
    settings = {"epochs": 0.0, "max_steps": 6, "batch_size": 4, "learning_rate": 1e-2, "checkpoint_every": 2}
    return FineTuneRecipe(
        name="tuned",
        base=str(base),
        data=LanguageDataConfig(name=str(data), mask_prompt=True),
        train=LanguageTrainConfig(**(settings | {"evaluations": 2} | train)),
        evaluation=LanguageEvalConfig(batch_size=2),
    )
