"""The training loop of a language model, for both backends: steps, dev perplexity, best, exact resume.

A backend's trainer derives from LanguageLoop and brings model, step and state:
{jax_impl,mlx_impl}/training/language.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.checkpoint import read_config
from common.config import to_dict
from common.data.language import LanguageBatch
from common.errors import UserError
from common.hub import resolve_model
from common.language.architectures import IndraConfig, LanguageModelConfig, language_config, parameter_count
from common.language.config import MODEL_REMEDY, TEACHER_REMEDY, LanguageRecipe
from common.language.evaluation import LanguageResult, evaluate_perplexity, teacher_certainties
from common.language.generation import Engine
from common.language.prepare import PreparedLanguage, plan_language
from common.language.text import TOKENIZER_FILE, copy_tokenizer, load_tokenizer
from common.runs import environment
from common.training import Notes, TrainingLoop, finite, planned_steps


class LanguageLoop(TrainingLoop[LanguageResult, LanguageBatch]):
    """One run of a recipe; see TrainingLoop.

    `scorer` of a backend gives a SegmentScorer, `engine` what generates. Raises UserError for a recipe
    that does not fit data or base, before anything is written.
    """

    def __init__(
        self, recipe: LanguageRecipe, prepared: PreparedLanguage, *, say: Callable[[str], None] = print
    ) -> None:
        super().__init__(recipe.train, say=say)
        self.recipe, self.prepared = recipe, prepared
        self.tokenizer = prepared.tokenizer
        self.base = None if recipe.base is None else resolve_model(recipe.base, say=say, remedy=MODEL_REMEDY)
        self.model_config = model_settings(recipe, prepared, self.base)
        self.teacher = teacher_directory(recipe, prepared, say=say)
        self.dev = prepared.split("dev", recipe.max_dev_documents)
        self.certainties: list[np.ndarray] | None = None  # of the teacher, on dev
        self.plan = plan_language(recipe, prepared, say)
        self.steps = planned_steps(recipe.train, len(self.plan))
        train = recipe.train
        self.say(
            f"model: {parameter_count(self.model_config):,} parameters; {self.steps:,} steps "
            f"({self.steps / len(self.plan):.2f} epochs) of {train.batch_size} x {train.unroll} x "
            f"{recipe.model.context} tokens"
        )

    def engine(self) -> Engine:
        """The model as `scorer` has it, to generate with."""
        raise NotImplementedError

    def ask_teacher(self, certainty: Callable[[np.ndarray, np.ndarray], np.ndarray], context: int) -> None:
        """Keep the teacher's certainty on dev, where the recipe aligns a state with it: it does not change.

        `certainty` is of input ids and segments [B, S]; `context` as the scorer's.
        """
        config, evaluation = self.model_config, self.recipe.evaluation
        stateful = isinstance(config, IndraConfig) and config.projector != "none"
        if stateful and self.recipe.distillation.phase_magnitude_weight:
            self.certainties = teacher_certainties(
                certainty,
                context,
                self.dev,
                self.prepared.frame,
                batch_size=evaluation.batch_size,
                stride=evaluation.stride,
            )

    def save_tokenizer(self, directory: Path) -> None:
        """Write the tokenizer; that of a base as it lies there, with its chat template."""
        self.tokenizer.save(directory)
        if self.base is not None:
            copy_tokenizer(self.base, directory)

    def token_ids(self) -> dict[str, Any]:
        """What config.json says of the tokens that begin and end a text: as the base's."""
        if self.base is None:
            return {"eos_token_id": self.tokenizer.end, "bos_token_id": self.tokenizer.end}
        names = ("eos_token_id", "bos_token_id", "pad_token_id")
        return {name: value for name, value in read_config(self.base).items() if name in names}

    def _batches(self) -> Any:
        return self.plan.loader(self.steps)

    def _log(self, step: int, logged: Mapping[str, Any], batch: LanguageBatch) -> str:
        values = finite(step, logged)
        beside = {"learning_rate": self._learning_rate(step), "counted_share": batch.token_share}
        self.folder.log(step, "train", values | beside)
        return f"loss {values['loss']:.4f}"

    def _tell(self, step: int, result: LanguageResult, notes: Notes) -> None:
        found = result.perplexity
        numbers = {
            "loss": math.log(found.token),
            "perplexity": found.token,
            "word_perplexity": found.word,
            "bits_per_byte": found.bits_per_byte,
        }
        aligned = dict(result.alignment or {})
        self.folder.log(step, "dev", numbers | (result.memory or {}) | aligned | dict(result.scores))
        scores = "".join(f", {name} {value:.4f}" for name, value in (aligned | dict(result.scores)).items())
        self.say(f"dev at step {step}, {result.mode}: {found.line()}{scores}")

    def _better(self, result: LanguageResult, notes: Notes) -> Notes | None:
        by_score = self.recipe.train.best == "score"
        found, before = result.scores["score"] if by_score else result.perplexity.token, notes["best"]
        better = before is None or (found > before if by_score else found < before)
        return {"best": found} if better else None

    def _measure(self) -> LanguageResult:
        result = self._perplexity()
        if not self.recipe.scored:
            return result
        return dataclasses.replace(result, scores=self.prepared.scores(self.engine()))

    def _perplexity(self) -> LanguageResult:
        scorer, evaluation = self.scorer(), self.recipe.evaluation
        try:
            return evaluate_perplexity(
                scorer,
                self.dev,
                self.prepared.frame,
                cache=scorer.carries,
                batch_size=evaluation.batch_size,
                stride=evaluation.stride,
                certainties=self.certainties,
            )
        except ValueError as error:
            raise UserError(
                f"dev cannot be measured: {error}. Lower --train.learning-rate, then start --fresh."
            ) from error

    def _write(self, directory: Path, step: int, result: LanguageResult) -> None:
        training = {
            "config": to_dict(self.recipe),
            "data": {"name": self.prepared.name, "fingerprint": self.prepared.fingerprint},
            "step": step,
            "dev": result.json(),
            **environment(self.device),
        }
        self.write(directory, training, language_card(self.recipe, self.model_config, training))

    def _memory_advice(self) -> str:
        train = self.recipe.train
        return (
            f"lower --train.batch-size ({train.batch_size}), --train.unroll ({train.unroll}) or "
            f"--evaluation.batch-size ({self.recipe.evaluation.batch_size})"
        )


def model_settings(
    recipe: LanguageRecipe, prepared: PreparedLanguage, base: Path | None
) -> LanguageModelConfig:
    """The settings of the model to train: the recipe's with the tokenizer's vocabulary, or the base's.

    UserError for a base of another kind, of a shorter context, or with fewer tokens than its tokenizer.
    """
    size = prepared.tokenizer.vocab_size
    if base is None:
        return dataclasses.replace(recipe.model, vocab_size=size)
    found = language_config(read_config(base), base)
    if type(found) is not type(recipe.model):
        raise UserError(
            f"base {base}: is a {type(found).__name__.removesuffix('Config')}, the recipe trains a "
            f"{type(recipe.model).__name__.removesuffix('Config')}. Use the recipe of its kind in configs/."
        )
    if found.context < recipe.model.context:
        raise UserError(
            f"base {base}: has a context of {found.context} tokens, the recipe asks for "
            f"{recipe.model.context}: lower the recipe's."
        )
    if found.vocab_size < size:
        raise UserError(f"base {base}: has {found.vocab_size:,} tokens, its tokenizer {size:,}: they differ.")
    rates: dict[str, Any] = recipe.rates
    return dataclasses.replace(found, **rates)


def teacher_directory(
    recipe: LanguageRecipe, prepared: PreparedLanguage, *, say: Callable[[str], None]
) -> Path | None:
    """Where the teacher lies; None without one. UserError with both sizes where its vocabulary is another."""
    name = recipe.distillation.teacher
    if name is None:
        return None
    directory = resolve_model(name, say=say, remedy=TEACHER_REMEDY)
    theirs, ours = (
        language_config(read_config(directory), directory).vocab_size,
        prepared.tokenizer.vocab_size,
    )
    if theirs != ours:
        raise UserError(
            f"teacher {name}: has a vocabulary of {theirs:,} tokens, the student {ours:,}: their "
            "distributions cannot be compared. Choose --data.tokenizer as the teacher's."
        )
    file = directory / TOKENIZER_FILE
    if file.exists() and load_tokenizer(file).vocabulary() != prepared.tokenizer.vocabulary():
        raise UserError(
            f"teacher {name}: has {theirs:,} tokens as the student, but other ones. Choose --data.tokenizer "
            f"{directory}."
        )
    return directory


def language_card(recipe: LanguageRecipe, config: LanguageModelConfig, training: Mapping[str, Any]) -> str:
    """README.md of a checkpoint directory: what it is, how to use it, what was measured."""
    dev, data = training["dev"], training["data"]
    kind = type(recipe.model).__name__.removesuffix("Config")
    taught = f", distilled from `{recipe.distillation.teacher}`" if recipe.distillation.teacher else ""
    scores = "".join(f"| {name} | {dev[name]:.4f} |\n" for name in ("score", "ended") if name in dev)
    begun = f", from `{recipe.base}`" if recipe.base else ""
    return f"""---
pipeline_tag: text-generation
---
# {recipe.name}

{kind}, {parameter_count(config):,} parameters, trained on `{data["name"]}` (tokens
{data["fingerprint"]}){begun}{taught}, step {training["step"]}.

| dev, {dev["tokens"]:,} tokens of {dev["documents"]:,} documents, {dev["mode"]}, context {dev["context"]} | |
|---|---|
| perplexity a token | {dev["token"]:.2f} |
| perplexity a word, end of line counted | {dev["word"]:.2f} |
| bits a byte | {dev["bits_per_byte"]:.4f} |
{scores}
This split chose the checkpoint; measure the test split with `scripts/evaluate_lm.py`. Generate with
`scripts/generate.py --model DIR --prompt "..."`.
"""
