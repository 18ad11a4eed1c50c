"""First stages and rerankers in one table: values with intervals, paired tests against every first stage."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common import report
from common.backends import SCORES, Encoder, Scorer, Scores
from common.cache import read_cache, write_cache
from common.checkpoint import write_file
from common.config import RerankerConfig
from common.data.records import Qrels, RankingData, Run
from common.data.sources import read_qrels
from common.errors import UserError
from common.metrics.calibration import Confidence
from common.metrics.ranking import DEFAULT_METRICS, evaluate_run, mean, ranked
from common.metrics.significance import bootstrap_interval, paired_randomisation, randomisation_draws
from common.progress import progress
from common.report import tables_text
from common.reranker.analysis_view import confidence_table
from common.reranker.confidence import ConfidenceResult, confidence_results
from common.reranker.prepare import Prepared, cache_root, candidates
from common.retrieval.fusion import fuse_runs

Kind = Literal["first stage", "alone", "fused", "portable"]
SAMPLES = 10_000  # draws of every interval, and of the tests that are not exact
_CHUNK = 8192  # pairs scored between two writes of the cache


@dataclass(frozen=True)
class Comparison:
    """Paired, over queries: mean difference with its interval, randomisation p, shares of queries."""

    difference: float
    interval: tuple[float, float]
    p: float
    worse: float
    better: float


@dataclass(frozen=True)
class Row:
    """One ranking of a pool's candidates. `model` is empty for the first stage itself."""

    pool: str
    model: str
    kind: Kind
    omega: float | None
    values: dict[str, dict[str, float]]  # metric -> query -> value
    means: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    versus_first: dict[str, Comparison] = field(
        default_factory=dict
    )  # metric -> against the pool's first stage
    versus_stage: dict[str, Comparison] = field(
        default_factory=dict
    )  # first stage -> first metric against it

    def label(self, *, named: bool = True) -> str:
        """The ranking in words; the model's name can go where a table has one model only."""
        if not self.model:
            return self.pool
        omega = f" ω={self.omega:g}" if self.omega is not None else ""
        return f"{self.pool} → {f'{self.model}, ' if named else ''}{self.kind}{omega}"


@dataclass(frozen=True)
class Pair:
    """Two checkpoints over the same candidates: `a` minus `b` on the first metric."""

    pool: str
    kind: Kind
    a: str
    b: str
    comparison: Comparison


@dataclass(frozen=True)
class ConfidenceRow:
    """How well a checkpoint, alone over a pool's candidates, knows that its top passage is relevant."""

    pool: str
    model: str
    result: ConfidenceResult


@dataclass(frozen=True)
class Table:
    """An evaluation; `rows` hold the first stages, then for each pool every checkpoint."""

    data: str
    fingerprint: str
    split: str
    queries: int
    depth: int
    metrics: tuple[str, ...]
    best_first_stage: str
    seed: int
    rows: list[Row]
    pairs: list[Pair]
    confidence: list[ConfidenceRow] = field(default_factory=list)

    def text(self, width: int = 150) -> str:
        """The table for a terminal, with the number of queries, the depth and what the columns mean."""
        return tables_text(self.shown(), width)

    def shown(self) -> list[report.Table]:
        """The tables of results.json: the rankings, then the checkpoints against each other."""
        tables = [_rows_table(self)]
        tables += [_pairs_table(self)] if self.pairs else []
        return [*tables, _confidence_table(self)] if self.confidence else tables

    def json(self) -> dict[str, Any]:
        """Everything but the values of single queries, ready for a JSON file."""
        stored = asdict(replace(self, rows=[replace(row, values={}) for row in self.rows]))
        for row in stored["rows"]:
            del row["values"]
        return {**stored, "samples": SAMPLES, "interval_level": 0.95}

    def per_query(self) -> Iterator[tuple[str, ...]]:
        """Rows of a TSV file, first the header: query, pool, model, ranking, metric, value."""
        yield "query", "pool", "model", "ranking", "metric", "value"
        for row in self.rows:
            for metric, values in row.values.items():
                for query, value in values.items():
                    yield query, row.pool, row.model, row.kind, metric, f"{value:.6f}"


def evaluate(
    data: RankingData,
    split: str,
    first_stage_runs: Mapping[str, Run],
    scorers: Sequence[Scorer] = (),
    *,
    depth: int = 50,
    pools: Sequence[str] = ("rrf",),
    cache_dir: str | Path | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    qrels: Qrels | None = None,
    confidences: Mapping[str, Confidence] | None = None,
    seed: int = 0,
) -> Table:
    """Rerank the top `depth` of each pool (names in `first_stage_runs`) by every scorer and compare.

    Every ranking, first stages included, is cut to `depth`; a query without candidates counts as 0. `qrels`
    replaces the split's judgements when the official ones name passages outside the corpus (the ideal DCG
    needs them). Pair scores are computed once per (query, passage) over all pools and kept in `cache_dir`.
    The first metric decides which first stage is best; R@k and Success@k beyond `depth` are named by it.
    `confidences` holds what was fitted on dev, by the scorer's identity. Raises UserError for an unknown pool
    or unknown ids.
    """
    qrels = data.split(split) if qrels is None else qrels
    metrics = _at_depth(metrics, depth)
    stages = _cut(first_stage_runs, qrels, depth)
    _check(data, qrels, stages, pools)
    rows = [_row(run, qrels, metrics, seed, pool=name) for name, run in stages.items()]
    firsts = {row.pool: row for row in rows}
    best = max(rows, key=lambda row: row.means[metrics[0]])
    rows = [_compared(row, firsts, metrics, seed) for row in rows]
    pairs = _union([stages[pool] for pool in pools])
    names = _distinct_names(scorers)
    scored = [score_pairs(scorer, data, pairs, cache_dir) for scorer in scorers]
    sure: list[ConfidenceRow] = []
    for pool in pools:
        for name, scorer, scores in zip(names, scorers, scored, strict=True):
            fitted = (confidences or {}).get(scorer.identity)
            candidates = {
                query: {p: scores["score"][query][p] for p in run} for query, run in stages[pool].items()
            }
            results = confidence_results(candidates, scores["resonance"], qrels, fitted)
            sure += [ConfidenceRow(pool, name, result) for result in results]
            for kind, run in _rankings(stages[pool], scores, scorer.fusion_weight):
                omega = scorer.fusion_weight if kind == "fused" else None
                row = _row(run, qrels, metrics, seed, pool=pool, model=name, kind=kind, omega=omega)
                rows.append(_compared(row, firsts, metrics, seed))
    return Table(
        data=data.name,
        fingerprint=data.fingerprint,
        split=split,
        queries=len(qrels),
        depth=depth,
        metrics=tuple(metrics),
        best_first_stage=best.pool,
        seed=seed,
        rows=rows,
        pairs=_pairs(rows, metrics[0], seed),
        confidence=sure,
    )


def evaluate_recipe(
    config: RerankerConfig,
    prepared: Prepared,
    scorers: Sequence[Scorer],
    encoder: Encoder,
    confidences: Mapping[str, Confidence] | None = None,
) -> list[Table]:
    """The recipe's test split: every first stage, then each scorer over the recipe's candidates.

    One table, or one for each part of combined data that has the split, over that part's own first stage.
    """
    settings, split = config.evaluation, config.data.test_split
    judged = settings.candidates == "judged"
    tables = []
    sources = {part.fingerprint: name for name, part in prepared.data.parts.items()}
    for data, own in held_out(prepared.data, split, judged):
        longest = max(map(len, data.split(split).values()), default=0)
        tables.append(
            evaluate(
                data,
                split,
                candidates(data, split, encoder, own, depth=settings.depth),
                scorers,
                depth=longest if own else settings.depth,
                pools=(prepared.stages.get(sources.get(data.fingerprint, ""), prepared.first_stage),),
                cache_dir=cache_root(),
                metrics=tuple(dict.fromkeys((settings.metric, *DEFAULT_METRICS))),
                confidences=confidences,
            )
        )
    return tables


def held_out(data: RankingData, split: str, judged: bool) -> list[tuple[RankingData, bool]]:
    """What is evaluated apart: the data, or each part of combined data that has the split, and whether its
    judged passages are its candidates (`judged`; of a part only where it judges irrelevant ones)."""
    if not data.parts:
        return [(data, judged)]
    data.split(split)
    return [
        (part, judged and part.judges_irrelevant(split))
        for part in data.parts.values()
        if split in part.qrels
    ]


def chosen_qrels(
    data: RankingData,
    split: str,
    qrels_file: str | Path | None = None,
    max_queries: int | None = None,
    *,
    say: Callable[[str], None] = print,
) -> Qrels:
    """A split's judgements, or those of a file; of these the first `max_queries` queries by id.

    Says how many queries of the file the data lacks: these are left out. Raises UserError for an unknown
    split, and for a file that judges none of the data's queries.
    """
    if qrels_file is None:
        qrels = data.split(split)
    else:
        judged = read_qrels(qrels_file)
        qrels = {query: grades for query, grades in judged.items() if query in data.queries}
        if not qrels:
            raise UserError(f"{qrels_file}: judges none of the {len(data.queries):,} queries of {data.name}")
        if lost := len(judged) - len(qrels):
            say(f"{qrels_file}: {lost:,} of its {len(judged):,} queries are not in {data.name} and left out")
    return {query: qrels[query] for query in sorted(qrels)[:max_queries]}


def write_output(path: str | Path, text: str) -> None:
    """Write a result file whole, with its folder. Raises UserError when it cannot be written."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """As `write_output`, for what is no text."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another file.") from error


def score_pairs(
    scorer: Scorer,
    data: RankingData,
    pairs: Mapping[str, Sequence[str]],
    cache_dir: str | Path | None = None,
) -> dict[str, Run]:
    """Field of `Scores` -> query id -> passage id -> value, for the passages of each query in `pairs`.

    Only pairs that the cache lacks are scored, from the longest to the shortest; the cache is written as they
    come, so an interrupted evaluation goes on where it stopped. Raises UserError for a score not finite.
    """
    cached = cache_dir is not None and scorer.identity
    path = Path(cache_dir or "") / f"scores-{data.fingerprint}-{scorer.identity}.npz" if cached else None
    known = read_cache(path, _read_scores) if path is not None and path.exists() else {}
    missing = [(query, p) for query, passages in pairs.items() for p in passages if (query, p) not in known]
    missing.sort(key=lambda pair: -len(data.queries[pair[0]]) - len(data.corpus[pair[1]]))
    with progress(len(missing), f"{scorer.name}: pairs scored") as steps:
        for start in range(0, len(missing), _CHUNK):
            chunk = missing[start : start + _CHUNK]
            known |= _score_chunk(scorer, data, chunk, steps.advance)
            if path is not None:
                write_cache(path, _scores_bytes(known))
    return {
        name: {
            query: {passage: float(known[query, passage][place]) for passage in passages}
            for query, passages in pairs.items()
        }
        for place, name in enumerate(SCORES)
    }


def _score_chunk(
    scorer: Scorer, data: RankingData, chunk: Sequence[tuple[str, str]], on_batch: Callable[[int], None]
) -> dict[tuple[str, str], np.ndarray]:
    scores: Scores = scorer.score(
        [data.queries[query] for query, _ in chunk], [data.corpus[passage] for _, passage in chunk], on_batch
    )
    values = np.stack([getattr(scores, name) for name in SCORES], axis=1)  # [N, 5]
    broken = ~np.isfinite(values[:, :2]).all(axis=1)
    if broken.any():
        query, passage = chunk[int(np.argmax(broken))]
        raise UserError(
            f"{scorer.name}: {int(broken.sum())} of {len(chunk)} scores are not finite, the first for query "
            f"{query}, passage {passage}. The checkpoint is damaged or diverged in training: use another."
        )
    return dict(zip(chunk, values, strict=True))


def _scores_bytes(known: Mapping[tuple[str, str], np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    queries, passages = zip(*known, strict=True)
    values = np.stack(list(known.values())).astype(np.float32)
    np.savez(buffer, queries=np.array(queries), passages=np.array(passages), values=values)
    return buffer.getvalue()


def _read_scores(path: Path) -> dict[tuple[str, str], np.ndarray]:
    with np.load(path, allow_pickle=False) as stored:
        keys = zip(stored["queries"].tolist(), stored["passages"].tolist(), strict=True)
        return dict(zip(keys, stored["values"], strict=True))


def _at_depth(metrics: Sequence[str], depth: int) -> tuple[str, ...]:
    """Recall and hit rate beyond the depth are those at the depth, and are named so."""
    found = [(metric, re.fullmatch(r"(R|Success)@(\d+)", metric)) for metric in metrics]
    beyond = (f"{m[1]}@{depth}" if m and int(m[2]) > depth else metric for metric, m in found)
    return tuple(dict.fromkeys(beyond))


def _cut(runs: Mapping[str, Run], qrels: Qrels, depth: int) -> dict[str, Run]:
    return {
        name: {
            query: {p: run[query][p] for p in ranked(run[query], depth)} for query in qrels if query in run
        }
        for name, run in runs.items()
    }


def _check(data: RankingData, qrels: Qrels, stages: Mapping[str, Run], pools: Sequence[str]) -> None:
    if not qrels or not stages:
        raise UserError(
            f"{data.name}: nothing to evaluate, {len(qrels)} queries and {len(stages)} first stages"
        )
    for pool in pools:
        if pool not in stages:
            raise UserError(f"unknown pool {pool!r}; the first stages are {', '.join(stages)}")
        if not any(stages[pool].values()):
            raise UserError(f"pool {pool}: no candidates for any of the {len(qrels)} queries of {data.name}")
        for query, passages in stages[pool].items():
            lost = [passage for passage in passages if passage not in data.corpus]
            if query not in data.queries or lost:
                what = f"passage {lost[0]}" if lost else "its text"
                raise UserError(f"pool {pool}, query {query}: {what} is not in {data.name}")


def _union(runs: Sequence[Run]) -> dict[str, list[str]]:
    union: dict[str, dict[str, None]] = {}
    for run in runs:
        for query, passages in run.items():
            union.setdefault(query, {}).update(dict.fromkeys(passages))
    return {query: list(passages) for query, passages in union.items()}


def _distinct_names(scorers: Sequence[Scorer]) -> list[str]:
    counts = Counter(scorer.name for scorer in scorers)
    return [s.name if counts[s.name] == 1 else f"{s.name} {s.identity[:6]}" for s in scorers]


def _rankings(stage: Run, scores: Mapping[str, Run], omega: float) -> Iterator[tuple[Kind, Run]]:
    """The candidates of `stage` by the full score, by that fused with the stage, by the portable score."""

    def of(name: str) -> Run:
        return {query: {p: scores[name][query][p] for p in candidates} for query, candidates in stage.items()}

    yield "alone", of("score")
    yield "fused", fuse_runs(stage, of("score"), omega)
    yield "portable", of("portable")


def _row(
    run: Run,
    qrels: Qrels,
    metrics: Sequence[str],
    seed: int,
    *,
    pool: str,
    model: str = "",
    kind: Kind = "first stage",
    omega: float | None = None,
) -> Row:
    values = evaluate_run(run, qrels, metrics)
    means = {metric: mean(values[metric]) for metric in metrics}
    intervals = {m: bootstrap_interval(list(values[m].values()), n=SAMPLES, seed=seed) for m in metrics}
    return Row(pool, model, kind, omega, values, means, intervals)


def _compared(row: Row, firsts: Mapping[str, Row], metrics: Sequence[str], seed: int) -> Row:
    """The row with its comparisons; a first stage is compared with the others only."""
    metric, own = metrics[0], firsts[row.pool]
    versus_first = {m: compare(row.values[m], own.values[m], seed) for m in metrics if row is not own}
    versus_stage = {
        name: compare(row.values[metric], first.values[metric], seed)
        for name, first in firsts.items()
        if row is not first
    }
    return replace(row, versus_first=versus_first, versus_stage=versus_stage)


def compare(values: Mapping[str, float], others: Mapping[str, float], seed: int = 0) -> Comparison:
    """Values by query against others of the same queries (KeyError for one that is missing)."""
    a = np.array([values[query] for query in values])
    b = np.array([others[query] for query in values])
    return Comparison(
        difference=float(np.mean(a - b)),
        interval=bootstrap_interval(a, b, n=SAMPLES, seed=seed),
        p=paired_randomisation(a, b, n=SAMPLES, seed=seed),
        worse=float(np.mean(a < b - 1e-9)),
        better=float(np.mean(a > b + 1e-9)),
    )


def _pairs(rows: Sequence[Row], metric: str, seed: int) -> list[Pair]:
    reranked = [row for row in rows if row.model]
    return [
        Pair(a.pool, a.kind, a.model, b.model, compare(a.values[metric], b.values[metric], seed))
        for a, b in combinations(reranked, 2)
        if (a.pool, a.kind) == (b.pool, b.kind)
    ]


def _rows_table(table: Table) -> report.Table:
    first, *others = table.metrics
    stages = [row.pool for row in table.rows if not row.model]
    models = list(dict.fromkeys(row.model for row in table.rows if row.model))
    rows: list[list[str | float | None]] = []
    for row in table.rows:
        against = row.versus_first.get(first)
        rows.append(
            [
                row.label(named=len(models) > 1),
                row.means[first],
                _bracket(row.intervals[first]),
                *(row.means[metric] for metric in others),
                *(_difference(against) if against else ("", "")),
                *(_p(row.versus_stage[name].p) if name in row.versus_stage else "" for name in stages),
                *(f"{share:.0%}" for share in ((against.better, against.worse) if against else ())),
                *(("", "") if against is None else ()),
            ]
        )
    return {
        "title": f"{table.data} {table.split}: {table.queries:,} queries, top {table.depth} of a first stage"
        + (f", reranked by {models[0]}" if len(models) == 1 else ""),
        "columns": [
            *("ranking", first, "[95%]", *others, "Δ", "Δ [95%]"),
            *(f"p {name}" for name in stages),
            *("better", "worse"),
        ],
        "rows": rows,
        "note": (
            f"Δ, better and worse (shares of queries): {first} against the first stage of the same "
            f"candidates; p: against each first stage, {table.best_first_stage} is the best. Brackets: "
            f"bootstrap over queries, {SAMPLES:,} draws; p: two-sided paired randomisation, "
            f"{randomisation_draws(table.queries, SAMPLES)}; seed {table.seed}. Data {table.fingerprint}."
        ),
    }


def _pairs_table(table: Table) -> report.Table:
    return {
        "title": "Checkpoints against each other, a − b",
        "columns": ["ranking: a − b", f"Δ {table.metrics[0]}", "Δ [95%]", "p"],
        "rows": [
            [
                f"{pair.pool}, {pair.kind}: {pair.a} − {pair.b}",
                *_difference(pair.comparison),
                _p(pair.comparison.p),
            ]
            for pair in table.pairs
        ],
    }


def _confidence_table(table: Table) -> report.Table:
    rows = [{"": f"{row.pool} → {row.model}", **asdict(row.result)} for row in table.confidence]
    return confidence_table(rows, f"top {table.depth} of a first stage")


def _difference(comparison: Comparison) -> tuple[str, str]:
    return f"{comparison.difference:+.3f}", _bracket(comparison.interval, "+")


def _bracket(interval: tuple[float, float], sign: str = "") -> str:
    return f"[{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]"


def _p(p: float) -> str:
    return f"<{1 / SAMPLES:.4f}" if p < 1.5 / SAMPLES else f"{p:.4f}"
