"""Retrieval for a language model: index documents, retrieve, rerank, and hand over a context with its
sources.

pipeline = RAGPipeline("default", "runs/quantum_resonance/best")
pipeline.index_documents(["..."])
print(pipeline.get_context_for_llm("how do I sort a list?"))
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from common.backends import Encoder, Scorer, load_encoder, load_scorer
from common.data.records import is_unicode
from common.errors import UserError
from common.hub import resolve_model
from common.metrics.calibration import Confidence
from common.metrics.ranking import ranked
from common.reranker.reranking import fitted_over, load_confidence
from common.retrieval.documents import Chunking, as_documents, count_tokens, sentences
from common.retrieval.fusion import fuse_scores, rrf
from common.retrieval.index import Changes, Passage, PassageIndex

Retrieval = Literal["hybrid", "dense", "bm25"]
Expand = Callable[[str], Mapping[str, str | Sequence[str]]]  # a query -> texts under lex, vec and hyde
_EXPANSIONS = {"lex": "bm25", "vec": "dense", "hyde": "dense"}
_log = logging.getLogger("resonance.rag")


@dataclass(frozen=True)
class Hit:
    """A passage in its place. `score` orders the list: fused where it was reranked, else the first stage's.

    `reranker` is the model's own score, and resonance [-1, 1], overlap and coherence [0, 1] its readable
    parts; None where it was not reranked.
    """

    rank: int  # from 1
    first_rank: int  # from 1, in the first stage
    passage: Passage
    score: float
    first_score: float
    reranker: float | None = None
    resonance: float | None = None
    overlap: float | None = None
    coherence: float | None = None

    @property
    def id(self) -> str:
        return self.passage.id

    @property
    def text(self) -> str:
        return self.passage.text

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.passage.metadata


@dataclass(frozen=True)
class Results:
    """What was found for a query. `fallback` says why the order is the first stage's although a reranker was
    asked for, None where it is not; `confidence` is the calibrated probability that the first hit is
    relevant, None when the model is not calibrated. `cached`: passages whose score was in the cache.
    `seconds`: time by stage (expand, retrieve, rerank, total)."""

    query: str
    hits: list[Hit]
    first_stage: str  # bm25, dense or rrf
    reranked: bool = False
    fallback: str | None = None
    confidence: float | None = None
    cached: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """The text for a language model, the hits in it by their numbers from 1, and its size by the counter
    that was used."""

    text: str
    sources: list[Hit]
    tokens: int
    results: Results


@dataclass(frozen=True)
class Statistics:
    """What a pipeline has done so far; `fallbacks` by reason, `cache_hits` and `cache_misses` in pairs."""

    queries: int
    reranked: int
    fallbacks: dict[str, int]
    cache_hits: int
    cache_misses: int

    @property
    def cache_hit_rate(self) -> float:
        """In [0, 1]; 0 before the first look-up."""
        return self.cache_hits / max(1, self.cache_hits + self.cache_misses)


class ScoreCache:
    """The scores of the last `size` pairs, by the model's identity, the query and the passage's text."""

    def __init__(self, size: int) -> None:
        self.size, self.hits, self.misses = size, 0, 0
        self._values: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, keys: Sequence[bytes]) -> list[NDArray[np.float32] | None]:
        with self._lock:
            found = [self._values.get(key) for key in keys]
            for key, value in zip(keys, found, strict=True):
                if value is not None:
                    self._values.move_to_end(key)
            missing = sum(value is None for value in found)
            self.hits, self.misses = self.hits + len(keys) - missing, self.misses + missing
        return found

    def put(self, keys: Sequence[bytes], values: NDArray[np.float32]) -> None:
        with self._lock:
            for key, value in zip(keys, values, strict=True):
                self._values[key] = value
            while len(self._values) > self.size:
                self._values.popitem(last=False)


class RAGPipeline:
    """Index, retrieve, rerank, context.

    Args:
      retriever_model: a bi-encoder: directory, name or Encoder; "bm25" for BM25 alone.
      reranker_model: a cross-encoder: directory, name or Scorer; None: the first stage's order.
      top_k_retrieval: passages that the first stage finds, and that are reranked.
      top_k_rerank: hits that come back.
      retrieval: hybrid fuses BM25 and dense retrieval by reciprocal rank; or one of them alone. When absent
        what the reranker was trained over, else hybrid.
      expand: any function from a query to texts under `lex` (searched by BM25), `vec` and `hyde` (by dense
        retrieval); their rankings are fused with the query's own. The reranker reads the query itself.
      index_dir: where the index lies; a temporary folder, gone with the pipeline, when absent.
      deadline: seconds that the reranker may take, before the first stage's order is given; None: any.
      cache_size: pairs whose scores are kept.
      token_counter: of the language model's tokens, for the context's budget; an estimate when absent.
    The fused score z(reranker) + omega z(first stage) orders the hits, with the model's own omega.
    Raises UserError for models that cannot be loaded, an index of another model, and numbers out of range.
    """

    def __init__(
        self,
        retriever_model: str | Path | Encoder,
        reranker_model: str | Path | Scorer | None = None,
        top_k_retrieval: int = 50,
        top_k_rerank: int = 5,
        *,
        retrieval: Retrieval | None = None,
        expand: Expand | None = None,
        index_dir: str | Path | None = None,
        chunking: Chunking | None = None,
        deadline: float | None = None,
        cache_size: int = 100_000,
        token_counter: Callable[[str], int] = count_tokens,
        backend: str = "auto",
        say: Callable[[str], None] = print,
    ) -> None:
        _check_numbers(top_k_retrieval, top_k_rerank, deadline, cache_size)
        self.top_k_retrieval, self.top_k_rerank, self.deadline = top_k_retrieval, top_k_rerank, deadline
        encoder = _encoder(retriever_model, backend, say)
        own = _own_retrieval(reranker_model)
        self.retrieval: Retrieval = retrieval or ("bm25" if encoder is None else own or "hybrid")
        if own not in (None, self.retrieval):
            say(f"note: the reranker's fusion weight was chosen over {own} retrieval, not {self.retrieval}")
        if self.retrieval not in ("hybrid", "dense", "bm25"):
            raise UserError(f"retrieval is {self.retrieval!r}; allowed: hybrid, dense, bm25")
        if encoder is None and self.retrieval != "bm25":
            raise UserError(
                f"retrieval {self.retrieval} needs a retriever model that is an encoder, not bm25"
            )
        self.expand, self.count_tokens = expand, token_counter
        self.scorer: Scorer | None = None
        self.confidence: Confidence | None = None
        self.set_reranker(reranker_model, backend, say=say)
        self._temporary = None if index_dir else tempfile.TemporaryDirectory(prefix="resonance-index-")
        self.index = PassageIndex(
            index_dir or self._temporary.name,  # type: ignore[union-attr]
            encoder,
            chunking=chunking,
            say=say,
        )
        self.cache = ScoreCache(cache_size)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._fallbacks: Counter[str] = Counter()
        self._late: list[threading.Thread] = []

    def set_reranker(
        self,
        model: str | Path | Scorer | None,
        backend: str = "auto",
        *,
        confidence: Confidence | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        """Another reranker from the next query on; queries that are under way end with the one they began
        with. A directory brings its own confidence, a Scorer has the one given here."""
        if isinstance(model, str | Path):
            directory = resolve_model(model, say=say)
            confidence = load_confidence(directory)
            scorer: Scorer | None = load_scorer(directory, backend, say=lambda _: None)
        else:
            scorer = model
        self.scorer, self.confidence = scorer, confidence

    @property
    def statistics(self) -> Statistics:
        with self._lock:
            counts, fallbacks = dict(self._counts), dict(self._fallbacks)
        return Statistics(
            counts.get("queries", 0), counts.get("reranked", 0), fallbacks, self.cache.hits, self.cache.misses
        )

    def index_documents(self, documents: Iterable[object]) -> Changes:
        """Add texts, or records {"id"?, "text", "title"?, "metadata"?}; a known id with other content is
        replaced.

        Raises UserError that lists what is no document; then nothing is indexed.
        """
        return self.index.add(as_documents(documents))

    def delete_documents(self, ids: Iterable[str]) -> int:
        """Delete documents by id; returns how many there were. UserError for what is no list of texts."""
        given = None if isinstance(ids, str) or not isinstance(ids, Iterable) else list(ids)
        if given is None or not all(isinstance(each, str) for each in given):
            raise UserError(f"ids come in a list of texts, not {ids!r:.60}: [id], where there is one")
        return self.index.delete(given)

    def retrieve(self, query: str, top_k: int | None = None) -> Results:
        """The first stage's `top_k` (top_k_retrieval) best passages. UserError for an empty query."""
        began = time.perf_counter()
        found = self._retrieve(query, self.top_k_retrieval if top_k is None else top_k)
        with self._lock:
            self._counts["queries"] += 1
        return replace(found, seconds=found.seconds | {"total": time.perf_counter() - began})

    def retrieve_and_rerank(self, query: str, top_k: int | None = None) -> Results:
        """The `top_k` (top_k_rerank) best of the first stage's passages by the fused score of the reranker.

        Where that fails or runs past the deadline, the first stage's order is given and `fallback` says so.
        """
        began = time.perf_counter()
        top_k = self.top_k_rerank if top_k is None else top_k
        found = self._retrieve(query, max(top_k, self.top_k_retrieval))
        scorer, confidence = self.scorer, self.confidence
        with self._lock:
            self._counts["queries"] += 1
        if scorer is not None and found.hits:
            start = time.perf_counter()
            found = self._reranked(found, scorer, confidence)
            found.seconds["rerank"] = time.perf_counter() - start
        found.seconds["total"] = time.perf_counter() - began
        return replace(found, hits=found.hits[:top_k])

    def get_context_for_llm(self, query: str, top_k: int = 3, max_tokens: int = 1000) -> str:
        """The text of `context`: the best passages, numbered, each under its source."""
        return self.context(query, top_k, max_tokens).text

    def context(self, query: str, top_k: int = 3, max_tokens: int = 1000) -> Context:
        """The `top_k` best passages within `max_tokens`, numbered, with their sources.

        A passage that does not fit ends behind its last whole sentence that does; one whose first sentence
        does not fit is left out, and so is all behind it. UserError for numbers below 1.
        """
        if top_k < 1 or max_tokens < 1:
            raise UserError(f"top_k is {top_k} and max_tokens {max_tokens}; allowed: >= 1")
        results = self.retrieve_and_rerank(query, top_k)
        text, sources = "", list[Hit]()
        for hit in results.hits:
            heading = f"[{len(sources) + 1}] {_source(hit.passage)}\n"
            before = f"{text}\n\n{heading}" if text else heading
            fitting = self._fitting(before, hit.text.strip(), max_tokens)
            if fitting is None:
                break
            text, sources = fitting, [*sources, hit]
            if not fitting.endswith(hit.text.strip()):
                break
        return Context(text, sources, self.count_tokens(text) if text else 0, results)

    def _fitting(self, before: str, text: str, max_tokens: int) -> str | None:
        """`before` and as many whole sentences of the text as fit; None when not even the first does."""
        if self.count_tokens(before + text) <= max_tokens:
            return before + text
        taken: str | None = None
        end = 0
        for sentence in sentences(text):
            end = text.index(sentence, end) + len(sentence)
            if self.count_tokens(before + text[:end]) > max_tokens:
                break
            taken = before + text[:end]
        return taken

    # the first stage

    def _retrieve(self, query: str, depth: int) -> Results:
        if not isinstance(query, str):
            raise UserError(f"the query is a {type(query).__name__}; give a text")
        if not query.strip():
            raise UserError("the query is empty: give some words to search for")
        if not is_unicode(query):
            raise UserError(
                f"the query holds bytes that are not UTF-8: {query[:40]!a}; give it as UTF-8 text"
            )
        _check_depth("top_k", depth)
        start = time.perf_counter()
        texts = {"bm25": [(query, "query")], "dense": [(query, "query")]}
        for kind, text in self._expansions(query):
            texts[_EXPANSIONS[kind]].append((text, "passage" if kind == "hyde" else "query"))
        expanded = time.perf_counter()
        used = ("bm25", "dense") if self.retrieval == "hybrid" else (self.retrieval,)
        runs = []
        for stage in used:
            for text, kind in texts[stage]:
                found = (
                    self.index.lexical(text, depth)
                    if stage == "bm25"
                    else self.index.dense(text, depth, kind)
                )
                runs.append({"": {f"{number:015d}": score for number, score in found.items()}})
        scores = runs[0][""] if len(runs) == 1 else rrf(runs, depth=depth).get("", {})
        passages = self.index.passages([int(number) for number in ranked(scores, depth)])
        hits = [
            Hit(rank, rank, passage, scores[f"{number:015d}"], scores[f"{number:015d}"])
            for rank, (number, passage) in enumerate(passages.items(), 1)
        ]
        seconds = {"expand": expanded - start} if self.expand is not None else {}
        seconds["retrieve"] = time.perf_counter() - expanded
        return Results(query, hits, used[0] if len(runs) == 1 else "rrf", seconds=seconds)

    def _expansions(self, query: str) -> list[tuple[str, str]]:
        """(kind, text) of an expander; none, counted and logged, when it fails."""
        if self.expand is None:
            return []
        try:
            given = self.expand(query)
            unknown = [kind for kind in given if kind not in _EXPANSIONS]
            if unknown:
                raise ValueError(f"unknown kind {unknown[0]!r}; allowed: {', '.join(_EXPANSIONS)}")
            texts = [(k, [v] if isinstance(v, str) else list(v)) for k, v in given.items()]
            return [(kind, text) for kind, several in texts for text in several if text.strip()]
        except Exception as error:
            self._count_fallback("expansion failed", error)
            return []

    # the reranker

    def _reranked(self, found: Results, scorer: Scorer, confidence: Confidence | None) -> Results:
        passages = [hit.passage.read for hit in found.hits]
        known: list[int] = []
        try:
            values = self._in_time(lambda stop: self._scores(scorer, found.query, passages, stop, known))
        except _TooLateError as late:
            return replace(found, fallback=self._count_fallback(str(late)))
        except Exception as error:
            return replace(found, fallback=self._count_fallback("reranker failed", error))
        score, resonance, overlap, coherence = values.astype(np.float64).T
        fused = fuse_scores([hit.first_score for hit in found.hits], score, scorer.fusion_weight)
        order = np.argsort(-fused, kind="stable").tolist()
        hits = [
            replace(
                found.hits[place],
                rank=rank,
                score=float(fused[place]),
                reranker=float(score[place]),
                resonance=float(resonance[place]),
                overlap=float(overlap[place]),
                coherence=float(coherence[place]),
            )
            for rank, place in enumerate(order, 1)
        ]
        with self._lock:
            self._counts["reranked"] += 1
        sure = None if confidence is None else confidence.of(score, resonance)
        return replace(found, hits=hits, reranked=True, confidence=sure, cached=len(known))

    def _scores(
        self,
        scorer: Scorer,
        query: str,
        passages: Sequence[str],
        stop: Callable[[int], None],
        cached: list[int],
    ) -> NDArray[np.float32]:
        """score, resonance, overlap and coherence of each passage [N, 4], known pairs from the cache; their
        places are put into `cached`."""
        begun = hashlib.sha256(f"{scorer.identity}\0{query}\0".encode())
        keys = []
        for passage in passages:
            whole = begun.copy()
            whole.update(passage.encode())
            keys.append(whole.digest())
        known = self.cache.get(keys) if scorer.identity else [None] * len(keys)
        missing = [place for place, value in enumerate(known) if value is None]
        values = np.zeros((len(passages), 4), np.float32)
        for place, value in enumerate(known):
            if value is not None:
                values[place] = value
                cached.append(place)
        if missing:
            got = scorer.score([query] * len(missing), [passages[place] for place in missing], stop)
            values[missing] = np.stack([got.score, got.resonance, got.overlap, got.coherence], axis=1)
            if not np.isfinite(values).all():
                raise UserError(f"{scorer.name}: a score is not finite; the checkpoint is damaged")
            if scorer.identity:
                self.cache.put([keys[place] for place in missing], values[missing].copy())
        return values

    def _in_time(self, work: Callable[[Callable[[int], None]], NDArray[np.float32]]) -> NDArray[np.float32]:
        """The result of `work`, which is told to stop after each batch once the deadline is over.

        Work that hangs is left behind; while it does, nothing new is begun. Raises what the work raises.
        """
        if self.deadline is None:
            return work(lambda _: None)
        with self._lock:
            self._late = [thread for thread in self._late if thread.is_alive()]
            if self._late:
                raise _TooLateError("reranker still busy")
        late = threading.Event()
        outcome: list[NDArray[np.float32] | BaseException] = []

        def stop(_: int) -> None:
            if late.is_set():
                raise _TooLateError("reranker past its deadline")

        def run() -> None:
            try:
                outcome.append(work(stop))
            except Exception as error:
                outcome.append(error)

        thread = threading.Thread(target=run, daemon=True, name="resonance-rerank")
        thread.start()
        thread.join(self.deadline)
        if not outcome:
            late.set()
            with self._lock:
                self._late.append(thread)
            raise _TooLateError("reranker past its deadline")
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    def _count_fallback(self, reason: str, error: Exception | None = None) -> str:
        """Count it, log the first of its kind, and return what the results say."""
        what = reason if error is None else f"{reason}: {type(error).__name__}: {str(error)[:200]}"
        with self._lock:
            self._fallbacks[reason] += 1
            first = self._fallbacks[reason] == 1
        if first:
            _log.warning("%s; the first stage goes on without it (said once, counted in statistics)", what)
        return what


class _TooLateError(Exception):
    """The reranker ran past its deadline."""


def _check_numbers(top_k_retrieval: int, top_k_rerank: int, deadline: float | None, cache_size: int) -> None:
    for name, value in (("top_k_retrieval", top_k_retrieval), ("top_k_rerank", top_k_rerank)):
        _check_depth(name, value)
    if deadline is not None and not deadline > 0:
        raise UserError(f"deadline is {deadline}; allowed: seconds > 0, or None")
    if cache_size < 0:
        raise UserError(f"cache_size is {cache_size}; allowed: >= 0 pairs")


def _check_depth(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise UserError(f"{name} is {value!r}; allowed: a whole number >= 1")


def _own_retrieval(reranker: str | Path | Scorer | None) -> Retrieval | None:
    """The retrieval that a checkpoint's fusion weight belongs to, where it is known."""
    if not isinstance(reranker, str | Path):
        return None
    fitted = fitted_over(resolve_model(reranker, say=lambda _: None))
    return None if fitted is None else "hybrid" if fitted[0] == "rrf" else fitted[0]


def _encoder(model: str | Path | Encoder, backend: str, say: Callable[[str], None]) -> Encoder | None:
    if isinstance(model, str | Path):
        return None if model == "bm25" else load_encoder(model, backend, say=say)
    return model


def _source(passage: Passage) -> str:
    """What a context calls a passage: its title and id, and its `source` or `url` where the metadata name
    one."""
    named = passage.metadata.get("source") or passage.metadata.get("url")
    parts = [passage.title, f"({passage.id})" if passage.title else passage.id, str(named) if named else ""]
    return " ".join(" ".join(part.split()) for part in parts if part)
