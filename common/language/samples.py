"""What a language model writes, measured: prompts from a split, continuations, human text beside them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from common.backends import checkpoint_name, language_module
from common.data.language import TokenDocuments
from common.errors import UserError
from common.hub import resolve_model
from common.language.config import MODEL_REMEDY
from common.language.generation import Engine, Generated, Piece, SamplingConfig, generate
from common.language.text import LanguageTokenizer, load_tokenizer
from common.metrics.language import bleu, self_bleu, text_metrics
from common.report import Table

# The source's demonstration: a story, an explanation, a description, an instruction.
DEMO_PROMPTS = (
    "Once upon a time",
    "The history of",
    "In the field of science ,",
    "The city is known for",
    "### Instruction:\nExplain what a computer is.\n\n### Response:\n",
)


BATCH = 16  # prompts continued at once


@dataclasses.dataclass(frozen=True)
class LanguageGenerator:
    """A language model with its tokenizer."""

    name: str
    engine: Engine
    tokenizer: LanguageTokenizer

    def generate(
        self,
        prompts: Sequence[str],
        sampling: SamplingConfig,
        on_text: Callable[[Piece], None] | None = None,
    ) -> list[Generated]:
        """Continue texts. UserError for an empty one, a too long one, and settings out of range."""
        return self.continued(
            [self.tokenizer.encode(prompt).tolist() for prompt in prompts], sampling, on_text
        )

    def continued(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        on_text: Callable[[Piece], None] | None = None,
    ) -> list[Generated]:
        """Continue token ids, BATCH prompts at a time; each batch has draws of its own."""
        made: list[Generated] = []
        for start in range(0, len(prompts), BATCH):
            own = dataclasses.replace(sampling, seed=sampling.seed + start)
            made += generate(self.engine, prompts[start : start + BATCH], self.tokenizer, own, on_text)
        return made


def load_generator(
    name: str | Path, backend: str = "auto", *, say: Callable[[str], None] = print
) -> LanguageGenerator:
    """The language model of a directory, run or name, with its tokenizer. Raises UserError."""
    directory = resolve_model(name, say=say, remedy=MODEL_REMEDY)
    engine: Engine = language_module(backend, "generation", directory).load_engine(directory)
    return LanguageGenerator(checkpoint_name(directory), engine, load_tokenizer(directory))


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Beginnings of documents and how their authors went on."""

    prompts: list[list[int]]
    human: list[list[int]]


def split_prompts(
    documents: TokenDocuments, *, count: int, prompt_tokens: int, new_tokens: int, seed: int
) -> Prompts:
    """`count` places drawn with `seed`, each with as much text behind it as is generated.

    UserError where no document is that long.
    """
    needed = prompt_tokens + new_tokens
    lengths = documents.lengths()
    long = np.flatnonzero(lengths >= needed)
    if not len(long):
        raise UserError(
            f"no document has {needed} tokens, a prompt of {prompt_tokens} and {new_tokens} after it; the "
            f"longest has {int(lengths.max(initial=0))}. Lower --prompt-tokens or --max-new-tokens."
        )
    rng = np.random.default_rng(seed)
    prompts, human = [], []
    for index in rng.choice(long, count, replace=len(long) < count):
        start = int(documents.starts[index]) + int(rng.integers(lengths[index] - needed + 1))
        ids = documents.ids[start : start + needed].tolist()
        prompts.append(ids[:prompt_tokens])
        human.append(ids[prompt_tokens:])
    return Prompts(prompts, human)


def generation_metrics(
    continuations: Sequence[Sequence[int]], human: Sequence[Sequence[int]], tokenizer: LanguageTokenizer
) -> dict[str, float]:
    """Everything that is measured of continuations (token ids); BLEU against how the authors went on."""
    texts, references = ([tokenizer.decode(ids) for ids in part] for part in (continuations, human))
    found = text_metrics(continuations, texts, tokenizer.unknown_ids)
    return found | bleu(texts, references) | {"self_bleu": self_bleu(texts)}


def measured_samples(
    generator: LanguageGenerator, prompts: Prompts, sampling: SamplingConfig
) -> tuple[dict[str, float], list[Generated]]:
    """The metrics of a model's continuations, and these; exploration: the share of tokens not the argmax."""
    made = generator.continued(prompts.prompts, sampling)
    found = generation_metrics([item.ids for item in made], prompts.human, generator.tokenizer)
    lengths = [max(1, len(item.ids)) for item in made]
    explored = float(np.average([item.explored for item in made], weights=lengths))
    return found | {"exploration": explored}, made


def human_metrics(prompts: Prompts, tokenizer: LanguageTokenizer) -> dict[str, float]:
    """The same of the authors' own text, with another place as the reference: what good and chance give."""
    return generation_metrics(prompts.human, prompts.human[1:] + prompts.human[:1], tokenizer)


def metrics_table(title: str, columns: dict[str, dict[str, float]], note: str) -> Table:
    """A row for each metric, a column for each model or text."""
    names = list(dict.fromkeys(name for found in columns.values() for name in found))
    rows: list[list[str | float | None]] = [
        [name.replace("_", " "), *(_cell(found.get(name)) for found in columns.values())] for name in names
    ]
    return Table(title=title, columns=["metric", *columns], rows=rows, note=note)


def _cell(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)
