"""A language model's recipe from corpus to evaluated checkpoint, as one call: what scripts/train.py does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.backends import (
    accelerator,
    backend_name,
    checkpoint_identity,
    language_module,
    load_language_trainer,
)
from common.config import RunOptions, to_dict
from common.errors import UserError
from common.expansion.recipe import ExpansionRecipe
from common.expansion.sft import PreparedExpansion, prepare_expansion
from common.hub import resolve_model
from common.language.config import MODEL_REMEDY, TEACHER_REMEDY, LanguageRecipe
from common.language.evaluation import LanguageResult, SegmentScorer, evaluate_modes
from common.language.inspection import INSPECTION_FILE, inspect_model, longest_document
from common.language.prepare import PreparedLanguage, prepare_language, with_base
from common.report import Table, write_report
from common.runs import RESULTS_FILE, RunFolder, environment, environment_line, finished_results


@dataclasses.dataclass(frozen=True)
class TrainedLanguageRun:
    """A run that has ended."""

    folder: Path
    tables: list[Table]  # of the test split; empty when that was not evaluated
    finished_before: bool  # nothing was trained now
    training: dict[
        str, Any
    ]  # steps, planned_steps, stopped (early: "patience" or "time"), best_step, best_dev

    @property
    def best(self) -> Path:
        """The checkpoint that was best on dev."""
        return self.folder / "best"


def train_language(
    recipe: LanguageRecipe, options: RunOptions | None = None, *, say: Callable[[str], None] = print
) -> TrainedLanguageRun:
    """Train a recipe, or go on with an interrupted run; then evaluate its test split and write the report.

    A run that is finished is not trained again. Raises UserError for everything wrong with recipe or data.
    """
    options = options or RunOptions()
    if (options.coordinator, options.processes, options.process) != (None, None, None):
        raise UserError("a language model trains in one process, on all its devices: leave out --processes")
    recipe, prepared = prepare(recipe.validate(), say=say)
    settings, place = to_dict(recipe), options.runs / recipe.name
    finished = (
        None if options.fresh else finished_results(options.runs, recipe.name, settings, prepared.fingerprint)
    )
    if finished is not None:
        return TrainedLanguageRun(place, finished["tables"], True, finished["training"])
    inputs = run_inputs(recipe, options, place)
    device = accelerator(options.backend)
    say(environment_line(environment(device)))
    trainer = load_language_trainer(options.backend)(recipe, prepared, say=say)
    with RunFolder.create(
        options.runs,
        recipe.name,
        settings,
        resume=not options.fresh,
        data_fingerprint=prepared.fingerprint,
        inputs=inputs,
        device=device,
    ) as folder:
        summary = trainer.run(folder, options.max_minutes)
        figure = "score" if recipe.train.best == "score" else "perplexity a token"
        say(
            f"best on dev: step {summary['best_step']}, {figure} {summary['best_dev']:.4g}"
            if summary["best_step"] is not None
            else "dev was never measured"
        )
        if isinstance(prepared, PreparedExpansion):
            tables = score_best(recipe, options, prepared, folder, summary)
        else:
            scorer = language_module(options.backend, "language_scoring").load_segment_scorer(folder.best)
            ids = longest_document(prepared.split("dev", recipe.data.max_dev_documents))
            folder.write_json(INSPECTION_FILE, inspect_model(scorer, prepared.tokenizer, ids))
            tables = evaluate_best(recipe, options, prepared, folder, summary, scorer)
        write_report(folder.path)
    return TrainedLanguageRun(folder.path, tables, False, summary)


def prepare(recipe: LanguageRecipe, *, say: Callable[[str], None]) -> tuple[LanguageRecipe, PreparedLanguage]:
    """The recipe, with what its base says where it fine-tunes one, and its data. Raises UserError."""
    if isinstance(recipe, ExpansionRecipe):
        return prepare_expansion(recipe, say=say)
    recipe = with_base(recipe)
    return recipe, prepare_language(recipe, say=say)


def run_inputs(recipe: LanguageRecipe, options: RunOptions, place: Path) -> dict[str, str]:
    """What a run depends on beside recipe and data. UserError for a base in the run's own folder."""
    inputs = {"backend": backend_name(options.backend)}
    for role, name, remedy in (
        ("base", recipe.base, MODEL_REMEDY),
        ("teacher", recipe.distillation.teacher, TEACHER_REMEDY),
    ):
        if name is None:
            continue
        directory = resolve_model(name, say=lambda _: None, remedy=remedy)
        if directory.absolute().is_relative_to(place.absolute()):
            raise UserError(f"{role} {name} lies in this run's own folder {place}: choose another --name.")
        inputs[role] = checkpoint_identity(directory)
    return inputs


def evaluate_best(
    recipe: LanguageRecipe,
    options: RunOptions,
    prepared: PreparedLanguage,
    folder: RunFolder,
    summary: dict[str, Any],
    scorer: SegmentScorer,
) -> list[Table]:
    """The test split's table of `scorer`, the best checkpoint, written to results.json; none without it."""
    if not options.evaluate_test:
        return []
    results = perplexities(scorer, prepared, "test", recipe.evaluation.batch_size, recipe.evaluation.stride)
    tables = [perplexity_table(f"{recipe.name}/best", prepared, "test", results)]
    found = {"tables": tables, "test": [result.json() for result in results], "training": summary}
    folder.write_json(RESULTS_FILE, found)
    return tables


def score_best(
    recipe: LanguageRecipe,
    options: RunOptions,
    prepared: PreparedExpansion,
    folder: RunFolder,
    summary: dict[str, Any],
) -> list[Table]:
    """An expansion's rows have no test split: the best checkpoint's scores on dev, which chose it, written to
    results.json."""
    if not options.evaluate_test:
        return []
    engine = language_module(options.backend, "generation").load_engine(folder.best)
    tables = prepared.score_tables(f"{recipe.name}/best", engine) if recipe.scored else []
    folder.write_json(RESULTS_FILE, {"tables": tables, "training": summary})
    return tables


def perplexities(
    scorer: SegmentScorer, prepared: PreparedLanguage, split: str, batch_size: int, stride: int | None
) -> list[LanguageResult]:
    """`evaluate_modes` of a split. UserError for one that cannot be measured."""
    documents, end = prepared.split(split), prepared.tokenizer.end
    try:
        return evaluate_modes(scorer, documents, end, batch_size=batch_size, stride=stride)
    except ValueError as error:
        raise UserError(f"{prepared.name}, split {split}: {error}.") from error


def perplexity_table(
    name: str, prepared: PreparedLanguage, split: str, results: list[LanguageResult]
) -> Table:
    """One row for each mode; the note says what was counted and how."""
    first = results[0].perplexity
    rows: list[list[str | float | None]] = [
        [
            result.mode,
            *(f"{value:.2f} ± {error:.2f}" for value, error in _pairs(result)),
            f"{result.perplexity.bits_per_byte:.4f} ± {result.perplexity.bits_per_byte_se:.4f}",
            result.context,
            result.stride,
        ]
        for result in results
    ]
    return Table(
        title=f"{name} on {prepared.name}, split {split}",
        columns=["memory", "token perplexity", "word perplexity", "bits a byte", "context", "stride"],
        rows=rows,
        note=(
            f"{first.tokens:,} tokens, {first.words:,} words with end of line, {first.bytes:,} bytes of "
            f"{first.documents:,} documents are counted; ± is the standard error over documents. static: "
            "every window begins with nothing; cache: with the memory of the document's earlier text."
        ),
    )


def _pairs(result: LanguageResult) -> list[tuple[float, float]]:
    found = result.perplexity
    return [(found.token, found.token_se), (found.word, found.word_se)]
