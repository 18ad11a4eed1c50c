"""What the searches and the feedback of a service say: quality over time, speed, drift, and when to retrain.

Quality is measured on searches where a user liked a passage: a liked passage is relevant, every other one is
not. Users judge what they were shown, so the values compare weeks with each other, not with a test set.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from html import escape
from typing import Any, Literal

import numpy as np

from common.errors import UserError
from common.metrics.latency import percentiles
from common.metrics.ranking import evaluate_run
from common.metrics.significance import bootstrap_interval
from common.report import Table, line_chart, page, table_html
from common.service.feedback import Feedback, FeedbackStore, Search

DAY = 86_400.0
METRICS = ("nDCG@10", "RR@10")
MAX_FALL = 0.05  # of the NDCG, relative: beyond it a model is to be retrained
LEVEL = 0.05  # of the test behind that
FEWEST = 30  # judged searches on both sides, below which nothing is said
_DRIFTED = 0.1  # Kolmogorov-Smirnov distance, with p below 0.01
_SAMPLES = 9_999
_WINDOWS = 1_000
Judged = dict[str, dict[str, float]]  # metric -> search -> value


@dataclass(frozen=True)
class Window:
    """A stretch of time; values are None where there is nothing to take them from. Latency: milliseconds by
    stage and percentile; rates in [0, 1]."""

    begin: float  # seconds since 1970
    end: float
    searches: int
    judged: int  # searches with a liked passage
    ndcg: float | None
    ndcg_interval: tuple[float, float] | None  # 95 %, bootstrap over searches
    mrr: float | None
    mrr_interval: tuple[float, float] | None
    liked: float | None  # share of the feedback that is +1
    cache_hits: float | None
    fallbacks: float | None
    latency: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Drift:
    """A distribution of the last window beside the time before: Kolmogorov-Smirnov distance, its p, means."""

    what: str
    before: float
    now: float
    distance: float
    p: float

    @property
    def drifted(self) -> bool:
        return self.distance > _DRIFTED and self.p < 0.01


@dataclass(frozen=True)
class Verdict:
    """`retrain` when the last window's NDCG is more than MAX_FALL below the time before and the one-sided
    permutation test says that this is no chance; `watch` when it is below and may be chance."""

    verdict: Literal["fine", "watch", "retrain", "too few"]
    why: str
    before: float | None = None
    now: float | None = None
    fall: float | None = None  # relative, in parts of `before`
    p: float | None = None


@dataclass(frozen=True)
class Monitoring:
    """Everything that `scripts/monitor.py` prints; `windows` oldest first."""

    windows: list[Window]
    verdict: Verdict
    drift: list[Drift]
    fallbacks: dict[str, int]

    def json(self) -> dict[str, Any]:
        stored = asdict(self)
        for item, own in zip(stored["drift"], self.drift, strict=True):
            item["drifted"] = own.drifted
        return stored


def monitor(store: FeedbackStore, *, days: float = 7.0, until: float | None = None) -> Monitoring:
    """Windows of `days` back from `until` (seconds since 1970, now when absent), as far as searches reach.

    Raises UserError for days out of range, and for a store without searches.
    """
    if not days > 0:
        raise UserError(f"days is {days}; allowed: > 0")
    until = time.time() if until is None else until
    searches = list(store.searches(until=until))
    if not searches:
        raise UserError(f"{store.path}: no searches yet; start the service with this file, and search.")
    votes = list(store.feedback(until=until))
    values = judged(searches, votes)
    count = math.ceil((until - searches[0].time) / (days * DAY)) or 1
    if count > _WINDOWS:
        raise UserError(f"days is {days}: that makes {count:,} windows; allowed: up to {_WINDOWS:,}")
    edges = [until - days * DAY * number for number in range(count, -1, -1)]
    windows = [
        _window(begin, end, _between(searches, begin, end), _between(votes, begin, end), values)
        for begin, end in itertools.pairwise(edges)
    ]
    before, now = _between(searches, 0.0, edges[-2]), _between(searches, edges[-2], until)
    reasons: dict[str, int] = {}
    for search in searches:
        if search.fallback:
            reason = search.fallback.split(":")[0]
            reasons[reason] = reasons.get(reason, 0) + 1
    return Monitoring(windows, judge(before, now, values["nDCG@10"]), drifts(before, now), reasons)


def judged(searches: Sequence[Search], votes: Sequence[Feedback]) -> Judged:
    """Metric -> search -> value in [0, 1] of the order that the user saw, for searches with a liked
    passage."""
    liked: dict[str, dict[str, int]] = {}
    for vote in votes:
        if vote.value > 0:
            liked.setdefault(vote.search, {})[vote.document] = 1
    runs = {
        search.id: {item.id: float(-rank) for rank, item in enumerate(search.reranked or search.first_stage)}
        for search in searches
        if search.id in liked
    }
    return evaluate_run(runs, {search: liked[search] for search in runs}, METRICS)


def judge(before: Sequence[Search], now: Sequence[Search], ndcg: Mapping[str, float]) -> Verdict:
    """Whether the NDCG of the searches `now` is below that of those before."""
    from scipy.stats import permutation_test

    a, b = (np.asarray([ndcg[s.id] for s in side if s.id in ndcg]) for side in (before, now))
    if min(len(a), len(b)) < FEWEST:
        counts = f"{len(b)} judged searches in the last window and {len(a)} before"
        return Verdict("too few", f"{counts}; {FEWEST} of each are needed")
    old, new = float(a.mean()), float(b.mean())
    fall = (old - new) / max(old, 1e-9)
    found = permutation_test(
        (a, b),
        lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis),
        vectorized=True,
        n_resamples=_SAMPLES,
        batch=1_000,
        alternative="greater",
        rng=np.random.default_rng(0),
    )
    p = float(found.pvalue)
    change = f"NDCG@10 {new:.3f} in the last window, {old:.3f} before ({-fall:+.1%}, p = {p:.3g})"
    if fall <= MAX_FALL:
        return Verdict("fine", f"{change}; {MAX_FALL:.0%} may be lost", old, new, fall, p)
    if p >= LEVEL:
        return Verdict("watch", f"{change}; that much may be chance", old, new, fall, p)
    return Verdict("retrain", change, old, new, fall, p)


def drifts(before: Sequence[Search], now: Sequence[Search]) -> list[Drift]:
    """Query lengths and scores of the first hit, now beside before; none where one side has too few."""
    from scipy.stats import ks_2samp

    found = []
    for what, value in (
        ("words of a query", lambda s: float(len(s.query.split()))),
        ("first-stage score of the first hit", lambda s: s.first_stage[0].score if s.first_stage else None),
        ("reranked score of the first hit", lambda s: s.reranked[0].score if s.reranked else None),
    ):
        a, b = ([v for s in side if (v := value(s)) is not None] for side in (before, now))
        if min(len(a), len(b)) >= FEWEST:
            test = ks_2samp(a, b)
            found.append(
                Drift(what, float(np.mean(a)), float(np.mean(b)), float(test.statistic), float(test.pvalue))
            )
    return found


def hard_cases(
    searches: Sequence[Search], votes: Sequence[Feedback], texts: Mapping[str, str]
) -> tuple[list[dict[str, Any]], int]:
    """Training rows of what the service ranked wrong, and how many cases were lost because a text is gone.

    A case is a query with a liked passage that was not first, or with a disliked one. Its positives are the
    liked passages; its negatives the disliked ones, then what stood above the best liked one and was not
    judged. All searches of one query are one row, where a like counts for more than a dislike.
    """
    by_search: dict[str, dict[str, int]] = {}
    for vote in votes:
        by_search.setdefault(vote.search, {})[vote.document] = vote.value
    rows: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for search in searches:
        own = by_search.get(search.id, {})
        liked = [name for name, value in own.items() if value > 0]
        order = [item.id for item in search.reranked or search.first_stage]
        first = min((order.index(name) for name in liked if name in order), default=0)
        if liked and (first > 0 or len(liked) < len(own)):
            positives, negatives = rows.setdefault(search.query, ({}, {}))
            positives.update(dict.fromkeys(liked))
            negatives.update(dict.fromkeys([name for name, value in own.items() if value < 0]))
            negatives.update(dict.fromkeys(name for name in order[:first] if name not in own))
    made: list[dict[str, Any]] = []
    for query, (positives, negatives) in rows.items():
        good = list(dict.fromkeys(texts[name] for name in positives if name in texts))
        bad = [texts[name] for name in negatives if name in texts and name not in positives]
        bad = [text for text in dict.fromkeys(bad) if text not in good]
        if good and bad:
            made.append({"query": query, "positive": good, "negative": bad})
    return made, len(rows) - len(made)


def monitoring_tables(found: Monitoring) -> list[Table]:
    """The windows, the latencies and the drift as tables."""
    rows: list[list[str | float | None]] = []
    speed: list[list[str | float | None]] = []
    for window in found.windows:
        when = f"{_day(window.begin)} to {_day(window.end)}"
        numbers = [window.ndcg, _text(window.ndcg_interval), window.mrr, _text(window.mrr_interval)]
        rates = [_percent(value) for value in (window.liked, window.cache_hits, window.fallbacks)]
        rows.append([when, window.searches, window.judged, *numbers, *rates])
        for stage, times in window.latency.items():
            speed.append([when, stage, *(round(times[part], 2) for part in ("p50", "p95", "p99"))])
    reasons = ", ".join(f"{reason}: {count}" for reason, count in found.fallbacks.items()) or "none"
    columns = ["window (UTC)", "searches", "judged", "nDCG@10", "95 %", "MRR@10", "95 % of MRR"]
    tables: list[Table] = [
        {
            "title": f"Quality: {found.verdict.verdict}",
            "columns": [*columns, "liked %", "cache hits %", "fallbacks %"],
            "rows": rows,
            "note": f"{found.verdict.why}. Judged: a user liked a passage. Fallbacks: {reasons}.",
        },
        {
            "title": "Latency, milliseconds",
            "columns": ["window (UTC)", "stage", "p50", "p95", "p99"],
            "rows": speed,
            "note": "",
        },
    ]
    if found.drift:
        drift: list[list[str | float | None]] = [
            [item.what, item.before, item.now, item.distance, item.p, "yes" if item.drifted else "no"]
            for item in found.drift
        ]
        note = f"Kolmogorov-Smirnov; drifted: distance above {_DRIFTED} and p below 0.01"
        columns = ["what", "mean before", "mean now", "distance", "p", "drifted"]
        tables.append({"title": "Drift, last window", "columns": columns, "rows": drift, "note": note})
    return tables


def monitoring_page(found: Monitoring) -> str:
    """A self-contained page: the verdict, curves over the windows, the tables."""
    numbered = list(zip(range(1 - len(found.windows), 1), found.windows, strict=True))
    quality = {
        "nDCG@10": [(at, w.ndcg) for at, w in numbered if w.ndcg is not None],
        "MRR@10": [(at, w.mrr) for at, w in numbered if w.mrr is not None],
    }
    speed = {
        part: [(at, w.latency["total"][part]) for at, w in numbered if "total" in w.latency]
        for part in ("p50", "p95", "p99")
    }
    charts = [
        line_chart(title, {name: curve for name, curve in curves.items() if curve}, "window, 0 is the last")
        for title, curves in (("Quality on feedback", quality), ("Milliseconds of a query", speed))
        if any(curves.values())
    ]
    body = [
        f"<h1>{escape(found.verdict.verdict.capitalize())}</h1>",
        f'<p class="lead">{escape(found.verdict.why)}</p>',
        f'<div class="panels">{"".join(charts)}</div>',
        *map(table_html, monitoring_tables(found)),
    ]
    return page("Monitoring", "\n".join(body))


def _window(
    begin: float, end: float, searches: Sequence[Search], votes: Sequence[Feedback], values: Judged
) -> Window:
    own = [search.id for search in searches if search.id in values["nDCG@10"]]
    ndcg, mrr = ([values[metric][search] for search in own] for metric in METRICS)
    stages: dict[str, list[float]] = {}
    for search in searches:
        for stage, seconds in search.latency.items():
            stages.setdefault(stage, []).append(seconds)
    latency = {stage: percentiles(times) for stage, times in stages.items()}
    return Window(
        begin,
        end,
        len(searches),
        len(own),
        _mean(ndcg),
        bootstrap_interval(ndcg) if ndcg else None,
        _mean(mrr),
        bootstrap_interval(mrr) if mrr else None,
        _mean([float(vote.value > 0) for vote in votes]),
        _mean([float(search.cache_hit) for search in searches]),
        _mean([float(search.fallback is not None) for search in searches]),
        latency,
    )


def _between(items: Sequence[Any], begin: float, end: float) -> list[Any]:
    return [item for item in items if begin <= item.time < end]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def _text(interval: tuple[float, float] | None) -> str | None:
    return None if interval is None else f"{interval[0]:.3f}–{interval[1]:.3f}"


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 1)
