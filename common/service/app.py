"""The routes: HTTP in, the service's answers out; everything wrong with a request is a 4xx that says what.

The OpenAPI description is at /openapi.json, the page at /.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import math
import mimetypes
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from common.errors import UserError
from common.language.generation import Generated, Piece, SamplingConfig
from common.rag import Hit
from common.service import schemas as s
from common.service.batching import UnavailableError
from common.service.core import Found, Reloader, Reranked, Service, cache_hit, new_id
from common.service.feedback import UnknownSearchError, UnwritableError
from common.service.gate import BusyError, Gate
from common.service.limits import Limits, refusal

T = TypeVar("T")
_log = logging.getLogger("resonance.service")
_STATIC = Path(__file__).parent / "static"
_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": s.Refused, "description": said}
    for status, said in (
        (400, "The body is no JSON."),
        (401, "The key is wrong or missing."),
        (408, "The body did not come in time."),
        (413, "The body is too large."),
        (422, "A field is wrong; `fields` names it."),
        (503, "Busy, or a part is down: come again after `Retry-After` seconds."),
    )
}
_NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": s.Refused, "description": "Not known."}}
_FULL: dict[int | str, dict[str, Any]] = {507: {"model": s.Refused, "description": "The disk is full."}}


@dataclass(frozen=True)
class ServiceConfig:
    """Limits of the service. `threads` requests are at work, `queue` wait for at most `wait` seconds;
    `text_queue` wait for the language model, which writes for one at a time."""

    threads: int = 16
    queue: int = 64
    wait: float = 10.0
    text_queue: int = 8
    max_body: int = 8 * 2**20  # bytes
    body_seconds: float = 30.0
    api_key: str | None = None
    hosts: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, least in (("threads", 1), ("queue", 0), ("text_queue", 0), ("max_body", 1024)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; allowed: >= {least}")
        for name in ("wait", "body_seconds"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}; allowed: seconds > 0")


class _RefusedError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, kind: str, fields: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.status, self.body = status, refusal(message, kind, fields)


class _Disconnected(Exception):
    """Nobody reads the text any more."""


def create_app(service: Service, config: ServiceConfig, reloader: Reloader | None = None) -> FastAPI:
    """The application. On shutdown it ends the service, after what was accepted is answered."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if reloader is not None:
            reloader.begin()
        yield
        if reloader is not None:
            reloader.close()
        service.close()

    app = FastAPI(
        title="Resonance",
        summary="Search, reranking, contexts for language models, and text.",
        version="0.1.0",
        docs_url=None,  # they load from other hosts
        redoc_url=None,
        lifespan=lifespan,
        responses=_REFUSALS,
    )
    seconds = functools.partial(service.metrics.stage, "queue")
    work = Gate(config.threads, config.queue, config.wait, seconds)
    text = Gate(1, config.text_queue, max(config.wait, service.deadline), seconds)
    app.state.work, app.state.text = work, text
    _add_ranking(app, service, work)
    _add_documents(app, service, work)
    _add_text(app, service, text)
    _add_watching(app, service, work)
    _add_page(app)
    _add_errors(app)

    @app.middleware("http")
    async def counted(request: Request, call_next: Callable[[Request], Any]) -> Any:
        response = await call_next(request)
        route = request.scope.get("route")
        name = getattr(route, "path", "unknown")
        service.metrics.requests.labels(name, str(response.status_code)).inc()
        return response

    app.add_middleware(
        Limits,
        max_body=config.max_body,
        body_seconds=config.body_seconds,
        api_key=config.api_key,
        hosts=config.hosts,
    )
    return app


async def _answered(gate: Gate, work: Callable[[], T]) -> T:
    """The work's result. What the index says after its input was checked is a fault of ours: 503."""
    try:
        return await gate.run(work)
    except UserError as error:
        _log.error("%s", error)
        raise _RefusedError(503, str(error), "unavailable") from error


# search and reranking


def _add_ranking(app: FastAPI, service: Service, gate: Gate) -> None:
    @app.post("/rerank", response_model=s.RerankResponse | list[s.TextScore], tags=["rank"])
    @app.post("/v1/rerank", response_model=s.RerankResponse | list[s.TextScore], include_in_schema=False)
    @app.post("/v2/rerank", response_model=s.RerankResponse | list[s.TextScore], include_in_schema=False)
    async def rerank(given: s.RerankRequest) -> Any:
        """Order passages for a query: `documents` as at Cohere and Jina, `texts` as at
        text-embeddings-inference."""
        began = time.perf_counter()
        passages = given.passages
        try:
            found = await gate.run(lambda: service.rerank(given.query, passages))
        except UserError as error:
            raise _RefusedError(422, str(error), "invalid_request") from error
        if given.texts is not None:
            return _text_scores(given, found)
        return _rerank_response(given, found, service, time.perf_counter() - began)

    @app.post("/search", tags=["rank"])
    async def search(given: s.SearchRequest) -> s.SearchResponse:
        """Search the indexed documents: the hits in their order, and the first stage's beside it."""
        found = await _answered(gate, lambda: service.search(given.query, given.rerank))
        return _search_response(found, service, given.top_k)

    @app.post("/context", tags=["rank"])
    async def context(given: s.ContextRequest) -> s.ContextResponse:
        """Passages for a language model, numbered, with their sources, within a budget of tokens."""
        identity, found = await _answered(
            gate, lambda: service.context(given.query, given.top_k, given.max_tokens)
        )
        sources = [
            s.Source(
                number=number,
                id=hit.id,
                title=hit.passage.title,
                metadata=dict(hit.metadata),
                score=hit.score,
            )
            for number, hit in enumerate(found.sources, 1)
        ]
        results = found.results
        return s.ContextResponse(
            id=identity,
            text=found.text,
            tokens=found.tokens,
            sources=sources,
            reranked=results.reranked,
            fallback=results.fallback,
            confidence=results.confidence,
        )

    @app.post("/feedback", tags=["rank"], responses=_NOT_FOUND | _FULL)
    async def feedback(given: s.FeedbackRequest) -> s.Stored:
        """Say +1 or -1 of a hit: `search` is the id that came with it."""

        def store() -> None:
            try:
                service.feedback.record_feedback(given.search, given.document, given.value)
            except UnknownSearchError as error:
                raise _RefusedError(404, str(error), "not_found") from error
            except UnwritableError as error:
                raise _RefusedError(507, str(error), "full") from error
            except UserError as error:
                raise _RefusedError(422, str(error), "invalid") from error

        await _answered(gate, store)
        return s.Stored(stored=True)


def _rerank_response(
    given: s.RerankRequest, found: Reranked, service: Service, seconds: float
) -> s.RerankResponse:
    results = [
        s.RerankResult(
            index=index,
            relevance_score=_logistic(found.score[place]),
            score=found.score[place],
            resonance=found.resonance[place],
            overlap=found.overlap[place],
            coherence=found.coherence[place],
            document=s.TextObject(text=given.passages[index]) if given.return_documents else None,
        )
        for place, index in enumerate(found.order[: given.top_n])
    ]
    name = service.scorer.name if service.scorer is not None else ""
    return s.RerankResponse(id=new_id("rerank"), model=name, results=results, seconds=seconds)


def _text_scores(given: s.RerankRequest, found: Reranked) -> list[s.TextScore]:
    return [
        s.TextScore(
            index=index,
            score=found.score[place] if given.raw_scores else _logistic(found.score[place]),
            text=given.passages[index] if given.return_text else None,
        )
        for place, index in enumerate(found.order[: given.top_n])
    ]


def _logistic(score: float) -> float:
    return 1.0 / (1.0 + math.exp(-score)) if score > -700 else 0.0


def _search_response(found: Found, service: Service, top_k: int) -> s.SearchResponse:
    results = found.results
    first = sorted(results.hits, key=lambda hit: hit.first_rank)
    return s.SearchResponse(
        id=found.id,
        query=results.query,
        hits=[_hit(hit) for hit in results.hits[:top_k]],
        first_stage=[
            s.FirstStageHit(rank=hit.first_rank, id=hit.id, title=hit.passage.title, score=hit.first_score)
            for hit in first[:top_k]
        ],
        first_stage_name=results.first_stage,
        reranked=results.reranked,
        fallback=results.fallback,
        confidence=results.confidence,
        cache_hit=cache_hit(results),
        seconds=results.seconds,
        model=service.scorer.name if service.scorer is not None else None,
        index_version=found.version,
    )


def _hit(hit: Hit) -> s.SearchHit:
    return s.SearchHit(
        rank=hit.rank,
        first_rank=hit.first_rank,
        id=hit.id,
        document=hit.passage.document,
        title=hit.passage.title,
        text=hit.text,
        metadata=dict(hit.metadata),
        score=hit.score,
        first_score=hit.first_score,
        reranker=hit.reranker,
        resonance=hit.resonance,
        overlap=hit.overlap,
        coherence=hit.coherence,
    )


# documents


def _add_documents(app: FastAPI, service: Service, gate: Gate) -> None:
    writing = threading.Lock()

    @app.post("/documents", tags=["documents"], responses=_FULL)
    async def add(given: s.DocumentsRequest) -> s.DocumentsResponse:
        """Add documents; one whose id is there with other content is replaced."""

        def work() -> s.DocumentsResponse:
            try:
                documents = given.checked()
            except (UserError, ValueError) as error:
                raise _RefusedError(422, str(error), "invalid_request", ["documents"]) from error
            with writing:
                try:
                    changes = service.rag.index.add(documents)
                except UserError as error:
                    raise _RefusedError(507, str(error), "not_stored") from error
            ids = [document.id for document in documents]
            return s.DocumentsResponse(
                added=changes.added,
                updated=changes.updated,
                unchanged=changes.unchanged,
                ids=ids,
                version=changes.version,
            )

        return await _answered(gate, work)

    @app.delete("/documents", tags=["documents"], responses=_FULL)
    async def delete(
        id: Annotated[list[s.Id], Query(min_length=1, max_length=s.MAX_PASSAGES)],
    ) -> s.DeletedResponse:
        """Delete documents: `?id=a&id=b`."""

        def work() -> s.DeletedResponse:
            with writing:
                try:
                    deleted = service.rag.delete_documents(list(dict.fromkeys(id)))
                except UserError as error:
                    raise _RefusedError(507, str(error), "not_stored") from error
            return s.DeletedResponse(deleted=deleted, version=service.rag.index.version)

        return await _answered(gate, work)


# text


def _add_text(app: FastAPI, service: Service, gate: Gate) -> None:
    @app.post("/v1/completions", response_model=s.CompletionResponse, tags=["text"], responses=_NOT_FOUND)
    async def completions(given: s.CompletionRequest) -> Any:
        """Continue prompts, in OpenAI's form; with `stream` as server-sent events."""
        generator = service.generator
        if generator is None:
            raise _RefusedError(404, "this service has no language model", "model_not_found")
        if given.model not in (None, "", generator.name):
            said = f"no model {given.model[:80]!r}; this service has {generator.name!r}"
            raise _RefusedError(404, said, "model_not_found", ["model"])
        writing = _Writing(service, given, gate)
        await writing.begin()
        if given.stream:
            return StreamingResponse(writing.events(), media_type="text/event-stream")
        return await writing.whole()

    @app.get("/v1/models", tags=["text"])
    async def models() -> s.Models:
        found = [service.generator.name] if service.generator is not None else []
        return s.Models(data=[s.ModelObject(id=name) for name in found])


class _Writing:
    """One request for text: its pieces come from a thread, over a queue."""

    def __init__(self, service: Service, given: s.CompletionRequest, gate: Gate) -> None:
        self.service, self.given, self.gate = service, given, gate
        self.id, self.created = new_id("cmpl"), int(time.time())
        self.prompts = [prompt for prompt in given.prompts for _ in range(given.n)]
        self.queue: asyncio.Queue[Piece | list[Generated] | Exception] = asyncio.Queue()
        self.gone = threading.Event()
        self.first: Piece | list[Generated] | Exception | None = None

    async def begin(self) -> None:
        """Wait for the first piece: until then anything wrong is an answer with its own status."""
        self.task = asyncio.get_running_loop().create_task(self._run())
        self.first = await self.queue.get()
        if isinstance(self.first, UserError):
            raise _RefusedError(422, str(self.first), "invalid_request", ["prompt"])
        if isinstance(self.first, Exception):
            raise self.first

    async def whole(self) -> s.CompletionResponse:
        item = self.first
        while isinstance(item, Piece):
            item = await self.queue.get()
        if isinstance(item, Exception):
            raise item
        assert item is not None
        return self._response(
            [self._choice(row, made.text, made) for row, made in enumerate(item)], self._usage(item)
        )

    async def events(self) -> AsyncIterator[str]:
        item = self.first
        try:
            if self.given.echo:
                for row, prompt in enumerate(self.prompts):
                    yield self._event([s.Choice(index=row, text=prompt, finish_reason=None)])
            while isinstance(item, Piece):
                yield self._event([s.Choice(index=item.row, text=item.text, finish_reason=None)])
                item = await self.queue.get()
            if isinstance(item, Exception):
                yield f"data: {json.dumps(refusal(str(item), 'unavailable'))}\n\n"
                return
            assert item is not None
            ends = [self._choice(row, "", made, echo=False) for row, made in enumerate(item)]
            yield self._event(ends, self._usage(item))
            yield "data: [DONE]\n\n"
        finally:
            self.gone.set()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()

        def told(piece: Piece) -> None:
            if self.gone.is_set():
                raise _Disconnected
            loop.call_soon_threadsafe(self.queue.put_nowait, piece)

        try:
            made = await self.gate.run(lambda: self.service.generate(self.prompts, self._sampling(), told))
            self.queue.put_nowait(made)
        except _Disconnected:
            pass
        except Exception as error:
            self.queue.put_nowait(error)

    def _sampling(self) -> SamplingConfig:
        given, generator = self.given, self.service.generator
        assert generator is not None
        return SamplingConfig(
            max_new_tokens=given.max_tokens,
            temperature=given.temperature,
            top_k=given.top_k,
            top_p=given.top_p,
            min_p=given.min_p,
            repetition_penalty=given.repetition_penalty,
            seed=secrets.randbits(31) if given.seed is None else given.seed,
            stop=given.stops,
            banned=tuple(generator.tokenizer.unknown_ids),
        )

    def _choice(self, row: int, text: str, made: Generated, echo: bool = True) -> s.Choice:
        text = self.prompts[row] + text if self.given.echo and echo else text
        ended = "stop" if made.finish in ("end", "stop") else "length"
        return s.Choice(index=row, text=text, finish_reason=ended)  # type: ignore[arg-type]

    def _usage(self, made: list[Generated]) -> s.Usage:
        assert self.service.generator is not None
        tokenizer = self.service.generator.tokenizer
        prompt = sum(len(tokenizer.encode(text)) for text in self.given.prompts)
        completion = sum(len(item.ids) for item in made)
        return s.Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)

    def _response(self, choices: list[s.Choice], usage: s.Usage | None) -> s.CompletionResponse:
        assert self.service.generator is not None
        name = self.service.generator.name
        return s.CompletionResponse(
            id=self.id, created=self.created, model=name, choices=choices, usage=usage
        )

    def _event(self, choices: list[s.Choice], usage: s.Usage | None = None) -> str:
        return f"data: {self._response(choices, usage).model_dump_json()}\n\n"


# whether it lives, and the page


def _add_watching(app: FastAPI, service: Service, gate: Gate) -> None:
    @app.get("/health", tags=["watch"])
    async def health() -> s.Health:
        """The process answers."""
        return s.Health()

    @app.get("/ready", tags=["watch"], responses={503: {"model": s.Ready, "description": "Not ready."}})
    async def ready() -> JSONResponse:
        """Whether searches are answered, and by what."""
        found = await asyncio.to_thread(_ready, service)
        return JSONResponse(found.model_dump(), 200 if found.ready else 503)

    @app.get(
        "/metrics",
        tags=["watch"],
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """Prometheus's text form."""
        shown = await asyncio.to_thread(service.metrics.text)
        lines = f"resonance_requests_at_work {gate.inside - gate.waiting}\n"
        lines += f"resonance_requests_waiting {gate.waiting}\n"
        return Response(shown + lines.encode(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _ready(service: Service) -> s.Ready:
    scorer, index = service.scorer, service.rag.index
    state = "none" if scorer is None else "up" if scorer.up else "down"
    about: dict[str, Any] = {
        "reranker": state,
        "model": scorer.name if scorer is not None else None,
        "language_model": service.generator.name if service.generator is not None else None,
    }
    try:
        about |= {"documents": index.documents, "passages": index.size, "index_version": index.version}
    except UserError as error:
        empty = {"documents": None, "passages": None, "index_version": None}
        return s.Ready(ready=False, problem=str(error), **about | empty)
    return s.Ready(ready=True, **about)


def _add_page(app: FastAPI) -> None:
    files = {path.name: path.read_bytes() for path in _STATIC.iterdir() if path.is_file()}

    def served(name: str) -> Response:
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        return Response(files[name], media_type=kind, headers={"cache-control": "no-cache"})

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return served("index.html")

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        if name not in files:
            raise HTTPException(404, "no such file")
        return served(name)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(_RefusedError)
    async def refused(_: Request, error: _RefusedError) -> JSONResponse:
        headers = {"retry-after": "1"} if error.status == 503 else None
        return JSONResponse(error.body, error.status, headers)

    @app.exception_handler(BusyError)
    async def busy(_: Request, error: BusyError) -> JSONResponse:
        return JSONResponse(refusal(str(error), "busy"), 503, {"retry-after": str(error.retry_after)})

    @app.exception_handler(UnavailableError)
    async def unavailable(_: Request, error: UnavailableError) -> JSONResponse:
        return JSONResponse(refusal(str(error), "unavailable"), 503, {"retry-after": "2"})

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        """Where and what, without the value: it may be what no answer can hold."""
        found = error.errors()
        fields = [".".join(str(part) for part in item["loc"]) for item in found[:20]]
        said = "; ".join(f"{place}: {item['msg']}" for place, item in zip(fields, found[:5], strict=False))
        no_json = any(item["type"] == "json_invalid" for item in found)
        fields = [field.encode("utf-8", "replace").decode() for field in fields]
        body = refusal(said.encode("utf-8", "replace").decode(), "invalid_request", fields)
        return JSONResponse(body, 400 if no_json else 422)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        kind = {404: "not_found", 405: "not_allowed"}.get(error.status_code, "invalid_request")
        return JSONResponse(refusal(str(error.detail), kind), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        _log.exception("%s %s", request.method, request.url.path, exc_info=error)
        return JSONResponse(refusal("an unforeseen error; it is in the service's log", "internal"), 500)
