"""A service that runs on a free port of this machine, with rerankers and models that need no training."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

from common.language.samples import LanguageGenerator
from common.rag import RAGPipeline
from common.service.app import ServiceConfig, create_app
from common.service.core import Reloader, Service, start_reranker
from common.service.feedback import FeedbackStore
from common.service.metrics import Metrics
from tests.retrieval_fakes import MoodyScorer, WordEncoder

DOCUMENTS = [
    {"id": "sort", "title": "Sorting", "text": "The function sorted gives a new list. It takes a key."},
    {"id": "json", "text": "Write an object as text with json dumps.", "metadata": {"source": "j.html"}},
    {"id": "dict", "text": "A dict maps keys to values. Keys are unique. Order is kept."},
    *({"id": f"other{n}", "text": f"Number {n} says little about filler{n} of its own."} for n in range(20)),
]
LETTERS = "abcdefgh"


class Letters:
    """A tokenizer of single letters and an end."""

    end: int | None = len(LETTERS)
    unknown_ids: tuple[int, ...] = ()

    def decode(self, ids: Any) -> str:
        return "".join(LETTERS[i] for i in ids)

    def encode(self, text: str) -> np.ndarray:
        return np.array([LETTERS.find(letter) % len(LETTERS) for letter in text], np.int32)


class Alphabet:
    """An engine that says the next letter of the alphabet, then the end."""

    vocab_size, context, segmented = len(LETTERS) + 1, None, False

    def start(self, rows: int, capacity: int) -> list[int]:
        return [0] * rows

    def read(self, state: Any, ids: Any, counts: Any, explore: Any = None) -> Any:
        logits = np.zeros((len(state), self.vocab_size), np.float32)
        last = [int(ids[row, count - 1]) if count else state[row] for row, count in enumerate(counts)]
        logits[np.arange(len(last)), [(token + 1) % self.vocab_size for token in last]] = 50.0
        return last, logits

    def renew(self, state: Any, rows: Any) -> Any:
        return state


@dataclass
class Running:
    """A service that answers; `headers` go with every request."""

    port: int
    service: Service
    server: uvicorn.Server
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and the body, as JSON where it is; a body of bytes goes as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        named = {"content-type": "application/json"} | self.headers
        named |= {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, raw, named)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        got = {name.lower(): value for name, value in answer.getheaders()}
        if "json" in got.get("content-type", ""):
            return answer.status, got, json.loads(content)
        return answer.status, got, content.decode()

    def post(self, path: str, **body: Any) -> Any:
        """The answer of a request that must succeed."""
        status, _, content = self.ask("POST", path, body)
        assert status == 200, content
        return content


@contextmanager
def running(
    folder: Path,
    load: Callable[[], Any] | None = MoodyScorer,
    *,
    config: ServiceConfig | None = None,
    patience: float = 30.0,
    deadline: float | None = 10.0,
    text: bool = True,
    reloader: Callable[[Service, Metrics], Reloader] | None = None,
) -> Iterator[Running]:
    """A service over DOCUMENTS, until the end of the block."""
    metrics = Metrics()
    rag = RAGPipeline(
        WordEncoder(), None, 10, index_dir=folder / "index", deadline=deadline, say=lambda _: None
    )
    rag.index_documents(DOCUMENTS)
    scorer = start_reranker(load, metrics, patience=patience) if load is not None else None
    rag.set_reranker(scorer)
    generator = LanguageGenerator("alphabet", Alphabet(), Letters()) if text else None  # type: ignore[arg-type]
    service = Service(rag, scorer, FeedbackStore(folder / "feedback.sqlite"), metrics, generator=generator)
    app = create_app(service, config or ServiceConfig(), reloader and reloader(service, metrics))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=20))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield Running(server.servers[0].sockets[0].getsockname()[1], service, server)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
