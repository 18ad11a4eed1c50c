"""A peer library in a process of its own: neither side pays for the other's threads and memory."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Self

from common.errors import UserError


def answer_all(connection: Connection, answer: Callable[[str, Any], Any]) -> None:
    """In the peer's process: answer every (kind, what), until the other side is gone."""
    while True:
        try:
            kind, what = connection.recv()
        except EOFError:
            return
        connection.send(answer(kind, what))


class Peer:
    """`serve(connection, *arguments)` in a new process, which ends with `answer_all`."""

    def __init__(self, serve: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, *arguments), daemon=True)

    def __enter__(self) -> Self:
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join(timeout=10)
        self._process.terminate()

    def run(self, kind: str, what: Any) -> Any:
        """The peer's answer. UserError when it fails."""
        self._connection.send((kind, what))
        try:
            return self._connection.recv()
        except EOFError:
            raise UserError("the peer's process failed; its message stands above") from None
