"""Does a part help? One recipe with one thing changed, over seeds, against a reference query by query."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from common.backends import Encoder, Scorer
from common.checkpoint import read_json
from common.config import RerankerConfig
from common.data.records import RankingData
from common.errors import UserError
from common.metrics.ranking import kendall_tau, mean, ranked
from common.metrics.significance import bootstrap_interval, paired_randomisation, randomisation_draws
from common.report import Table
from common.reranker.evaluation import SAMPLES, evaluate_recipe, score_pairs
from common.reranker.prepare import Prepared, cache_root, candidates

Changes = Mapping[str, Mapping[str, Any]]
OUTCOME = "ablation.json"  # of a run's folder, written last: a run that has it is finished

_QUANTUM = {"train": {"objective": "quantum"}}
_CARTESIAN = {"head": "resonance", "projector": "cartesian"}
# what the score is made of; each of its own start, else the recipe as it is
HEAD_VARIANTS: dict[str, Changes] = {
    "cartesian": {"model": _CARTESIAN},
    "polar": {"model": {"head": "resonance", "projector": "polar"}},
    "cls_only": {"model": {"head": "cls", "projector": "cartesian"}},
    "real": {"model": {"head": "real", "projector": "cartesian"}},
    "real_part": {"model": {"head": "real_part", "projector": "cartesian"}},
    "root_fidelity": {"model": {"head": "root_fidelity", "projector": "cartesian"}},
    "block_fidelity": {"model": {"head": "block_fidelity", "projector": "cartesian"}},
    "polar_overlap": {"model": {"head": "overlap", "projector": "polar"}},
    "separable": {"model": _CARTESIAN, "train": {"separable_start": 0.3}},
}
# what the loss is made of
TERM_VARIANTS: dict[str, Changes] = {
    "bce": {"train": {"objective": "bce"}},
    "listwise": {"train": {"objective": "listwise"}},
    "unaligned": {"train": {"objective": "listwise"}, "quantum": {"alignment_weight": 0.0}},
    "superposition": {**_QUANTUM, "quantum": {"mode": "superposition"}},
    "resonance_alone": {**_QUANTUM, "quantum": {"mode": "resonance", "entanglement_weight": 0.0}},
    "entanglement": {**_QUANTUM, "quantum": {"mode": "entanglement"}},
    "resonance": {**_QUANTUM, "quantum": {"mode": "resonance"}},
}
VARIANTS = HEAD_VARIANTS | TERM_VARIANTS


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of the grid, in the folder `collection`/`config.name`."""

    collection: str
    variant: str
    seed: int
    config: RerankerConfig


def grid(
    recipes: Sequence[RerankerConfig], datasets: Sequence[str], variants: Sequence[str], seeds: Sequence[int]
) -> list[Job]:
    """Every recipe on every dataset (its own without any), in every variant, from every seed.

    Seeds come first, so that an unfinished grid compares all variants. UserError for an unknown variant, for
    one that the recipe cannot be trained in, and for two collections of one name.
    """
    for name in variants:
        if name not in VARIANTS:
            near = difflib.get_close_matches(name, VARIANTS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UserError(f"unknown variant {name!r}; allowed: {', '.join(VARIANTS)}.{hint}")
    collections: dict[str, RerankerConfig] = {}
    for recipe in recipes:
        for dataset in datasets or (recipe.data.name,):
            name = f"{recipe.name}-{Path(dataset).name.split('.')[0]}"
            if name in collections:
                raise UserError(f"two collections would be called {name}: give their recipes different names")
            collections[name] = recipe.changed(data={"name": dataset})
    return [
        Job(name, variant, seed, _config(collections[name], variant, seed))
        for seed in seeds
        for name in collections
        for variant in variants
    ]


def _config(recipe: RerankerConfig, variant: str, seed: int) -> RerankerConfig:
    config = recipe.changed(**VARIANTS[variant]).changed(train={"seed": seed})
    try:
        return dataclasses.replace(config, name=f"{variant}-s{seed}").validate()
    except UserError as error:
        raise UserError(f"variant {variant} of {recipe.name}: {error}") from None


def check_data(config: RerankerConfig, data: RankingData) -> None:
    """Raise the UserError of data that a grid cannot measure, before any run is trained on it."""
    if data.parts:
        raise UserError(
            f"data.name {config.data.name} names several sources; a grid measures one: name each of them "
            "with --datasets"
        )
    data.split(config.data.test_split)


def outcome(
    config: RerankerConfig, prepared: Prepared, scorer: Scorer, encoder: Encoder, summary: Mapping[str, Any]
) -> dict[str, Any]:
    """What a run says of its test split (`check_data`), query by query, with the scores of every pair: its
    OUTCOME."""
    [table] = evaluate_recipe(config, prepared, [scorer], encoder)
    metric, pool = table.metrics[0], prepared.first_stage
    data, split, judged = prepared.data, config.data.test_split, config.evaluation.candidates == "judged"
    stage = candidates(data, split, encoder, judged, depth=table.depth)[pool]
    pairs = {query: ranked(stage[query], table.depth) for query in data.split(split) if query in stage}
    return {
        "metric": metric,
        "data": data.name,
        "fingerprint": data.fingerprint,
        "split": split,
        "depth": table.depth,
        "first_stage": pool,
        "stages": {row.pool: row.values[metric] for row in table.rows if not row.model},
        "values": {row.kind: row.values[metric] for row in table.rows if row.model},
        "scores": score_pairs(scorer, data, pairs, cache_root())["score"],
        "fusion_weight": scorer.fusion_weight,
        "training": summary,
    }


@dataclasses.dataclass(frozen=True)
class Result:
    """A variant against the reference; one seed has no spread, the reference no difference."""

    variant: str
    seeds: dict[int, float]  # the mean over queries of each
    mean: float
    interval: tuple[float, float]  # of the mean over seeds, by bootstrap over queries
    spread: float | None  # standard deviation between seeds
    fused: float
    portable: float
    difference: float | None  # over the seeds that both have
    difference_interval: tuple[float, float] | None
    p: float | None
    tau: float | None  # mean over queries and seeds; of the reference between its own seeds


Outcomes = Mapping[str, Mapping[int, Mapping[str, Any]]]  # variant -> seed -> outcome


def results(outcomes: Outcomes, reference: str, seed: int = 0) -> list[Result]:
    """Every variant of one collection against the reference: the same queries, the same seeds.

    `seed` is that of the tests and intervals. UserError when the runs were measured on different things.
    """
    _check_alike([one for seeds in outcomes.values() for one in seeds.values()])
    return [_result(variant, seeds, outcomes.get(reference, {}), seed, variant == reference)
            for variant, seeds in outcomes.items() if seeds]  # fmt: skip


def _result(
    variant: str,
    own: Mapping[int, Mapping[str, Any]],
    reference: Mapping[int, Mapping[str, Any]],
    seed: int,
    is_reference: bool,
) -> Result:
    values = _averaged(own.values(), "alone")
    means = {number: mean(one["values"]["alone"]) for number, one in sorted(own.items())}
    shared = [] if is_reference else sorted(own.keys() & reference.keys())
    a, b = (_averaged([runs[number] for number in shared], "alone") for runs in (own, reference))
    pairs = [(own[number], reference[number]) for number in shared]
    pairs = list(combinations(own.values(), 2)) if is_reference else pairs
    taus = [tau for one, other in pairs for tau in kendall_tau(one["scores"], other["scores"]).values()]
    draw = functools.partial(bootstrap_interval, n=SAMPLES, seed=seed)
    return Result(
        variant=variant,
        seeds=means,
        mean=float(values.mean()),
        interval=draw(values),
        spread=float(np.std(list(means.values()), ddof=1)) if len(means) > 1 else None,
        fused=float(_averaged(own.values(), "fused").mean()),
        portable=float(_averaged(own.values(), "portable").mean()),
        difference=float(np.mean(a - b)) if shared else None,
        difference_interval=draw(a, b) if shared else None,
        p=paired_randomisation(a, b, n=SAMPLES, seed=seed) if shared else None,
        tau=float(np.mean(taus)) if taus else None,
    )


def _averaged(runs: Iterable[Mapping[str, Any]], kind: str) -> np.ndarray:
    """The metric of each query, the mean over runs: [Q]."""
    rows = [run["values"][kind] for run in runs]
    return np.array([np.mean([row[query] for row in rows]) for query in sorted(rows[0])] if rows else [])


def _check_alike(found: Sequence[Mapping[str, Any]]) -> None:
    for name in ("metric", "data", "fingerprint", "split", "depth", "first_stage"):
        values = {str(one[name]) for one in found}
        if len(values) > 1:
            differ = " and ".join(sorted(values))
            raise UserError(
                f"runs of one collection were measured on different things: {name} is {differ}. "
                "Set evaluation.first_stage, and delete the runs of other data."
            )


def read_outcomes(root: Path, jobs: Iterable[Job]) -> dict[str, dict[str, dict[int, Any]]]:
    """Collection -> variant -> seed -> outcome, of the jobs that are finished."""
    found: dict[str, dict[str, dict[int, Any]]] = {}
    for job in jobs:
        file = root / job.collection / job.config.name / OUTCOME
        variants = found.setdefault(job.collection, {}).setdefault(job.variant, {})
        if file.exists():
            variants[job.seed] = read_json(file)
    return found


def shown(collection: str, outcomes: Outcomes, reference: str, rows: Sequence[Result]) -> Table:
    """The table of one collection: its first stages, then every variant."""
    one = next(run for seeds in outcomes.values() for run in seeds.values())
    metric, depth, stages = one["metric"], one["depth"], one["stages"]
    count = len(stages[one["first_stage"]])
    empty = [""] * 8
    lines: list[list[str | float | None]] = [
        [f"{name}, first stage", mean(values), *empty, ""] for name, values in stages.items()
    ]
    for row in rows:
        lines.append(
            [
                f"{row.variant} (reference)" if row.variant == reference else row.variant,
                row.mean,
                _bracket(row.interval),
                "" if row.spread is None else f"{row.spread:.3f}",
                "" if row.difference is None else f"{row.difference:+.3f}",
                "" if row.difference_interval is None else _bracket(row.difference_interval, "+"),
                "" if row.p is None else f"{row.p:.4f}",
                "" if row.tau is None else f"{row.tau:.2f}",
                row.fused,
                row.portable,
                str(len(row.seeds)),
            ]
        )
    return {
        "title": (
            f"{collection}: {one['data']} {one['split']}, {count:,} queries, top {depth} of "
            f"{one['first_stage']}"
        ),
        "columns": [
            *("variant", f"{metric} alone", "[95%]", "seeds' sd", "Δ reference", "Δ [95%]", "p"),
            *("τ", "fused", "portable", "seeds"),
        ],
        "rows": lines,
        "note": (
            f"The mean over seeds, query by query. Brackets: bootstrap over queries, {SAMPLES:,} draws. p: "
            f"two-sided paired randomisation over queries, {randomisation_draws(count, SAMPLES)}, not "
            f"corrected for the {max(0, len(rows) - 1)} comparisons. τ: Kendall's tau-b between the orders "
            "of a query's candidates by the variant and by the reference of the same seed, mean over "
            f"queries; in the reference's own row between its seeds. Data {one['fingerprint']}."
        ),
    }


def _bracket(interval: tuple[float, float], sign: str = "") -> str:
    return f"[{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]"
