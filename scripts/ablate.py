"""Does a part help? Train one recipe in several variants and seeds, and compare them query by query.

example: python scripts/ablate.py --config configs/quantum_resonance.py --variants cartesian real cls_only

Takes the settings of scripts/train.py for every run. Several recipes: --config A.py --config B.py; several
collections: --datasets pydocs ../shared/data/scifact. Variants of the head: cartesian, polar, cls_only, real,
real_part, root_fidelity, block_fidelity, polar_overlap, separable; of the loss: bce, listwise, unaligned,
superposition, resonance_alone, entanglement, resonance. Finished runs are not trained again, an interrupted
one goes on; the table is written as <runs>/ablation.md and .json.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from common.backends import Encoder, accelerator, load_encoder, load_scorer, load_trainer
from common.checkpoint import to_json
from common.config import DataConfig, RerankerConfig, RunOptions, parse_command, to_dict
from common.data.records import RankingData
from common.errors import UserError, listed, run_command
from common.report import tables_markdown, tables_text
from common.reranker.ablation import (
    HEAD_VARIANTS,
    OUTCOME,
    Job,
    check_data,
    grid,
    outcome,
    read_outcomes,
    results,
    shown,
)
from common.reranker.evaluation import write_bytes, write_output
from common.reranker.prepare import load_data, load_old_data, prepare, run_fingerprint
from common.reranker.workflow import run_inputs
from common.runs import RunFolder, environment

DEFAULT_RECIPE = "configs/quantum_resonance.py"


@dataclasses.dataclass(frozen=True)
class Options:
    variants: tuple[str, ...] = tuple(HEAD_VARIANTS)
    """Names from the list above, the reference among them."""
    reference: str = "cartesian"
    """The variant that the others are compared with."""
    seeds: tuple[int, ...] = (0, 1, 2)
    datasets: tuple[str, ...] = ()
    """Values of `data.name`, one after the other; the recipe's own when absent."""
    runs: Path = Path("runs/ablation")
    """Folder of the grid's runs and of its table."""
    table_only: bool = False
    """Train nothing: compare what is finished."""
    keep_state: bool = False
    """Keep the training state of finished runs, which is larger than their checkpoints."""
    backend: Literal["auto", "jax", "mlx"] = "auto"


def main(argv: Sequence[str] | None = None) -> None:
    recipes, options = parse(argv)
    if options.reference not in options.variants:
        raise UserError(f"--reference {options.reference} is not among --variants: add it, or choose another")
    if not options.seeds or len(set(options.seeds)) < len(options.seeds):
        raise UserError(f"--seeds {' '.join(map(str, options.seeds))}: give at least one, each once")
    variants = tuple(dict.fromkeys(options.variants))
    jobs = grid(recipes, options.datasets, variants, options.seeds)
    failed: list[str] = []
    try:
        if not options.table_only:
            failed = train_all(jobs, options)
    finally:
        write_table(jobs, failed, options)
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} runs failed; the table lacks them:\n{listed(failed)}")


def parse(argv: Sequence[str] | None) -> tuple[list[RerankerConfig], Options]:
    """Every --config with the same flags."""
    words = list(sys.argv[1:] if argv is None else argv)
    files, rest = [], []
    while words:
        word = words.pop(0)
        if word == "--config" and words:
            files.append(words.pop(0))
        elif word.startswith("--config="):
            files.append(word.partition("=")[2])
        else:
            rest.append(word)
    parsed = [
        parse_command(__doc__ or "", ["--config", file, *rest], Options)
        for file in dict.fromkeys(files or [DEFAULT_RECIPE])
    ]
    return [config for config, _ in parsed], parsed[0][1]


def train_all(jobs: Sequence[Job], options: Options) -> list[str]:
    """Train and evaluate what is not finished; what failed, and why: the others go on."""
    tools = Tools(options.backend)
    failed = []
    for number, job in enumerate(jobs, 1):
        print(f"== {number} of {len(jobs)}: {job.collection}, {job.variant}, seed {job.seed}")
        try:
            train(job, options, tools)
        except UserError as error:
            print(f"failed: {error}")
            failed.append(f"{job.collection}/{job.config.name}: {error}")
    return failed


class Tools:
    """What many runs share, loaded once: data by its settings, encoders by name."""

    def __init__(self, backend: str) -> None:
        self.data: Callable[[DataConfig], RankingData] = functools.cache(load_data)
        self.encoder: Callable[[str], Encoder] = functools.cache(lambda name: load_encoder(name, backend))


def train(job: Job, options: Options, tools: Tools) -> None:
    """One run to its OUTCOME, unless it has one; UserError when the folder holds another recipe's."""
    config = job.config
    data, old = tools.data(config.data), load_old_data(config)
    check_data(config, data)
    runs = options.runs / job.collection
    with RunFolder.create(
        runs,
        config.name,
        to_dict(config),
        data_fingerprint=run_fingerprint(data, old),
        inputs=run_inputs(config, RunOptions(runs=runs, backend=options.backend)),
    ) as folder:
        if (folder.path / OUTCOME).exists():
            print(f"{folder.path}: finished before")
            return
        encoder = tools.encoder(config.data.encoder)
        prepared = prepare(config, encoder, data, old)
        summary = load_trainer(options.backend)(config, prepared).run(folder)
        scorer = load_scorer(folder.best, options.backend, say=lambda _: None)
        folder.write_json(OUTCOME, outcome(config, prepared, scorer, encoder, summary))
        if not options.keep_state:
            shutil.rmtree(folder.state, ignore_errors=True)


def write_table(jobs: Sequence[Job], failed: Sequence[str], options: Options) -> None:
    """Print the table of what is finished, and write it beside the runs."""
    tables, stored = [], dict[str, Any]()
    for collection, outcomes in read_outcomes(options.runs, jobs).items():
        if not any(outcomes.values()):
            continue
        rows = results(outcomes, options.reference)
        tables.append(shown(collection, outcomes, options.reference, rows))
        stored[collection] = [dataclasses.asdict(row) for row in rows]
    if not tables:
        print(f"no finished run in {options.runs}")
        return
    about = {
        "reference": options.reference,
        "failed": list(failed),
        "environment": environment(accelerator(options.backend)),
    }
    print(tables_text(tables))
    write_output(options.runs / "ablation.md", tables_markdown(tables))
    write_bytes(options.runs / "ablation.json", to_json({"collections": stored, **about}))
    print(f"written: {options.runs / 'ablation.md'}, ablation.json")


if __name__ == "__main__":
    run_command(main)
