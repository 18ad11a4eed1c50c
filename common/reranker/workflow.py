"""A recipe from data to evaluated checkpoint, as one call: what scripts/train.py does, for Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.backends import (
    Encoder,
    accelerator,
    backend_name,
    checkpoint_identity,
    join_processes,
    load_encoder,
    load_scorer,
    load_trainer,
)
from common.config import RerankerConfig, RunOptions, to_dict
from common.data.records import RankingData
from common.errors import UserError
from common.hub import resolve_model
from common.metrics.ranking import check_metrics
from common.processes import Launch
from common.report import Table, tables_text, write_report
from common.reranker.analysis import analyse, write_analysis
from common.reranker.analysis_view import analysis_tables
from common.reranker.evaluation import evaluate_recipe
from common.reranker.prepare import (
    Prepared,
    cache_root,
    dev_candidates,
    load_data,
    load_old_data,
    prepare,
    resolve_base,
    run_fingerprint,
)
from common.reranker.reranking import load_confidences
from common.reranker.training import verdict
from common.runs import RESULTS_FILE, RunFolder, WatchedRun, environment, environment_line, finished_results


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A run that has ended."""

    folder: Path
    first_stage: str  # whose candidates it reranks
    tables: list[Table]  # of the test split; empty when that was not evaluated
    finished_before: bool  # nothing was trained now

    @property
    def best(self) -> Path:
        """The checkpoint that ranks dev best."""
        return self.folder / "best"


def cut_short(config: RerankerConfig) -> RerankerConfig:
    """The recipe cut to a few steps on short texts: everything runs, next to nothing is learned."""
    return config.changed(
        data={"max_query_tokens": 16, "max_passage_tokens": 32},
        train={"epochs": 0.0, "min_steps": 0, "max_steps": 8, "evaluations": 1},
        evaluation={"depth": 5, "dev_queries": 20, "dev_depth": 5},
    )


def train_recipe(
    config: RerankerConfig,
    options: RunOptions | None = None,
    data: RankingData | None = None,
    *,
    say: Callable[[str], None] = print,
) -> TrainedRun:
    """Train a recipe, or go on with an interrupted run; then evaluate its test split and write the report.

    `data` stands for what the recipe names, where it was loaded or made in Python. A run that is finished is
    not trained again. Raises UserError for everything wrong with recipe, data or base.
    """
    config, options = config.validate(), options or RunOptions()
    launched = Launch(options.coordinator, options.processes, options.process)
    processes = join_processes(options.backend, launched)
    recipe, place = to_dict(config), options.runs / config.name
    with processes.together():  # at each phase: what is wrong in one process ends all
        if processes.first and (options.fresh or not (place / RESULTS_FILE).exists()):
            RunFolder.check(options.runs, config.name)  # a finished run is only shown
        data, old = data or load_data(config.data), load_old_data(config)
        fingerprint = run_fingerprint(data, old)
        finished = None if options.fresh else finished_results(options.runs, config.name, recipe, fingerprint)
    if finished is not None:
        return TrainedRun(place, finished["first_stage"], finished["tables"], True)
    with processes.together():
        check_splits(config, data, options.evaluate_test)
        check_metrics([config.evaluation.metric])
        inputs = run_inputs(config, options)
        encoder = load_encoder(config.data.encoder, options.backend, say=say)
    prepared = processes.in_turn(lambda: prepare(config, encoder, data, old, say=say))
    device = accelerator(options.backend)
    say(environment_line(environment(device)))
    trainer = load_trainer(options.backend)(config, prepared, say=say)
    with processes.together():  # the first owns the folder, the others know where it is
        folder = (
            RunFolder.create(
                options.runs,
                config.name,
                recipe,
                resume=not options.fresh,
                data_fingerprint=fingerprint,
                inputs=inputs,
                device=device,
            )
            if processes.first
            else WatchedRun(place)
        )
    shown: list[Table] = []
    with folder:
        with processes.together():
            if config.retrain.analyze_existing and processes.first:
                analyse_original(config, prepared, folder, options.backend, say)
        summary = trainer.run(folder, options.max_minutes)
        with processes.together():  # the others wait: a process that ends early would end the run
            if processes.first:
                if summary["best_dev"] is not None:  # of several processes of MLX the leader alone scores dev
                    say(verdict(config, summary))
                shown = evaluate_best(config, options, prepared, folder, encoder, summary, say)
    return TrainedRun(folder.path, prepared.first_stage, shown, False)


def run_inputs(config: RerankerConfig, options: RunOptions) -> dict[str, str]:
    """What a run depends on beside recipe and data. A wrong base fails here, before any work, and so does one
    that the run would write over (UserError)."""
    base = resolve_base(config, say=lambda _: None)
    place = options.runs / config.name
    if base.absolute().is_relative_to(place.absolute()):
        raise UserError(
            f"model.base {config.model.base} lies in this run's own folder {place}, "
            "which the run would write over: choose another --name."
        )
    return {
        "backend": backend_name(options.backend),
        "base": checkpoint_identity(base),
        "encoder": checkpoint_identity(resolve_model(config.data.encoder, say=lambda _: None)),
    }


def evaluate_best(
    config: RerankerConfig,
    options: RunOptions,
    prepared: Prepared,
    folder: RunFolder,
    encoder: Encoder,
    summary: dict[str, Any],
    say: Callable[[str], None],
) -> list[Table]:
    """The tables of the test split, where that is evaluated; the report in any case."""
    shown: list[Table] = []
    if options.evaluate_test:
        scorers = [load_scorer(folder.best, options.backend, say=say)]
        confidences = load_confidences([folder.best], scorers)
        if options.evaluate_start:
            scorers.insert(0, load_scorer(config.model.base, options.backend, recipe=config, say=say))
        tables = evaluate_recipe(config, prepared, scorers, encoder, confidences)
        shown = [part for table in tables for part in table.shown()]
        results = {
            "tables": shown,
            "evaluation": [table.json() for table in tables],
            "first_stage": prepared.first_stage,
            "training": summary,
        }
        folder.write_json(RESULTS_FILE, results)
        for table in tables:
            say(table.text())
    write_report(folder.path)
    return shown


def check_splits(config: RerankerConfig, data: RankingData, test: bool) -> None:
    """Raise a UserError for a split that the data lacks, before any work."""
    for split in (config.data.train_split, config.data.dev_split):
        data.split(split)
    if not test:
        return
    try:
        data.split(config.data.test_split)
    except UserError as error:
        raise UserError(f"{error} Or do without a test: --no-evaluate-test.") from None


def analyse_original(
    config: RerankerConfig,
    prepared: Prepared,
    folder: RunFolder,
    backend: str = "auto",
    say: Callable[[str], None] = print,
) -> None:
    """Analyse the base on the dev queries, once a run: analysis-original.json, .png, .html."""
    if (folder.path / "analysis-original.json").exists():
        return
    base = load_scorer(config.model.base, backend, recipe=config, say=lambda _: None)
    qrels, stage = dev_candidates(config, prepared)
    analysis = analyse(
        base,
        prepared.data,
        config.data.dev_split,
        stage,
        first_stage=prepared.first_stage,
        depth=max(map(len, stage.values()), default=1),
        qrels=qrels,
        confidence=load_confidences([config.model.base], [base]).get(base.identity),
        metric=config.evaluation.metric,
        cache_dir=cache_root(),
    )
    write_analysis(folder.path, "original", analysis)
    say(tables_text(analysis_tables(analysis)[:-1]))
