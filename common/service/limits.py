"""In front of every route: who may ask, how large a body may be, how long it may take to come."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Iterable
from typing import Any

OPEN = ("/", "/health", "/ready", "/openapi.json")  # without a key: the page, and what asks whether we live
_DRAINED = 4  # times the largest body: more is not even read
_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def refusal(message: str, kind: str, fields: Iterable[str] = ()) -> dict[str, Any]:
    """The body of every answer that is an error."""
    return {"error": {"message": message, "type": kind, "fields": list(fields)}}


class Limits:
    """ASGI middleware. A body over `max_body` bytes is refused with 413, one that does not come within
    `body_seconds` with 408, a wrong or missing key with 401, a Host that is not in `hosts` (None: any) with
    421."""

    def __init__(
        self,
        app: Any,
        *,
        max_body: int,
        body_seconds: float,
        api_key: str | None,
        hosts: tuple[str, ...] | None,
    ) -> None:
        self.app, self.max_body, self.body_seconds = app, max_body, body_seconds
        self.key, self.hosts = api_key.encode() if api_key else None, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self.hosts is not None and _host(headers.get(b"host", b"")) not in self.hosts:
            await _refuse(send, 421, f"this service answers to {', '.join(self.hosts)}", "wrong_host")
        elif not self._known(scope["path"], headers):
            await _refuse(
                send, 401, "a valid key is needed: Authorization: Bearer KEY", "unauthorized", bearer=True
            )
        elif _length(headers) > _DRAINED * self.max_body:
            await _refuse(send, 413, self._too_large(), "too_large", close=True)
        else:
            try:
                body = await asyncio.wait_for(self._body(receive), self.body_seconds)
            except TimeoutError:
                said = f"the body did not come within {self.body_seconds:g} s"
                await _refuse(send, 408, said, "timeout", close=True)
                return
            if body is None:
                await _refuse(send, 413, self._too_large(), "too_large", close=True)
            elif isinstance(body, bytes):  # else the other end is gone
                await self.app(scope, _replay(body, receive), _secure(send))

    def _known(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if self.key is None or path in OPEN or path.startswith("/static/"):
            return True
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        given = bearer.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        return hmac.compare_digest(given, self.key)

    async def _body(self, receive: Any) -> bytes | bool | None:
        """All of it; None when it is too large, False when the other end is gone.

        What is a little too large is read and dropped: a client that is still sending hears no answer.
        """
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            size += len(message.get("body", b""))
            if size > self.max_body:
                parts.clear()
            else:
                parts.append(message.get("body", b""))
            if not message.get("more_body") or size > _DRAINED * self.max_body:
                return b"".join(parts) if size <= self.max_body else None

    def _too_large(self) -> str:
        return f"the body is over {self.max_body:,} bytes; send it in parts"


def _host(header: bytes) -> str:
    text = header.decode("latin-1").lower()
    return text.partition("]")[0] + "]" if text.startswith("[") else text.partition(":")[0]


def _length(headers: dict[bytes, bytes]) -> int:
    given = headers.get(b"content-length", b"0")
    return int(given) if given.isdigit() and len(given) < 20 else 0


def _replay(body: bytes, receive: Any) -> Any:
    sent = False

    async def again() -> Any:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _secure(send: Any) -> Any:
    async def with_headers(message: Any) -> None:
        if message["type"] == "http.response.start":
            extra = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
            message = {**message, "headers": [*message.get("headers", []), *extra]}
        await send(message)

    return with_headers


async def _refuse(
    send: Any, status: int, message: str, kind: str, *, close: bool = False, bearer: bool = False
) -> None:
    body = json.dumps(refusal(message, kind)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close")] if close else []
    headers += [(b"www-authenticate", b"Bearer")] if bearer else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
