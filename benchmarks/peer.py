"""A peer library in a process of its own: neither side pays for the other's threads and memory."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any, Self

from common.errors import UserError


class Peer:
    """`serve(connection, *arguments)` in a new process: it takes (kind, what) and answers, to an EOFError."""

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
            raise UserError("the peer failed; its message stands above") from None
