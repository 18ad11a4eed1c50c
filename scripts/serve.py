"""Serve search, reranking, contexts and text over HTTP, with a page at /.

example: python scripts/serve.py --reranker exports/mine/int8 --index my_index --documents docs.jsonl
         curl localhost:8080/search -H 'content-type: application/json' -d '{"query": "sort a list"}'

A key is read from $RESONANCE_API_KEY. Ctrl-C or SIGTERM: what was accepted is answered, then it ends.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from common.data.records import BadRows, json_rows
from common.errors import UserError, run_command
from common.hub import resolve_model
from common.rag import RAGPipeline
from common.reranker.reranking import fitted_over, load_confidence
from common.service.feedback import FeedbackStore
from common.service.registry import Registry

KEY = "RESONANCE_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@dataclasses.dataclass(frozen=True)
class Args:
    retriever: str = "default"
    """A sentence encoder: directory, export or name; or bm25."""
    reranker: str | None = None
    """A cross-encoder: directory, export or name; none: the first stage's order."""
    registry: Path | None = None
    """A folder of scripts/registry.py, instead of --reranker: what is promoted there is taken up at once."""
    registry_name: str = "ranker"
    language_model: str | None = None
    """A run or checkpoint for /v1/completions."""
    index: Path = Path("runs/index")
    """Where the index lies."""
    documents: Path | None = None
    """A .jsonl of {"id"?, "text", "title"?, "metadata"?} to index before serving."""
    feedback: Path = Path("runs/feedback.sqlite")
    """Where searches and feedback are stored."""
    host: str = "127.0.0.1"
    """Beyond this machine it asks for a key in $RESONANCE_API_KEY, or --open."""
    port: int = 8080
    """0: any that is free."""
    open: bool = False
    """Serves other machines without a key."""
    retrieval: Literal["hybrid", "dense", "bm25"] | None = None
    """When absent what the reranker was trained over, else hybrid."""
    depth: int = 50
    """Passages of the first stage, which are reranked."""
    deadline: float = 2.0
    """Seconds that a search's reranking may take; then the first stage's order is given, marked as such."""
    request_seconds: float = 60.0
    """Seconds that /rerank and /v1/completions may take."""
    patience: float = 30.0
    """Seconds that a batch may take before the reranker's process counts as hung and is started anew."""
    threads: int = 16
    """Requests at work at once."""
    queue: int = 64
    """Requests that wait; the next ones get 503."""
    wait: float = 10.0
    """Seconds that one may wait."""
    max_body: int = 8 * 2**20
    """Bytes."""
    shutdown_seconds: int = 30
    """For what was accepted, after SIGTERM."""
    backend: Literal["auto", "jax", "mlx", "onnx"] = "auto"


def main(argv: Sequence[str] | None = None) -> None:
    args = tyro.cli(Args, description=__doc__, args=argv)
    key = os.environ.get(KEY) or None
    if args.host not in (*LOOPBACK, "::1") and key is None and not args.open:
        raise UserError(
            f"--host {args.host} serves other machines: set a key in ${KEY}, or say --open for none"
        )
    if not 0 <= args.port <= 65_535:
        raise UserError(f"--port is {args.port}; allowed: 0 to 65535, 0 for a free one")
    if args.reranker is not None and args.registry is not None:
        raise UserError("--reranker and --registry both name a reranker: give one of them")
    try:
        import uvicorn

        from common.service.app import ServiceConfig, create_app
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install -e '.[serve]'") from None
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("resonance").setLevel(logging.INFO)
    hosts = None if args.host not in LOOPBACK or key else LOOPBACK
    config = ServiceConfig(
        args.threads, args.queue, args.wait, max_body=args.max_body, api_key=key, hosts=hosts
    )
    service, reloader = _service(args)
    app = create_app(service, config, reloader)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=args.host,
            port=args.port,
            log_level="warning",
            timeout_graceful_shutdown=args.shutdown_seconds,
            server_header=False,
        )
    )
    _serve(server)


def _serve(server: Any) -> None:
    """Say where, once it listens, then serve until a signal."""
    import asyncio

    async def run() -> None:
        serving = asyncio.create_task(server.serve())
        while not server.started and not serving.done():
            await asyncio.sleep(0.05)
        if server.started:
            host, port = server.servers[0].sockets[0].getsockname()[:2]
            print(f"serving on http://{host}:{port}", flush=True)
        await serving

    asyncio.run(run())


def _service(args: Args) -> tuple:
    """The service, and what watches the registry for it (None without one)."""
    from common.service.batching import BatchedScorer
    from common.service.core import Reloader, Service, reranker_of, start_reranker
    from common.service.metrics import Metrics

    say = functools.partial(print, file=sys.stderr)
    others = "auto" if args.backend == "onnx" else args.backend  # ONNX is of the reranker alone
    metrics = Metrics()

    def start(directory: Path) -> BatchedScorer:
        return start_reranker(reranker_of(directory, args.backend), metrics, patience=args.patience)

    registry = Registry(args.registry) if args.registry is not None else None
    seen = registry.current_version(args.registry_name) if registry is not None else None
    directory = registry.current(args.registry_name) if registry is not None else None
    if args.reranker is not None:
        directory = resolve_model(args.reranker, say=say)
    fitted = fitted_over(directory) if directory is not None else None
    own = None if fitted is None else "hybrid" if fitted[0] == "rrf" else fitted[0]
    retrieval = args.retrieval or ("bm25" if args.retriever == "bm25" else own)
    rag = RAGPipeline(
        args.retriever,
        None,
        args.depth,
        retrieval=retrieval,
        index_dir=args.index,
        deadline=args.deadline,
        backend=others,
        say=say,
    )
    if args.documents is not None:
        changes = rag.index_documents(_documents(args.documents))
        say(f"index: {changes.added} added, {changes.updated} updated, {changes.unchanged} unchanged")
    feedback = FeedbackStore(args.feedback)
    generator = None
    if args.language_model is not None:
        from common.language.samples import load_generator

        generator = load_generator(args.language_model, others, say=say)
    scorer = start(directory) if directory is not None else None
    if scorer is not None:
        rag.set_reranker(scorer, confidence=load_confidence(directory))
    service = Service(rag, scorer, feedback, metrics, generator=generator, deadline=args.request_seconds)
    watching = registry and Reloader(service, registry, args.registry_name, start, seen)
    return service, watching


def _documents(path: Path) -> list[object]:
    bad = BadRows("error")
    rows = [row for _, row in json_rows(path, bad)]
    bad.raise_if_any("Mend them.")
    return rows


if __name__ == "__main__":
    run_command(main)
