"""From a recipe to what a language model trains on: corpus, tokenizer, tokens; all cached on disk."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.cache import cache_key, read_cache, write_cache
from common.checkpoint import CONFIG_FILE, TRAINING_FILE, read_config, read_json
from common.data.corpora import Corpus, Document, load_corpus
from common.data.language import (
    PackedRows,
    Plan,
    Streams,
    TokenDocuments,
    WholeRows,
    read_tokens,
    write_tokens,
)
from common.data.pydocs import PACKAGES
from common.errors import UserError, listed
from common.hub import resolve_model
from common.language.architectures import DecoderConfig, InfinitoConfig, language_config
from common.language.config import FineTuneRecipe, InfinitoRecipe, LanguageDataConfig, LanguageRecipe
from common.language.generation import Engine
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

    @property
    def frame(self) -> int:
        """The token that stands before a document when it is read alone."""
        return self.tokenizer.end

    @property
    def behind(self) -> int | None:
        """The token to be learned behind a whole document; None where documents have one of their own."""
        return self.tokenizer.end

    @property
    def forms(self) -> int:
        """In how many forms the train split has each row, one form after the other."""
        return 1

    def scores(self, engine: Engine) -> dict[str, float]:
        """Figures of what a model generates on dev, `score` among them, for a recipe that is `scored`."""
        raise NotImplementedError

    def split(self, name: str, limit: int | None = None) -> TokenDocuments:
        """The tokens of a split, of its first `limit` documents where given."""
        documents = read_tokens(self.tokens, name)
        if limit is None or limit >= len(documents):
            return documents
        return documents.chosen(np.arange(limit))


LONGEST = 1024  # tokens of a row of a task, where neither recipe nor base ask for less


def with_base(recipe: LanguageRecipe) -> LanguageRecipe:
    """A fine-tuning recipe with its base's directory and settings; others as they are.

    UserError for a base that is not there, of an unknown architecture, or of a shorter context.
    """
    if not isinstance(recipe, FineTuneRecipe) or recipe.base is None:
        return recipe
    base = resolve_model(recipe.base, say=lambda _: None, remedy=recipe.remedy)
    model = language_config(read_config(base), base / CONFIG_FILE)
    context = recipe.context or min(model.context, LONGEST)
    if context > model.context:
        raise UserError(
            f"base {base}: has a context of {model.context} tokens, --context asks for {context}."
        )
    name = "max_position_embeddings" if isinstance(model, DecoderConfig) else "context"
    cut: dict[str, Any] = {name: context}
    return dataclasses.replace(recipe, base=str(base), model=dataclasses.replace(model, **cut)).validate()


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
        documents = corpus.split(split)
        if isinstance(recipe, FineTuneRecipe) and recipe.data.mask_prompt:
            _check_answers(corpus.name, documents)
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


def _check_answers(name: str, documents: Sequence[Document]) -> None:
    """UserError for running text among the rows of a task: it has no answer to be learned alone."""
    running = [document.text[:60] for document in documents if not document.prompt]
    if running:
        raise UserError(
            f"{name}: {len(running)} of {len(documents)} rows have text, but no prompt with an answer:\n"
            f"{listed([repr(text) for text in running], 3)}\nGive rows of instruction + output and the like "
            "(README), or learn all of the text: --data.no-mask-prompt."
        )


def plan_language(
    recipe: LanguageRecipe, prepared: PreparedLanguage, say: Callable[[str], None] = print
) -> Plan:
    """Whole rows for fine-tuning, streams for a memory, packed rows for the others.

    UserError for a corpus smaller than one step, and for rows of a task that are longer than the context.
    """
    train, context, documents = recipe.train, recipe.model.context, prepared.split("train")
    end = prepared.tokenizer.end
    if isinstance(recipe, FineTuneRecipe) and recipe.whole_rows:
        fitting = _fitting(recipe, context, prepared, documents, say)
        return WholeRows(
            fitting,
            context,
            train.batch_size,
            prepared.frame,
            prepared.behind,
            train.seed,
            forms=prepared.forms,
        )
    if not isinstance(recipe.model, InfinitoConfig):
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


def _fitting(
    recipe: FineTuneRecipe,
    context: int,
    prepared: PreparedLanguage,
    documents: TokenDocuments,
    say: Callable[[str], None],
) -> TokenDocuments:
    """The rows that fit the context; UserError, or a word, about the others."""
    # of a frame and what is behind, the last token is only a label
    sizes = documents.lengths() + (prepared.behind is not None)
    rows = len(documents) // prepared.forms
    long = np.unique(np.flatnonzero(sizes > context) % max(1, rows))
    if not len(long):
        return documents
    what = f"{len(long)} of {rows} rows are longer than the context of {context} tokens"
    if recipe.on_long_row == "skip":
        say(f"{what}: left out")
        keep = np.setdiff1d(np.arange(rows), long)
        return documents.chosen(np.concatenate([keep + rows * form for form in range(prepared.forms)]))
    shown = [
        f"{sizes[row]} tokens: {prepared.tokenizer.decode(documents.ids[documents.document(row)][:16])!r}"
        for row in map(int, long[:5])
    ]
    raise UserError(
        f"{what}:\n{listed(shown, 5)}\nShorten them, raise --context, or leave them out: --on-long-row skip."
    )


def counted_tokens(documents: TokenDocuments) -> np.ndarray:
    """Counted tokens of each document, int64 [N]."""
    before = np.concatenate(([0], np.cumsum(documents.counted)))
    return np.diff(before[documents.starts])
