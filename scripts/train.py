"""Train a recipe, or go on with an interrupted run; then evaluate its test split.

example: python scripts/train.py --config configs/quantum_resonance.py --train.epochs 2

A recipe's presets: --preset quick. Other data: --data FILE_OR_FOLDER. Beside an earlier run: --name NAME.
All GPUs of a host are used. Several processes, on one host or many: srun or mpirun before the command, or in
each --coordinator HOST:PORT --processes N --process I (docs/scaling.md).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.analysis import analyse, write_analysis
from common.analysis_view import analysis_tables
from common.backends import Encoder, join_processes, load_encoder, load_scorer, load_trainer
from common.config import RerankerConfig, RunOptions, parse_command, to_dict
from common.errors import UserError, run_command
from common.evaluation import evaluate_recipe
from common.prepare import (
    Prepared,
    cache_root,
    dev_queries,
    load_data,
    load_old_data,
    prepare,
    resolve_base,
    run_fingerprint,
)
from common.processes import Launch, Processes
from common.report import tables_text, write_report
from common.reranking import load_confidences
from common.runs import (
    RESULTS_FILE,
    RunFolder,
    WatchedRun,
    environment,
    environment_line,
    finished_results,
)


def main(argv: Sequence[str] | None = None) -> None:
    config, options = parse_command(__doc__ or "", argv)
    launch = Launch(options.coordinator, options.processes, options.process)
    processes = join_processes(options.backend, launch)
    recipe = to_dict(config)
    with processes.together():
        data, old = load_data(config.data), load_old_data(config)
        fingerprint = run_fingerprint(data, old)
        finished = None if options.fresh else finished_results(options.runs, config.name, recipe, fingerprint)
    if finished is not None:
        print(tables_text(finished["tables"]))
        print(f"{options.runs / config.name} is finished; --fresh starts it over, --name begins another.")
        print(next_steps(config, options.runs / config.name, finished["first_stage"]))
        return
    with processes.together():
        refuse_base(config, options)
        encoder = load_encoder(config.data.encoder, options.backend)
    prepared = processes.in_turn(lambda: prepare(config, encoder, data, old))
    if options.evaluate_test:
        prepared.data.split(config.data.test_split)  # a wrong name fails before training
    print(environment_line(environment()))
    with run_folder(config, options, processes, fingerprint) as folder:
        with processes.together():
            if config.retrain.analyze_existing and processes.first:
                analyse_original(config, prepared, folder, options.backend)
        summary = load_trainer(options.backend)(config, prepared, folder)
        with processes.together():  # the others wait: a process that ends early would end the run
            if processes.first:
                evaluate(config, options, prepared, folder, encoder, summary)
    print(next_steps(config, folder.path, prepared.first_stage))


def refuse_base(config: RerankerConfig, options: RunOptions) -> None:
    """A wrong name fails before any work, and so does a base that the run would write over."""
    base = resolve_base(config, say=lambda _: None)
    if base.absolute().is_relative_to((options.runs / config.name).absolute()):
        raise UserError(
            f"model.base {config.model.base} lies in this run's own folder {options.runs / config.name}, "
            "which the run would write over: choose another --name."
        )


def evaluate(
    config: RerankerConfig,
    options: RunOptions,
    prepared: Prepared,
    folder: RunFolder,
    encoder: Encoder,
    summary: dict[str, Any],
) -> None:
    """Evaluate best/ on the test split where that is asked for, and write the report."""
    if options.evaluate_test:
        scorers = [load_scorer(folder.best, options.backend)]
        confidences = load_confidences([folder.best], scorers)
        if options.evaluate_start:
            scorers.insert(0, load_scorer(config.model.base, options.backend, recipe=config))
        table = evaluate_recipe(config, prepared, scorers, encoder, confidences)
        results = {
            "tables": table.shown(),
            "evaluation": table.json(),
            "first_stage": prepared.first_stage,
            "training": summary,
        }
        folder.write_json(RESULTS_FILE, results)
        print(table.text())
    write_report(folder.path)


def run_folder(
    config: RerankerConfig, options: RunOptions, processes: Processes, fingerprint: str
) -> RunFolder:
    """The run's folder: the first process owns it, the others know where it is."""
    with processes.together():
        if processes.first:
            return RunFolder.create(
                options.runs,
                config.name,
                to_dict(config),
                resume=not options.fresh,
                data_fingerprint=fingerprint,
            )
    return WatchedRun(options.runs / config.name)


def analyse_original(config: RerankerConfig, prepared: Prepared, folder: RunFolder, backend: str) -> None:
    """Analyse the base on the dev queries, once a run: analysis-original.json, .png, .html."""
    if (folder.path / "analysis-original.json").exists():
        return
    settings, judged = config.evaluation, prepared.data.split(config.data.dev_split)
    base = load_scorer(config.model.base, backend, recipe=config, say=lambda _: None)
    stage = prepared.dev[prepared.first_stage]
    analysis = analyse(
        base,
        prepared.data,
        config.data.dev_split,
        stage,
        first_stage=prepared.first_stage,
        depth=max(map(len, stage.values())) if settings.candidates == "judged" else settings.dev_depth,
        qrels={query: judged[query] for query in dev_queries(judged, settings.dev_queries)},
        confidence=load_confidences([config.model.base], [base]).get(base.identity),
        metric=settings.metric,
        cache_dir=cache_root(),
    )
    write_analysis(folder.path, "original", analysis)
    print(tables_text(analysis_tables(analysis)[:-1]))


def next_steps(config: RerankerConfig, run: Path, first_stage: str) -> str:
    """Where the run's files lie and what to type next: the evaluation is that of the run's own table."""
    data, evaluation, best = config.data, config.evaluation, shlex.quote(str(run / "best"))
    flags = [("--data", data.name, "pydocs"), ("--first-stage", first_stage, "")]
    flags += [("--depth", str(evaluation.depth), "50"), ("--split", data.test_split, "test")]
    flags += [("--encoder", data.encoder, "default"), ("--on-bad-row", data.on_bad_row, "error")]
    words = [f"{flag} {shlex.quote(value)}" for flag, value, default in flags if value != default]
    words += ["--judged"] if evaluation.candidates == "judged" else []
    return (
        f"checkpoint: {run / 'best'}\nreport: {run / 'report.html'}\n"
        f'next: python scripts/rerank.py --model {best} --query "..." --passages FILE\n'
        f"      {' '.join(('python scripts/evaluate.py', best, *words))}"
    )


if __name__ == "__main__":
    run_command(main)
