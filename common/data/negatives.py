"""Mining hard negatives: which of a retriever's passages a query should learn to tell from its positives.

Margins, rank range and maximum score as in sentence-transformers' `mine_hard_negatives`; a margin relative to
the positive's score is NV-Retriever's (Moreira et al. 2024, arXiv:2407.15831).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from common.data.records import Qrels, RankingData, Run, Triple, relevant_passages, same_words
from common.errors import UserError
from common.metrics.ranking import ranked


@dataclass(frozen=True)
class MiningRules:
    """What makes a passage a hard negative of a query."""

    count: int = 5
    """Negatives kept for a query."""
    first_rank: int = 1
    """The best rank that is taken, from 1; relevant passages are not counted."""
    last_rank: int = 100
    """The worst rank that is taken."""
    margin: float | None = None
    """A negative scores at least this much less than the query's best positive."""
    relative_margin: float | None = 0.05
    """The same as a share of the positive's score: 0.05 keeps what scores at most 95 % of it."""
    max_score: float | None = None
    """Passages that score more are left out."""
    teacher_margin: float = 0.0
    """By the teacher's scores a negative must be this much below the best positive; only with a teacher."""
    choose: Literal["hardest", "random"] = "hardest"
    """Which of the fitting passages are kept."""
    seed: int = 0
    """Of the random choice."""

    def validate(self) -> MiningRules:
        """Return self, or raise a UserError that lists every rule out of range."""
        share, most = self.relative_margin, self.max_score
        checks = [
            ("count", self.count, self.count >= 1, ">= 1"),
            ("first-rank", self.first_rank, self.first_rank >= 1, ">= 1"),
            ("last-rank", self.last_rank, self.last_rank >= self.first_rank, f">= {self.first_rank}"),
            ("margin", self.margin, self.margin is None or 0 <= self.margin < math.inf, "a number >= 0"),
            ("relative-margin", share, share is None or 0 <= share < 1, "[0, 1)"),
            ("seed", self.seed, self.seed >= 0, ">= 0"),
            ("max-score", most, most is None or math.isfinite(most), "a number"),
            ("teacher-margin", self.teacher_margin, 0 <= self.teacher_margin < math.inf, "a number >= 0"),
        ]
        wrong = [
            f"--{rule} is {value!r}; allowed: {allowed}" for rule, value, good, allowed in checks if not good
        ]
        if wrong:
            raise UserError("; ".join(wrong))
        return self


@dataclass(frozen=True)
class Mined:
    """One query: its positives, best grade first, and its negatives, hardest first, each with its score."""

    query: str
    positives: dict[str, float]  # passage id -> score
    negatives: dict[str, float]
    grades: dict[str, int]  # of the positives


def mine(
    data: RankingData,
    qrels: Qrels,
    candidates: Run,
    positives: Run,
    rules: MiningRules,
    teacher: Run | None = None,
) -> tuple[list[Mined], dict[str, int]]:
    """Negatives of each query of `qrels`; how many passages each rule left out, and queries without any.

    `candidates` scores a query's passages, `positives` its relevant ones by the same scorer; `teacher`, where
    given, scores both. Left out are relevant passages, also of a query of the same words, copies of them or
    of a negative (the same words), and what the rules exclude.
    """
    lost: Counter[str] = Counter()
    found: list[Mined] = []
    shown: dict[str, set[str]] = defaultdict(set)  # words of a query -> words of its relevant passages
    for query, grades in qrels.items():
        texts = (data.corpus[passage] for passage in relevant_passages(grades))
        shown[same_words(data.queries[query])].update(map(same_words, texts))
    rng = np.random.default_rng(rules.seed)
    for query, grades in sorted(qrels.items()):
        relevant = relevant_passages(grades)
        if not relevant:
            lost["queries without a relevant passage"] += 1
            continue
        scores = candidates.get(query, {})
        known = set(shown[same_words(data.queries[query])])
        own = positives[query]
        fitting = list(_fitting(data, query, relevant, known, scores, own, rules, teacher, lost))
        if rules.choose == "random":
            fitting = [fitting[i] for i in sorted(rng.permutation(len(fitting))[: rules.count])]
        kept = fitting[: rules.count]
        if not kept:
            lost["queries without a fitting negative"] += 1
            continue
        values = teacher[query] if teacher is not None else {**scores, **own}
        positive, negative = ({p: values[p] for p in passages} for passages in (relevant, kept))
        found.append(Mined(query, positive, negative, {p: grades[p] for p in relevant}))
    return found, dict(lost)


def _fitting(
    data: RankingData,
    query: str,
    relevant: list[str],
    shown: set[str],
    scores: Mapping[str, float],
    own: Mapping[str, float],
    rules: MiningRules,
    teacher: Run | None,
    lost: Counter[str],
) -> Iterator[str]:
    """Passages that the rules let through, best score first; counts the others in `lost`.

    `shown` holds the words of the relevant passages; those of the negatives are added.
    """
    best = _best(own, relevant)
    others = [passage for passage in ranked(scores) if passage not in set(relevant)]
    for passage in others[rules.first_rank - 1 : rules.last_rank]:
        score, words = scores[passage], same_words(data.corpus[passage])
        if words in shown:
            lost["copies"] += 1
        elif rules.max_score is not None and score > rules.max_score:
            lost["above the maximum score"] += 1
        elif rules.margin is not None and score > best - rules.margin:
            lost["within the margin"] += 1
        elif rules.relative_margin is not None and score > best - abs(best) * rules.relative_margin:
            lost["within the relative margin"] += 1
        elif (
            teacher is not None
            and teacher[query][passage] > _best(teacher[query], relevant) - rules.teacher_margin
        ):
            lost["relevant by the teacher"] += 1
        else:
            shown.add(words)
            yield passage


def _best(scores: Mapping[str, float], relevant: list[str]) -> float:
    return max(scores[passage] for passage in relevant)


def rows(
    data: RankingData, mined: Mined, form: Literal["tuple", "list", "triplet"]
) -> Iterator[dict[str, object]]:
    """JSON rows of one query, with scores: `tuple` and `triplet` are training data for `--data.name`.

    `tuple`: all positives and negatives in a row; `triplet`: a row for each positive with each negative;
    both with the positives' grades as `scores`. `list`: passages with a label each, their grade or 0.
    """
    query, grades = data.queries[mined.query], list(mined.grades.values())
    positives = [(data.corpus[p], score) for p, score in mined.positives.items()]
    negatives = [(data.corpus[p], score) for p, score in mined.negatives.items()]
    if form == "list":
        both = positives + negatives
        yield {
            "query": query,
            "passages": [text for text, _ in both],
            "labels": grades + [0] * len(negatives),
            "scores": [score for _, score in both],
        }
    elif form == "tuple":
        yield {
            "query": query,
            "positive": [text for text, _ in positives],
            "negative": [text for text, _ in negatives],
            "scores": grades,
            "positive_scores": [score for _, score in positives],
            "negative_scores": [score for _, score in negatives],
        }
    else:
        for (positive, own), grade in zip(positives, grades, strict=True):
            for negative, score in negatives:
                yield {
                    "query": query,
                    "positive": positive,
                    "negative": negative,
                    "scores": grade,
                    "positive_scores": own,
                    "negative_scores": score,
                }


def joined(data: RankingData, triples: Sequence[Triple], where: object) -> RankingData:
    """The data with the negatives, and a teacher's scores, of rows that were mined from it: found by their
    texts, in place of other negatives of these queries. UserError for a text that the data lacks."""
    asked: dict[str, list[str]] = defaultdict(list)
    for query, text in data.queries.items():
        asked[same_words(text)].append(query)
    passages = {text.strip(): passage for passage, text in data.corpus.items()}
    negatives: dict[str, dict[str, None]] = defaultdict(dict)
    teacher: Run = {query: dict(scores) for query, scores in data.teacher.items()}
    for triple in triples:
        lost = [text for text in (*triple.positives, *triple.negatives) if text not in passages]
        if same_words(triple.query) not in asked or lost:
            what = f"passage {lost[0][:80]!r}" if lost else f"query {triple.query[:80]!r}"
            raise UserError(f"{where}: was mined from other data: its {what} is not in {data.name}.")
        scored = (
            *zip(triple.positives, triple.positive_scores, strict=False),
            *zip(triple.negatives, triple.negative_scores, strict=False),
        )
        for query in asked[same_words(triple.query)]:
            negatives[query].update(dict.fromkeys(passages[text] for text in triple.negatives))
            if scored:
                teacher.setdefault(query, {}).update({passages[text]: score for text, score in scored})
    given = {query: tuple(found) for query, found in negatives.items() if found}
    return replace(data, negatives={**data.negatives, **given}, teacher=teacher)
