"""Search with an expanded query as QMD does it, pseudo-relevance feedback (RM3), and the gain as a reward.

lex lines go to BM25, vec and hyde lines to dense retrieval, fused by reciprocal rank. RM3: Abdul-Jaleel et
al. 2004 (UMass at TREC), in Anserini's settings.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from common.backends import Encoder
from common.data.expansion import Line
from common.data.records import RankingData, Run, same_words
from common.errors import UserError
from common.metrics.expansion import clean, keeps_term, split_lines
from common.metrics.ranking import evaluate_run
from common.retrieval.dense import passage_vectors
from common.retrieval.lexical import BM25

# QMD's fusion: reciprocal ranks, the query's own lists count twice, a bonus for the best rank in any list
RRF_K, OWN_WEIGHT, FIRST_BONUS, NEXT_BONUS = 60.0, 2.0, 0.05, 0.02
FEEDBACK_PASSAGES, FEEDBACK_WORDS, ORIGINAL_SHARE = 10, 10, 0.5  # of RM3
METRIC, RECALL = "nDCG@10", "R@100"
NEAR = 10  # passages of the query's own search that a line must touch not to drift
_CACHED = 50_000  # lists of lines kept in memory
_NEGATED = re.compile(r'(?<!\S)-(?:"([^"]+)"|(\S+))')

Places = NDArray[np.int64]  # of passages in the order of their sorted ids, best first
Kind = Literal["lexical", "query", "passage"]


class ExpansionSearch:
    """BM25 and, with an encoder, dense retrieval over a corpus, for queries with expansion lines.

    `depth` passages of every list are fused and as many returned. Lists of lines are kept in memory, passage
    vectors in `cache_dir` (keyed by `fingerprint`, of the corpus).
    """

    def __init__(
        self,
        corpus: Mapping[str, str],
        encoder: Encoder | None = None,
        *,
        depth: int = 100,
        cache_dir: str | Path | None = None,
        fingerprint: str = "",
    ) -> None:
        if depth < 1:
            raise UserError(f"the depth of the search is {depth}; allowed: 1 or more.")
        self.ids, self.encoder, self.depth = sorted(corpus), encoder, depth
        self._texts = [corpus[passage] for passage in self.ids]
        self._bm25 = BM25(self._texts)
        self._vectors = None if encoder is None else passage_vectors(corpus, encoder, cache_dir, fingerprint)
        self._lists: dict[tuple[Kind, str], Places] = {}

    def search(self, query: str, lines: Iterable[Line] = ()) -> dict[str, float]:
        """Passage id -> fused score of the `depth` best for a query and its expansion."""
        return self.run({"": query}, {"": tuple(lines)})[""]

    def run(self, queries: Mapping[str, str], lines: Mapping[str, Sequence[Line]] | None = None) -> Run:
        """Query id -> passage id -> fused score, for queries with the lines of their expansions."""
        lines = lines or {}
        self.prepare(queries.values(), (line for part in lines.values() for line in part))
        return {query: self._fused(text, lines.get(query, ())) for query, text in queries.items()}

    def rm3(self, queries: Mapping[str, str]) -> Run:
        """The same search with RM3's list in the place of BM25's: it adds words of BM25's best passages."""
        self.prepare(queries.values(), ())
        run: Run = {}
        for query, text in queries.items():
            own = [(OWN_WEIGHT, places) for places in self._own(text)[1:]]
            feedback = self._top(self._bm25.weighted(self._feedback(text)))
            run[query] = self._merge([(OWN_WEIGHT, feedback), *own])
        return run

    def prepare(self, queries: Iterable[str], lines: Iterable[Line]) -> None:
        """Compute what is not known yet, all texts in one batch of the encoder."""
        wanted: dict[tuple[Kind, str], None] = {}
        for query in queries:
            wanted |= dict.fromkeys((("lexical", query), ("query", query)))
        wanted |= dict.fromkeys(_key(line) for line in lines)
        missing = [key for key in wanted if key not in self._lists]
        if len(self._lists) + len(missing) > _CACHED:
            self._lists.clear()
            missing = list(wanted)
        for kind, text in missing:
            if kind == "lexical":
                self._lists[kind, text] = self._top(self._lexical(text))
        self._dense("query", [text for kind, text in missing if kind == "query"])
        self._dense("passage", [text for kind, text in missing if kind == "passage"])

    def line_list(self, line: Line) -> Places:
        """The places that a line finds by itself; none for a vec or hyde without an encoder."""
        return self._lists[_key(line)]

    def _dense(self, kind: Literal["query", "passage"], texts: Sequence[str]) -> None:
        if self._vectors is None or self.encoder is None or not texts:
            self._lists |= {(kind, text): np.zeros(0, np.int64) for text in texts}
            return
        scores = self.encoder.encode(texts, kind=kind) @ self._vectors.T  # [texts, N]
        for text, row in zip(texts, scores, strict=True):
            self._lists[kind, text] = _best(row, self.depth)

    def _lexical(self, text: str) -> NDArray[np.float32]:
        """BM25 of a query or lex line; passages with a `-word` or `-"some words"` of it are out."""
        excluded = [" ".join(filter(None, found)) for found in _NEGATED.findall(text)]
        scores = self._bm25.scores(_NEGATED.sub(" ", text))
        for words in excluded:
            marks = [self._bm25.weighted({word: 1.0}) > 0 for word in self._bm25.words(words)]
            if marks:
                scores = np.where(np.logical_and.reduce(marks), np.float32(0), scores)
        return scores

    def _top(self, scores: NDArray[np.float32]) -> Places:
        places = _best(scores, self.depth)
        return places[scores[places] > 0]

    def own_lists(self, query: str) -> list[Places]:
        """What the query finds without an expansion: by BM25 and, with an encoder, by its vector."""
        self.prepare([query], ())
        return self._own(query)

    def _own(self, query: str) -> list[Places]:
        lists = [self._lists["lexical", query]]
        return lists if self._vectors is None else [*lists, self._lists["query", query]]

    def _fused(self, query: str, lines: Sequence[Line]) -> dict[str, float]:
        own = [(OWN_WEIGHT, places) for places in self._own(query)]
        return self._merge([*own, *((1.0, self.line_list(line)) for line in lines)])

    def _merge(self, lists: Sequence[tuple[float, Places]]) -> dict[str, float]:
        """QMD's reciprocal rank fusion of weighted lists."""
        scores: dict[int, float] = {}
        best: dict[int, int] = {}
        for weight, places in lists:
            for rank, place in enumerate(places.tolist()):
                scores[place] = scores.get(place, 0.0) + weight / (RRF_K + rank + 1)
                best[place] = min(rank, best.get(place, rank))
        for place, rank in best.items():
            scores[place] += FIRST_BONUS if rank == 0 else NEXT_BONUS if rank <= 2 else 0.0
        order = sorted(scores, key=lambda place: (-scores[place], place))[: self.depth]
        return {self.ids[place]: scores[place] for place in order}

    def _feedback(self, query: str) -> dict[str, float]:
        """RM3's weighted words: the query's own, and the most likely ones of its best passages."""
        words = self._bm25.words(query)
        own = {word: count / len(words) for word, count in Counter(words).items()}
        scores = self._bm25.scores(query)
        best = self._top(scores)[:FEEDBACK_PASSAGES]
        found: dict[str, float] = {}
        for place, weight in zip(best, scores[best] / max(float(scores[best].sum()), 1e-9), strict=True):
            counts = Counter(self._bm25.words(self._texts[place]))
            total = sum(counts.values())
            for word, count in counts.items():
                found[word] = found.get(word, 0.0) + float(weight) * count / total
        likely = sorted(found, key=lambda word: (-found[word], word))[:FEEDBACK_WORDS]
        kept = {word: found[word] for word in likely}
        mass = sum(kept.values()) or 1.0
        shares = {word: (1 - ORIGINAL_SHARE) * value / mass for word, value in kept.items()}
        return {
            word: ORIGINAL_SHARE * own.get(word, 0.0) + shares.get(word, 0.0) for word in {**own, **shares}
        }


@dataclass(frozen=True)
class Gain:
    """What an expansion does for a query: changes of NDCG@10 and recall in [-1, 1], share that drifts."""

    ndcg: float
    recall: float
    drift: float
    reward: float


class RetrievalGain:
    """Reward of a completion: how much better a search becomes by it, on judged queries.

    reward = `ndcg_weight` * change of NDCG@10 + `recall_weight` * change of recall@100 - `drift_weight` *
    share of drifting lines. A line drifts when QMD would drop it (no word of the query) or when it finds
    neither a relevant passage nor one of the query's own first ten. A completion without a line, or with one
    of no type, gets `invalid`, the lowest reward. The same query and completion always have the same reward.
    """

    def __init__(
        self,
        data: RankingData,
        split: str,
        encoder: Encoder | None = None,
        *,
        depth: int = 100,
        ndcg_weight: float = 1.0,
        recall_weight: float = 0.5,
        drift_weight: float = 0.2,
        invalid: float = -1.0,
        cache_dir: str | Path | None = None,
    ) -> None:
        self.search = ExpansionSearch(
            data.corpus, encoder, depth=depth, cache_dir=cache_dir, fingerprint=data.fingerprint
        )
        self.ndcg_weight, self.recall_weight = ndcg_weight, recall_weight
        self.drift_weight, self.invalid = drift_weight, invalid
        self._name = f"{data.name} {split}"
        self.fingerprint = data.fingerprint
        self._grades = {data.queries[query]: grades for query, grades in data.split(split).items()}
        self._place = {passage: place for place, passage in enumerate(self.search.ids)}
        self._known = {same_words(text): text for text in self._grades}
        self._before: dict[str, tuple[float, float]] = {}
        self._gains: dict[tuple[str, str], Gain] = {}

    @cached_property
    def queries(self) -> tuple[str, ...]:
        """The queries that have a reward, in the order of the data: what a GRPO run may ask."""
        return tuple(self._grades)

    def __call__(self, query: str, completion: str) -> float:
        """The reward of one completion. Raises UserError for a query without judgements."""
        return self.gains([(query, completion)])[0].reward

    def gains(self, pairs: Sequence[tuple[str, str]]) -> list[Gain]:
        """The gains of (query, completion) pairs, computed together: one batch of the encoder for all."""
        asked = [(self._asked(query), completion) for query, completion in pairs]
        fresh = [pair for pair in dict.fromkeys(asked) if pair not in self._gains]
        if len(self._gains) + len(fresh) > _CACHED:
            self._gains.clear()
            fresh = list(dict.fromkeys(asked))
        self._compute(fresh)
        return [self._gains[pair] for pair in asked]

    def _asked(self, query: str) -> str:
        known = self._known.get(same_words(query))
        if known is None:
            raise UserError(
                f"the query {query!r} has no judgements in {self._name}: a retrieval reward needs queries "
                "of that collection (RetrievalGain.queries). Train on these, or take another reward."
            )
        return known

    def _compute(self, pairs: Sequence[tuple[str, str]]) -> None:
        lines = {pair: _lines(pair[1]) for pair in pairs}
        valid = [pair for pair in pairs if lines[pair]]
        self._gains |= {pair: Gain(0.0, 0.0, 1.0, self.invalid) for pair in pairs if not lines[pair]}
        if not valid:
            return
        kept = {pair: [line for line in lines[pair] if keeps_term(line[1], pair[0])] for pair in valid}
        new = [query for query in dict.fromkeys(query for query, _ in valid) if query not in self._before]
        names = {str(number): pair for number, pair in enumerate(valid)}
        own = {f"own {number}": query for number, query in enumerate(new)}
        queries = {**{name: pair[0] for name, pair in names.items()}, **own}
        run = self.search.run(queries, {name: kept[pair] for name, pair in names.items()})
        qrels = {name: self._grades[query] for name, query in queries.items()}
        values = evaluate_run(run, qrels, (METRIC, RECALL))
        for name, query in own.items():
            self._before[query] = values[METRIC][name], values[RECALL][name]
        for name, pair in names.items():
            ndcg, recall = self._before[pair[0]]
            self._gains[pair] = self._gain(
                values[METRIC][name] - ndcg,
                values[RECALL][name] - recall,
                self._drift(pair[0], lines[pair], kept[pair]),
            )

    def _gain(self, ndcg: float, recall: float, drift: float) -> Gain:
        reward = self.ndcg_weight * ndcg + self.recall_weight * recall - self.drift_weight * drift
        return Gain(ndcg, recall, drift, max(self.invalid, reward))

    def _drift(self, query: str, lines: Sequence[Line], kept: Sequence[Line]) -> float:
        near = {place for places in self.search.own_lists(query) for place in places[:NEAR].tolist()}
        near |= {self._place[p] for p, grade in self._grades[query].items() if grade > 0 and p in self._place}
        found = [self.search.line_list(line) for line in kept if self._searches(line)]
        away = sum(near.isdisjoint(places.tolist()) for places in found)
        return (away + len(lines) - len(kept)) / len(lines)

    def _searches(self, line: Line) -> bool:
        return line[0] == "lex" or self.search.encoder is not None


def _lines(completion: str) -> list[Line]:
    """A completion's lines; none when a line has no type or no text, as the score has it."""
    text, _ = clean(completion)
    typed = split_lines(text)
    lines = [(kind, content) for kind, contents in typed.items() for content in contents]
    written = [line for line in text.split("\n") if line.strip()]
    return lines if len(lines) == len(written) and all(content for _, content in lines) else []


def _key(line: Line) -> tuple[Kind, str]:
    kinds: dict[str, Kind] = {"lex": "lexical", "vec": "query", "hyde": "passage"}
    return kinds[line[0]], line[1]


def _best(scores: NDArray[np.float32], depth: int) -> Places:
    """The places of the `depth` highest scores [N], best first, ties by place."""
    if depth < scores.size:
        edge = np.partition(scores, scores.size - depth)[scores.size - depth]
        places = np.flatnonzero(scores >= edge)
    else:
        places = np.arange(scores.size)
    order = np.argsort(-scores[places], kind="stable")[:depth]
    return np.asarray(places[order], np.int64)
