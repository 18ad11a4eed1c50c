"""Mining hard negatives of ranking data by a named ranker: candidates, scores and the rules in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from common.backends import Encoder, Scorer
from common.data.negatives import Mined, MiningRules, mine
from common.data.records import Qrels, RankingData, Run
from common.errors import UserError
from common.metrics.ranking import ranked
from common.reranker.evaluation import score_pairs
from common.reranker.prepare import cache_root
from common.retrieval.candidates import first_stages, judged_stages

Miner = Literal["bm25", "dense", "cross-encoder"]


def mine_negatives(
    data: RankingData,
    split: str = "train",
    rules: MiningRules | None = None,
    *,
    by: Miner = "dense",
    encoder: Encoder | None = None,
    scorer: Scorer | None = None,
    teacher: Scorer | None = None,
    cache: Path | None = None,
) -> tuple[list[Mined], dict[str, int]]:
    """Hard negatives of a split's queries, and how many passages and queries each rule left out.

    `by` says whose ranking and scores the rules read: BM25, the `encoder`, or the cross-encoder `scorer`,
    which ranks again what BM25 and the encoder find. A `teacher` takes out false negatives; its scores are
    kept. Raises UserError when a ranker is missing and when no negative fits.
    """
    rules = (rules or MiningRules()).validate()
    if by != "bm25" and encoder is None:
        raise UserError(f"mining by {by} needs an encoder: load one with load_encoder, or mine by bm25")
    if (by == "cross-encoder") != (scorer is not None):
        raise UserError("mining by cross-encoder and a scorer go together")
    cache = cache or cache_root()
    qrels = {
        query: {passage: grade for passage, grade in grades.items() if grade > 0}
        for query, grades in data.split(split).items()
    }
    found, own = _scored_candidates(data, qrels, rules, by, encoder, scorer, cache)
    known = None
    if teacher is not None:
        pairs = {query: [*found.get(query, {}), *grades] for query, grades in qrels.items()}
        known = score_pairs(teacher, data, pairs, cache)["score"]
    mined, lost = mine(data, qrels, found, own, rules, known)
    if not mined:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in lost.items())
        raise UserError(f"no negative fits the rules ({reasons}); widen the ranks or lower the margins")
    return mined, lost


def with_negatives(data: RankingData, mined: Sequence[Mined]) -> RankingData:
    """The data with the mined negatives as its own, in place of others: train on them with `data.negatives`
    "given". Their scores join the teacher's, as in a file of mined rows."""
    teacher = {
        item.query: {**data.teacher.get(item.query, {}), **item.positives, **item.negatives} for item in mined
    }
    negatives = {item.query: tuple(item.negatives) for item in mined}
    return replace(data, negatives=negatives, teacher={**data.teacher, **teacher})


def _scored_candidates(
    data: RankingData,
    qrels: Qrels,
    rules: MiningRules,
    by: Miner,
    encoder: Encoder | None,
    scorer: Scorer | None,
    cache: Path,
) -> tuple[Run, Run]:
    """The candidates of each query with their scores, and the positives' scores, by the same ranker."""
    queries = {query: data.queries[query] for query in sorted(qrels)}
    depth = rules.last_rank + max(map(len, qrels.values()), default=0)
    if scorer is None:
        run = first_stages(data, queries, encoder, depth, cache, (by,))[by]
        return run, judged_stages(data, qrels, encoder, cache, (by,))[by]
    pool = first_stages(data, queries, encoder, depth, cache, ("rrf",))["rrf"]
    pairs = {query: list(dict.fromkeys((*ranked(pool[query], depth), *qrels[query]))) for query in qrels}
    scores = score_pairs(scorer, data, pairs, cache)["score"]
    own = {query: {passage: scores[query][passage] for passage in grades} for query, grades in qrels.items()}
    return scores, own
