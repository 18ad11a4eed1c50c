"""What a retraining gains on new data and forgets of the old, with and without preservation.

    python benchmarks/retraining.py --model.base runs/x/best --data NEW --retrain.old-data OLD

Takes the settings of scripts/train.py; the recipe is configs/quantum_retrain.py. Three runs are trained from
the same base on the same lists: <name>_preserving as the recipe says, <name>_new_lists without lists of the
old domain, <name>_free with both weights 0. The original and all three are then evaluated on the test splits
of both domains, over the same candidates, full score alone. A finished run is not trained again; rows are
recorded in benchmarks/results/.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from benchmarks.record import RESULTS, Record, Row
from common.backends import Encoder, load_encoder, load_scorer, load_trainer
from common.config import RerankerConfig, RetrainConfig, RunOptions, parse_command, to_dict
from common.data.combined import source_name
from common.data.records import RankingData
from common.data.sources import load_ranking_data
from common.errors import UserError, run_command
from common.metrics.ranking import check_metrics
from common.report import Table as Shown
from common.report import tables_text
from common.reranker.evaluation import Comparison, Table, evaluate
from common.reranker.evaluation import Row as Ranking
from common.reranker.prepare import (
    cache_root,
    candidates,
    load_data,
    load_old_data,
    prepare,
    resolve_base,
    run_fingerprint,
)
from common.reranker.workflow import run_inputs
from common.runs import RunFolder

# in this order the paired differences of `evaluate` are the wanted ones: a later one is taken from an earlier
PRESERVING, NEW_LISTS, FREE, ORIGINAL = NAMES = (
    "retrained, preserving",
    "the same without old lists",
    "retrained, free",
    "original",
)


@dataclasses.dataclass(frozen=True)
class Options:
    runs: Path = Path("runs")
    """Folder of all runs."""
    old_test_split: str = "test"
    """The old domain's split that says what is forgotten."""
    checkpoint: Literal["best", "final"] = "best"
    """Of each run: the best on the new domain's dev, or the last."""
    backend: Literal["auto", "jax", "mlx"] = "auto"
    results: Path = RESULTS
    """Folder of the recorded rows."""


def main(argv: Sequence[str] | None = None) -> None:
    words = ["--config", "configs/quantum_retrain.py", *(sys.argv[1:] if argv is None else argv)]
    config, options = parse_command(__doc__ or "", words, Options)
    if not config.preserves or config.retrain.old_data is None:
        raise UserError(
            "there is nothing to compare: name the old domain's data with --retrain.old-data, and give "
            "--retrain.preserve-knowledge or --retrain.resonance-alignment a weight above 0"
        )
    base = resolve_base(config)
    new = load_data(config.data)
    old = load_ranking_data(config.retrain.old_data, on_bad_row=config.data.on_bad_row)
    domains = {"new": (new, config.data.test_split), "old": (old, options.old_test_split)}
    for data, split in domains.values():
        data.split(split)  # a wrong name fails before training, and so does a place that cannot be written
    check_metrics([config.evaluation.metric])
    pair = "-".join(source_name(data.name, {}) for data, _ in reversed(domains.values()))  # old to new
    record = Record(f"retraining-{pair}", workload(config, options, domains), folder=options.results)
    encoder = load_encoder(config.data.encoder, options.backend)
    free = dataclasses.replace(
        config.retrain,
        preserve_knowledge=0.0,
        resonance_alignment=0.0,
        old_data=None,
        analyze_existing=True,  # it stays a retraining, with the same fixed lists
    )
    new_lists = dataclasses.replace(config.retrain, old_data=None)
    runs, first_stage = [], ""
    for name, retrain in (("free", free), ("new_lists", new_lists), ("preserving", config.retrain)):
        run, first_stage = train(config, name, retrain, encoder, options)
        runs.append(run / options.checkpoint)
    scorers = [load_scorer(place, options.backend, say=lambda _: None) for place in (*runs[::-1], base)]
    tables = {
        domain: evaluate(
            data,
            split,
            candidates(data, split, encoder, depth=config.evaluation.depth),
            scorers,
            depth=config.evaluation.depth,
            pools=(first_stage,),
            cache_dir=cache_root(),
            metrics=(config.evaluation.metric,),
        )
        for domain, (data, split) in domains.items()
    }
    print(tables_text([shown(tables, first_stage)]))
    record.add(*rows(tables), replace=True)
    print(f"recorded in {record.path}")


def train(
    config: RerankerConfig, name: str, retrain: RetrainConfig, encoder: Encoder, options: Options
) -> tuple[Path, str]:
    """Train one of the runs unless it is finished; its folder, and the first stage that dev chose."""
    config = dataclasses.replace(config, name=f"{config.name}_{name}", retrain=retrain).validate()
    data, old = load_data(config.data), load_old_data(config)
    prepared = prepare(config, encoder, data, old)
    with RunFolder.create(
        options.runs,
        config.name,
        to_dict(config),
        data_fingerprint=run_fingerprint(data, old),
        inputs=run_inputs(config, RunOptions(runs=options.runs, backend=options.backend)),
    ) as folder:
        if (folder.final / "model.safetensors").exists():
            print(f"{folder.path}: finished before")
        else:
            load_trainer(options.backend)(config, prepared).run(folder)
    return folder.path, prepared.first_stage


def versus(table: Table) -> dict[tuple[str, str], Comparison]:
    """(a, b) of NAMES -> a minus b, paired over queries, full score alone."""
    pairs = (pair.comparison for pair in table.pairs if pair.kind == "alone")
    return dict(zip(combinations(NAMES, 2), pairs, strict=True))


def alone(table: Table) -> dict[str, Ranking]:
    """Name -> the row of its full score alone."""
    return dict(zip(NAMES, (row for row in table.rows if row.kind == "alone"), strict=True))


def shown(tables: Mapping[str, Table], first_stage: str) -> Shown:
    """Rows: each domain's first stage, original, and the retrained ones with their paired differences."""
    metric = tables["new"].metrics[0]
    lines: list[list[str | float | None]] = []
    for domain, table in tables.items():
        stage = next(row for row in table.rows if not row.model and row.pool == first_stage)
        lines.append(
            [f"{domain}: {first_stage}", stage.means[metric], _bracket(stage.intervals[metric]), *[""] * 6]
        )
        compared = versus(table)
        for name, row in reversed(alone(table).items()):
            cells: list[str] = []
            for other in (ORIGINAL, FREE):
                cells += _cells(compared[name, other]) if (name, other) in compared else [""] * 3
            lines.append([f"{domain}: {name}", row.means[metric], _bracket(row.intervals[metric]), *cells])
    sizes = ", ".join(f"{name} {table.data}: {table.queries:,} queries" for name, table in tables.items())
    return {
        "title": "Retraining: the new domain and the old, before and after, without and with preservation",
        "columns": ["ranking", metric, "[95%]", "Δ original", "[95%]", "p", "Δ free", "[95%]", "p"],
        "rows": lines,
        "note": (
            f"{sizes}; the top {tables['new'].depth} of {first_stage} reranked, full score alone. A negative "
            "Δ original on the old domain is what was forgotten. Brackets: bootstrap over queries (paired "
            "for Δ); p: paired randomisation, two-sided."
        ),
    }


def rows(tables: Mapping[str, Table]) -> list[Row]:
    """Rows for benchmarks/record.py: each retrained one against the original, and against one another."""
    found = []
    for domain, table in tables.items():
        metric, ranked = table.metrics[0], alone(table)
        means = {name: row.means[metric] for name, row in ranked.items()}
        for (name, other), comparison in versus(table).items():
            found.append(
                {
                    "what": f"{domain} domain, {table.data} {table.split}: {name}",
                    "ours": means[name],
                    "peer": means[other],
                    "peer_name": other,
                    "unit": metric,
                    "ratio": means[name] / means[other] if means[other] else None,
                    "runs": {"ours": [means[name]], "peer": [means[other]]},
                    "difference": comparison.difference,
                    "interval": list(comparison.interval),
                    "p": comparison.p,
                    "queries": table.queries,
                }
            )
    return found


def workload(
    config: RerankerConfig, options: Options, domains: Mapping[str, tuple[RankingData, str]]
) -> dict[str, Any]:
    """What the rows were measured on: rows of another one do not mix with them."""
    data = {name: f"{data.name} {split} {data.fingerprint}" for name, (data, split) in domains.items()}
    recipe = to_dict(config)
    del recipe["retrain"]["old_data"]  # a path: its content's fingerprint is above
    return {
        "checkpoint": options.checkpoint,
        **data,
        **{part: recipe[part] for part in ("quantum", "train", "retrain")},
    }


def _cells(comparison: Comparison) -> list[str]:
    low, high = comparison.interval
    return [f"{comparison.difference:+.3f}", f"[{low:+.3f}, {high:+.3f}]", f"{comparison.p:.4f}"]


def _bracket(interval: tuple[float, float]) -> str:
    return f"[{interval[0]:.3f}, {interval[1]:.3f}]"


if __name__ == "__main__":
    run_command(main)
