"""From a recipe to what a language model trains on: corpus, tokenizer, tokens; all cached on disk."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.cache import cache_key, read_cache, write_cache
from common.checkpoint import TRAINING_FILE, read_json
from common.data.corpora import Corpus, Document, load_corpus
from common.data.language import PackedRows, Plan, Streams, TokenDocuments, read_tokens, write_tokens
from common.data.pydocs import PACKAGES
from common.errors import UserError
from common.language.config import InfinitoRecipe, LanguageDataConfig, LanguageRecipe
from common.language.text import LanguageTokenizer, corpus_tokenizer, load_tokenizer
from common.reranker.prepare import cache_root
from common.runs import package_versions


@dataclasses.dataclass(frozen=True)
class PreparedLanguage:
    """What training and evaluation read."""

    name: str  # of the corpus
    fingerprint: str  # of its text, of the tokenizer, and of what is counted
    tokenizer: LanguageTokenizer
    tokens: Path  # the folder of ArrayRecord
    notes: tuple[str, ...] = ()  # what stands for what

    def split(self, name: str, limit: int | None = None) -> TokenDocuments:
        """The tokens of a split, of its first `limit` documents where given."""
        documents = read_tokens(self.tokens, name)
        if limit is None or limit >= len(documents):
            return documents
        end = int(documents.starts[limit])
        return TokenDocuments(
            documents.ids[:end],
            documents.counted[:end],
            documents.starts[: limit + 1],
            documents.words[:limit],
            documents.bytes[:limit],
        )


def evaluation_recipe(
    directory: Path, name: str | None = None, form: Literal["literal", "detokenised"] | None = None
) -> LanguageRecipe:
    """A corpus, when absent the one that the model of a directory was trained on, with its tokenizer, counted
    as in its training. UserError where neither is known."""
    file = directory / TRAINING_FILE
    trained: dict[str, Any] = read_json(file)["config"]["data"] if file.exists() else {}
    usual = LanguageDataConfig()
    name = name or trained.get("name")
    if name is None:
        raise UserError(f"--data is missing: {directory} does not say what it was trained on")
    data = LanguageDataConfig(
        name=name,
        form=form or trained.get("form", usual.form),
        mask_unknown=trained.get("mask_unknown", usual.mask_unknown),
        mask_prompt=trained.get("mask_prompt", usual.mask_prompt),
    )
    return InfinitoRecipe(base=str(directory), data=data)


def recipe_corpus(recipe: LanguageRecipe) -> Corpus:
    """The recipe's corpus; the documentation here, which takes a while to read, is kept in the cache."""
    data = recipe.data
    if data.name != "pydocs":
        return load_corpus(data.name, data.form, seed=recipe.train.seed)
    versions = package_versions(PACKAGES)
    file = cache_root() / "corpora" / f"pydocs-{cache_key(platform.python_version(), versions)}.json"
    if not file.exists():
        corpus = load_corpus(data.name)
        rows = {
            split: [dataclasses.astuple(item) for item in items] for split, items in corpus.splits.items()
        }
        write_cache(file, json.dumps(rows).encode())
    splits = read_cache(file, lambda path: json.loads(path.read_text()))
    return Corpus("pydocs", {split: tuple(Document(*row) for row in rows) for split, rows in splits.items()})


def prepare_language(recipe: LanguageRecipe, *, say: Callable[[str], None] = print) -> PreparedLanguage:
    """Load the corpus, train or load the tokenizer, write the tokens; what is known is taken from the cache.

    Raises UserError for what is wrong with the data, and for a corpus without train or dev.
    """
    corpus = recipe_corpus(recipe)
    for split in ("train", "dev"):
        corpus.split(split)
    for line in (corpus.describe(), *corpus.notes):
        say(line)
    tokenizer = recipe_tokenizer(recipe, corpus)
    say(f"tokenizer: {tokenizer.name}, {tokenizer.vocab_size:,} tokens")
    tokens = corpus_tokens(recipe, corpus, tokenizer)
    return PreparedLanguage(corpus.name, tokens.name, tokenizer, tokens, corpus.notes)


def recipe_tokenizer(recipe: LanguageRecipe, corpus: Corpus) -> LanguageTokenizer:
    """That of the base, where there is one, else the recipe's."""
    if recipe.base is not None:
        return load_tokenizer(recipe.base)
    if recipe.data.tokenizer == "bpe":
        return corpus_tokenizer(corpus.split("train"), recipe.data.vocab_size, cache_root() / "tokenizers")
    return load_tokenizer(recipe.data.tokenizer)


def corpus_tokens(recipe: LanguageRecipe, corpus: Corpus, tokenizer: LanguageTokenizer) -> Path:
    """The folder with a corpus's tokens, counted as the recipe says."""
    return write_tokens(
        corpus,
        tokenizer,
        cache_root() / "tokens",
        mask_unknown=recipe.masks_unknown,
        mask_prompt=recipe.data.mask_prompt,
    )


def plan_language(recipe: LanguageRecipe, documents: TokenDocuments, end: int) -> Plan:
    """Streams for Infinito, packed rows for the others. UserError for a corpus smaller than one step."""
    train, context = recipe.train, recipe.model.context
    if not isinstance(recipe, InfinitoRecipe):
        fixed = recipe.distillation.teacher is not None and recipe.distillation.stored > 0
        return PackedRows(documents, context, train.batch_size, end, train.seed, fixed=fixed)
    return Streams(
        documents,
        context,
        train.batch_size,
        end,
        train.seed,
        unroll=train.unroll,
        reset_rate=train.reset_rate,
    )


def counted_tokens(documents: TokenDocuments) -> np.ndarray:
    """Counted tokens of each document, int64 [N]."""
    before = np.concatenate(([0], np.cumsum(documents.counted)))
    return np.diff(before[documents.starts])
