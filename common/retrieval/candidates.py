"""The candidates of each query by every first stage, computed once and kept on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.backends import Encoder
from common.cache import cache_key, read_cache, write_cache
from common.data.combined import own_id, runs_by_part
from common.data.records import Qrels, RankingData, Run
from common.errors import UserError
from common.retrieval import lexical
from common.retrieval.dense import dense_run, embed, passage_vectors
from common.retrieval.fusion import rrf

FIRST_STAGES = ("bm25", "dense", "rrf")


def first_stages(
    data: RankingData,
    queries: Mapping[str, str],
    encoder: Encoder | None = None,
    depth: int = 100,
    cache_dir: str | Path | None = None,
    which: Sequence[str] = FIRST_STAGES,
) -> dict[str, Run]:
    """First stage -> the `depth` best passages of each query (query id -> text); "rrf" fuses the other two.

    Runs and passage vectors are kept in `cache_dir`, keyed by the data's fingerprint, the queries, the depth
    and the encoder. In combined data a query searches its own part. Raises UserError for an unknown first
    stage and for "dense" or "rrf" without an encoder.
    """
    if data.parts:
        return runs_by_part(
            data, queries, lambda part, own: first_stages(part, own, encoder, depth, cache_dir, which)
        )
    compute = {
        "bm25": lambda: lexical.bm25_run(data.corpus, queries, depth),
        "dense": lambda: dense_run(
            data.corpus, queries, _needed(encoder), depth, cache_dir, data.fingerprint
        ),
    }
    key = [data.fingerprint, sorted(queries.items()), depth]
    return _stages(compute, key, encoder, cache_dir, which, lambda runs: rrf(runs, depth=depth))


def judged_stages(
    data: RankingData,
    qrels: Qrels,
    encoder: Encoder | None = None,
    cache_dir: str | Path | None = None,
    which: Sequence[str] = FIRST_STAGES,
) -> dict[str, Run]:
    """First stage -> scores of exactly the judged passages of each query, relevant or not.

    For collections such as WikiQA, where a query's own judged candidates are ranked. BM25's word statistics
    are those of the whole corpus. Cached and checked as `first_stages`.
    """
    if data.parts:
        own = {query: {own_id(passage): grade for passage, grade in g.items()} for query, g in qrels.items()}
        return runs_by_part(
            data, own, lambda part, judged: judged_stages(part, judged, encoder, cache_dir, which)
        )
    candidates = {query: sorted(grades) for query, grades in qrels.items()}
    compute = {
        "bm25": lambda: _judged_bm25(data, candidates),
        "dense": lambda: _judged_dense(data, candidates, _needed(encoder), cache_dir),
    }
    key = [data.fingerprint, sorted((query, data.queries[query]) for query in qrels), candidates]
    most = max(map(len, candidates.values()), default=0)
    return _stages(compute, key, encoder, cache_dir, which, lambda runs: rrf(runs, depth=most))


def _stages(
    compute: Mapping[str, Callable[[], Run]],
    key: list[Any],
    encoder: Encoder | None,
    cache_dir: str | Path | None,
    which: Sequence[str],
    fuse: Callable[[list[Run]], Run],
) -> dict[str, Run]:
    unknown = [name for name in which if name not in FIRST_STAGES]
    if unknown:
        raise UserError(f"unknown first stage {unknown[0]!r}; allowed: {', '.join(FIRST_STAGES)}")
    models: dict[str, Any] = {
        "bm25": [lexical.K1, lexical.B],
        "dense": encoder.identity if encoder else None,
    }
    runs: dict[str, Run] = {}
    for name in ("bm25", "dense"):
        if name in which or "rrf" in which:
            path = Path(cache_dir) / f"{name}-{cache_key(*key, models[name])}.json" if cache_dir else None
            runs[name] = _cached(path, compute[name])
    if "rrf" in which:
        runs["rrf"] = fuse([runs["bm25"], runs["dense"]])
    return {name: runs[name] for name in which}


def _cached(path: Path | None, compute: Callable[[], Run]) -> Run:
    if path is not None and path.exists():
        stored: Run = read_cache(path, lambda file: json.loads(file.read_text(encoding="utf-8")))
        return stored
    run = compute()
    if path is not None:
        write_cache(path, json.dumps(run, ensure_ascii=False).encode())
    return run


def _needed(encoder: Encoder | None) -> Encoder:
    if encoder is None:
        raise UserError("the first stages dense and rrf need an encoder: name one, or use bm25 alone")
    return encoder


def _judged_bm25(data: RankingData, candidates: Mapping[str, Sequence[str]]) -> Run:
    ids = sorted(data.corpus)
    place = {passage: number for number, passage in enumerate(ids)}
    index = lexical.BM25([data.corpus[passage] for passage in ids])
    run: Run = {}
    for query, passages in candidates.items():
        scores = index.scores(data.queries[query])
        run[query] = {passage: float(scores[place[passage]]) for passage in passages}
    return run


def _judged_dense(
    data: RankingData,
    candidates: Mapping[str, Sequence[str]],
    encoder: Encoder,
    cache_dir: str | Path | None,
) -> Run:
    place = {passage: number for number, passage in enumerate(sorted(data.corpus))}
    passages = passage_vectors(data.corpus, encoder, cache_dir, data.fingerprint)
    queries = embed([data.queries[query] for query in candidates], encoder, "query")
    run: Run = {}
    for vector, (query, names) in zip(queries, candidates.items(), strict=True):
        scores = passages[[place[name] for name in names]] @ vector
        run[query] = dict(zip(names, map(float, scores), strict=True))
    return run
