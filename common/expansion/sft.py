"""SFT of a query expander in the loop of the language models: QMD's rows, prompts and score.

What mlx_impl/train.py sft does with mlx-lm's Qwen3, this does with the shared decoder, of any backend; the
result is a whole Hugging Face checkpoint, the adapters merged. Source: tobi/qmd, finetune/train.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from common.cache import cache_key
from common.data.expansion import (
    EvalQuery,
    ExpansionData,
    ExpansionRow,
    load_expansions,
    read_queries,
    render_lines,
)
from common.data.language import TokenDocuments, joined_documents
from common.errors import UserError
from common.expansion.config import TINY, DatasetConfig
from common.expansion.evaluation import evaluate_expansions
from common.expansion.prompts import ExpansionPrompts, load_tokenizer
from common.expansion.recipe import ExpansionRecipe
from common.expansion.tiny_qwen import tiny_base
from common.language import text
from common.language.architectures import DecoderConfig
from common.language.generation import Engine, SamplingConfig, generate
from common.language.prepare import PreparedLanguage, with_base
from common.metrics.expansion import score
from common.report import Table
from common.reranker.prepare import cache_root

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class PreparedExpansion(PreparedLanguage):
    """Rows as documents: the train split in each form of the prompt, dev (no test) in each in turn."""

    _: dataclasses.KW_ONLY
    recipe: ExpansionRecipe
    data: ExpansionData
    prompts: ExpansionPrompts
    begins: int  # the token that every prompt begins with, which documents are stored without

    @property
    def frame(self) -> int:
        return self.begins

    @property
    def behind(self) -> int | None:
        return None  # a target ends with the end of its turn

    @property
    def forms(self) -> int:
        return 2 if self.prompts.system == "mixed" else 1

    def split(self, name: str, limit: int | None = None) -> TokenDocuments:
        rows = self.data.train if name == "train" else self.data.val[:limit]
        if name == "train":
            turns = [(row, form) for form in range(self.forms) for row in rows]
        else:
            turns = [(row, turn) for turn, row in enumerate(rows)]
        examples = [self.prompts.example(row, turn) for row, turn in turns]
        targets = [render_lines(row.lines) for row, _ in turns]
        return joined_documents(
            [np.asarray(example.ids[1:], np.int32) for example in examples],
            [np.asarray(example.mask[1:], bool) for example in examples],
            [sum(len(line.split()) + 1 for line in target.splitlines()) for target in targets],
            [len(target.encode()) for target in targets],
        )

    def scores(self, engine: Engine) -> dict[str, float]:
        """The mean score of greedy expansions of dev's first queries, and the share that ended."""
        texts, ended = self.expansions(engine)
        rows = self.scored_rows()
        scores = [score(row.query, text).reward for row, text in zip(rows, texts, strict=True)]
        return {"score": float(np.mean(scores)), "ended": float(np.mean(ended))}

    def expansions(self, engine: Engine) -> tuple[list[str], list[bool]]:
        """What a model writes for dev's first queries, and whether it came to an end."""
        settings, consumer = self.recipe.evaluation, self.prompts.system != "none"
        asked = [self.prompts.prompt(row.query, consumer=consumer) for row in self.scored_rows()]
        sampling, ending = SamplingConfig(max_new_tokens=settings.max_tokens), _Ending(self.prompts)
        made = [
            found
            for first in range(0, len(asked), settings.batch_size)
            for found in generate(engine, asked[first : first + settings.batch_size], ending, sampling)
        ]
        return [found.text for found in made], [found.finish == "end" for found in made]

    def scored_rows(self) -> tuple[ExpansionRow, ...]:
        """Dev's first rows, whose queries are expanded."""
        return self.data.val[: self.recipe.evaluation.queries]

    def score_tables(self, name: str, engine: Engine) -> list[Table]:
        """Scores of a model on dev's first queries, by group, with the template without a model beside it."""
        queries = [EvalQuery(row.query, "dev") for row in self.scored_rows()]
        return evaluate_expansions(queries, {name: self.expansions(engine)[0]}).tables()


class _Ending:
    """What generation asks of a tokenizer: the end of a turn, and the text of an expansion."""

    def __init__(self, prompts: ExpansionPrompts) -> None:
        self.end: int | None = prompts.end_id
        self._prompts = prompts

    def decode(self, ids: Sequence[int]) -> str:
        return self._prompts.decode(ids)


def prepare_expansion(
    recipe: ExpansionRecipe, *, say: Say = print
) -> tuple[ExpansionRecipe, PreparedExpansion]:
    """The recipe with its base, and the rows as tokens.

    UserError for rows that are bad, for a base that is not there or no Qwen3, for a tokenizer without a chat
    template.
    """
    if recipe.base != TINY:  # before the data: what a machine without a hub can do is said here
        recipe = _qwen(recipe)
    data = load_rows(recipe.data, say)
    if recipe.base == TINY:
        recipe = _qwen(dataclasses.replace(recipe, base=str(_cached_base(data, recipe.train.seed))))
    data = dataclasses.replace(data, train=data.train[: recipe.data.max_samples])
    if not data.train or not data.val:
        raise UserError(
            f"{data.name}: has {len(data.train)} training and {len(data.val)} validation rows; both need "
            "one. Name a --data.eval-split, or give more rows."
        )
    base, settings = Path(str(recipe.base)), recipe.prompt
    prompts = ExpansionPrompts(
        load_tokenizer(base),
        system=settings.system,
        final_newline=settings.final_newline,
        no_think=settings.no_think,
    )
    tokenizer = text.load_tokenizer(base, say=say)
    fingerprint = cache_key(data.fingerprint, tokenizer.fingerprint(), dataclasses.asdict(settings))
    begins, other = (prompts.prompt("a question", consumer=consumer)[0] for consumer in (False, True))
    if begins != other:
        raise UserError(
            f"{base}: its chat template begins prompts with different tokens, with and without a system "
            "prompt. Use Qwen3's own template."
        )
    return recipe, PreparedExpansion(
        data.name, fingerprint, tokenizer, base, recipe=recipe, data=data, prompts=prompts, begins=begins
    )


def load_rows(dataset: DatasetConfig, say: Say) -> ExpansionData:
    """The rows that the settings name; what was left out is said."""
    held_out = [query.query for query in read_queries(dataset.held_out)] if dataset.held_out else []
    data = load_expansions(
        dataset.name,
        held_out=held_out,
        split=dataset.split,
        eval_split=dataset.eval_split,
        trim_hyde=dataset.trim_hyde,
        on_bad_row=dataset.on_bad_row,
    )
    say(data.summary())
    return data


def _qwen(recipe: ExpansionRecipe) -> ExpansionRecipe:
    found = with_base(recipe)
    assert isinstance(found, ExpansionRecipe)
    if not isinstance(found.model, DecoderConfig) or found.model.family != "qwen3":
        kind = getattr(found.model, "family", type(found.model).__name__.removesuffix("Config").lower())
        raise UserError(
            f"base {recipe.base}: is of the kind {kind}; QMD's prompts are Qwen3's, and its export too. Name "
            "a Qwen3 checkpoint (Qwen/Qwen3-0.6B, -1.7B, -4B and their fine-tunes)."
        )
    return found


def _cached_base(data: ExpansionData, seed: int) -> Path:
    """The tiny random base of these rows; made once."""
    return tiny_base(cache_root() / "tiny_qwen" / f"{data.fingerprint}-{seed}", data, seed)
