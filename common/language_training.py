"""The training loop of a language model, for both backends: steps, dev perplexity, best, exact resume.

A backend's trainer derives from LanguageLoop and brings model, step and state:
{jax_impl,mlx_impl}/training/language.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from common.checkpoint import read_config
from common.config import to_dict
from common.config_language import LanguageRecipe
from common.data.language import LanguageBatch
from common.errors import UserError
from common.hub import resolve_model
from common.language import LanguageModelConfig, language_config, parameter_count
from common.language_evaluation import LanguageResult, SegmentScorer, evaluate_perplexity
from common.language_text import TOKENIZER_FILE, load_tokenizer
from common.prepare_language import PreparedLanguage, plan_language
from common.progress import progress
from common.runs import RunFolder, environment
from common.training import LOG_EVERY, finite, interruptible, memory_explained, planned_steps


class States(Protocol):
    """The state/ folder of a run, as a backend writes it."""

    def latest(self) -> int | None: ...
    def close(self) -> None: ...


class LanguageLoop:
    """One run of a recipe. `run(folder)` starts it or goes on where an interrupted one stopped.

    A backend adds `_states`, `_save_state`, `_load_state`, `_steps_done`, `_one_step`, `_learning_rate`,
    `scorer` and `write`. Raises UserError for a recipe that does not fit data or base, before anything is
    written.
    """

    device: str | None = None  # the accelerator in words

    def __init__(
        self, recipe: LanguageRecipe, prepared: PreparedLanguage, *, say: Callable[[str], None] = print
    ) -> None:
        self.recipe, self.prepared, self.say = recipe, prepared, say
        self.tokenizer = prepared.tokenizer
        self.base = None if recipe.base is None else resolve_model(recipe.base, say=say)
        self.model_config = model_settings(recipe, prepared, self.base)
        self.teacher = teacher_directory(recipe, prepared, say=say)
        documents = prepared.split("train")
        self.dev = prepared.split("dev", recipe.data.max_dev_documents)
        self.plan = plan_language(recipe, documents, self.tokenizer.end)
        self.steps = planned_steps(recipe, len(self.plan))
        self._last: tuple[int, LanguageResult] | None = None
        train = recipe.train
        self.say(
            f"model: {parameter_count(self.model_config):,} parameters; {self.steps:,} steps "
            f"({self.steps / len(self.plan):.2f} epochs) of {train.batch_size} x {train.unroll} x "
            f"{recipe.model.context} tokens"
        )

    # --- what a backend brings ---

    def _states(self, folder: Path) -> States:
        raise NotImplementedError

    def _save_state(self, states: Any, notes: dict[str, Any]) -> None:
        raise NotImplementedError

    def _load_state(self, states: Any) -> dict[str, Any]:
        raise NotImplementedError

    def _steps_done(self) -> int:
        raise NotImplementedError

    def _one_step(self, batch: LanguageBatch) -> Mapping[str, Any]:
        raise NotImplementedError

    def _learning_rate(self, step: int) -> float:
        raise NotImplementedError

    def scorer(self) -> SegmentScorer:
        """The model as it is now, its averaged weights where there are some."""
        raise NotImplementedError

    def write(self, directory: Path, training: dict[str, Any], card: str) -> None:
        """Write the model as `scorer` has it to a checkpoint directory."""
        raise NotImplementedError

    # --- the loop ---

    def run(self, folder: RunFolder) -> dict[str, Any]:
        """Train to the end; returns the summary that results.json holds."""
        self.folder = folder
        with contextlib.closing(self._states(folder.state)) as states, interruptible() as stop:
            notes = self._restore(states)
            if not notes.get("stopped"):
                with memory_explained(self._memory_advice()):
                    self._train(states, notes, stop)
            summary = self._finish(notes)
            if stop[0]:
                raise KeyboardInterrupt
            return summary

    def _restore(self, states: States) -> dict[str, Any]:
        if states.latest() is None:
            self.folder.rewind(-1)
            return {"best": None, "best_step": None, "waited": 0, "data": None}
        notes = self._load_state(states)
        self.folder.rewind(self._steps_done())
        self.say(f"resumed at step {self._steps_done()} of {self.steps}")
        return notes

    def _train(self, states: States, notes: dict[str, Any], stop: list[bool]) -> None:
        train, first = self.recipe.train, self._steps_done()
        batches = self.plan.loader(self.steps)
        if notes["data"] is not None:
            batches.set_state(notes["data"])
        evaluate_at = {round(self.steps * (i + 1) / train.evaluations) for i in range(train.evaluations)}
        step, ends = first, False
        with progress(self.steps, "training", start=first) as bar:
            for step in range(first + 1, self.steps + 1):
                batch = next(batches)
                logged = self._one_step(batch)
                if step % LOG_EVERY == 0 or step in (1, self.steps) or step in evaluate_at:
                    bar.update(step, self._log(step, logged, batch))
                if step in evaluate_at and self._evaluate(step, notes):
                    ends = notes["stopped"] = True
                ends = stop[0] or ends
                if step % train.checkpoint_every == 0 or step == self.steps or ends:
                    finite(step, logged)
                    self._save_state(states, notes | {"data": batches.get_state()})
                if ends:
                    break
        if ends and not notes.get("stopped") and step < self.steps:
            self.say(f"stopped at step {step}; the same command goes on from there")
            raise KeyboardInterrupt

    def _log(self, step: int, logged: Mapping[str, Any], batch: LanguageBatch) -> str:
        values = finite(step, logged)
        beside = {"learning_rate": self._learning_rate(step), "counted_share": batch.token_share}
        self.folder.log(step, "train", values | beside)
        return f"loss {values['loss']:.4f}"

    def _evaluate(self, step: int, notes: dict[str, Any]) -> bool:
        """Measure dev, keep the best checkpoint; true when training should stop early."""
        result = self._measure()
        self._last = (step, result)
        found = result.perplexity
        numbers = {
            "perplexity": found.token,
            "word_perplexity": found.word,
            "bits_per_byte": found.bits_per_byte,
        }
        self.folder.log(step, "dev", numbers | (result.memory or {}))
        self.say(f"dev at step {step}, {result.mode}: {found.line()}")
        if notes["best"] is None or found.token < notes["best"]:
            notes |= {"best": found.token, "best_step": step, "waited": 0}
            self._write(self.folder.best, step, result)
        else:
            notes["waited"] += 1
        patience = self.recipe.train.patience
        if patience is None or notes["waited"] < patience:
            return False
        self.say(f"no better dev perplexity in {patience} evaluations: stopped early at step {step}")
        return True

    def _measure(self) -> LanguageResult:
        scorer, evaluation = self.scorer(), self.recipe.evaluation
        try:
            return evaluate_perplexity(
                scorer,
                self.dev,
                self.tokenizer.end,
                cache=scorer.carries,
                batch_size=evaluation.batch_size,
                stride=evaluation.stride,
            )
        except ValueError as error:
            raise UserError(
                f"dev cannot be measured: {error}. Lower --train.learning-rate, then start --fresh."
            ) from error

    def _finish(self, notes: dict[str, Any]) -> dict[str, Any]:
        """Write final/, the last weights; best/ holds those with the lowest dev perplexity."""
        step = self._steps_done()
        if self._last is None or self._last[0] != step:
            self._last = (step, self._measure())
        self._write(self.folder.final, step, self._last[1])
        return {"steps": step, "best_step": notes["best_step"], "best_dev": notes["best"]}

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
    directory = resolve_model(name, say=say)
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

This split chose the checkpoint; measure the test split with `scripts/evaluate_lm.py`. Generate with
`scripts/generate.py --model DIR --prompt "..."`.
"""
