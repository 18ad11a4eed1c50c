"""QMD's grammar of an expansion, as the set of tokens that may come next.

root ::= line+; line ::= type ": " content "\\n"; type ::= "lex" | "vec" | "hyde"; content ::= [^\\n]+.
Source: tobi/qmd, src/llm.ts. The end of the turn is allowed where a line has just ended.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from common.data.expansion import TYPES

_TAGS = tuple(f"{kind}: ".encode() for kind in TYPES)
# a state is the part of a line's tag that was read, or one of these
START, LINE, EMPTY, CONTENT, DONE = "start", "line", "empty", "content", "done"
State = str | bytes


class Grammar:
    """Which tokens of a byte-level BPE tokenizer continue a valid expansion."""

    start: State = START

    def __init__(self, tokenizer: Any, end_id: int, size: int | None = None) -> None:
        """`size`: the model's vocabulary, where it is padded past the tokenizer's."""
        self.end_id = end_id
        count = len(tokenizer)
        self.size = size or count
        special = set(tokenizer.added_tokens_decoder)
        texts = tokenizer.convert_ids_to_tokens(list(range(count)))
        letters = _byte_letters()
        self._bytes = [
            b"" if number in special or text is None else bytes(letters[letter] for letter in text)
            for number, text in enumerate(texts)
        ]
        self._by_first: dict[int, list[int]] = {}
        for number, value in enumerate(self._bytes):
            if value:
                self._by_first.setdefault(value[0], []).append(number)
        self._masks: dict[State, np.ndarray] = {}

    def allowed(self, state: State) -> np.ndarray:
        """Which tokens may follow, bool [size]."""
        if state not in self._masks:
            mask = np.zeros(self.size, bool)
            if state in (LINE, DONE):
                mask[self.end_id] = True
            if state != DONE:
                for first, numbers in self._by_first.items():
                    if _walk(state, bytes([first])) is not None:
                        mask[[n for n in numbers if self._after(state, n) is not None]] = True
            self._masks[state] = mask
        return self._masks[state]

    def advance(self, state: State, token: int) -> State:
        """The state after a token that was allowed; ValueError for another."""
        after = DONE if token == self.end_id and state in (LINE, DONE) else self._after(state, token)
        if after is None:
            raise ValueError(f"token {token} is not allowed in state {state!r}")
        return after

    def bytes_of(self, token: int) -> bytes:
        """What a token writes; nothing for control tokens and padding."""
        return self._bytes[token] if token < len(self._bytes) else b""

    def _after(self, state: State, token: int) -> State | None:
        value = self.bytes_of(token)
        return _walk(state, value) if value else None


def _walk(state: State, text: bytes) -> State | None:
    """The state after some bytes, None where they break the grammar."""
    if state == CONTENT and b"\n" not in text:
        return CONTENT
    for byte in text:
        step = _step(state, byte)
        if step is None:
            return None
        state = step
    return state


def _step(state: State, byte: int) -> State | None:
    newline = byte == ord("\n")
    if state == EMPTY:
        return None if newline else CONTENT
    if state == CONTENT:
        return LINE if newline else CONTENT
    if state == DONE:
        return None
    read = (b"" if isinstance(state, str) else state) + bytes([byte])
    if read in _TAGS:
        return EMPTY
    return read if any(tag.startswith(read) for tag in _TAGS) else None


@cache
def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in a byte-level BPE vocabulary (GPT-2's table), inverted."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + n): byte for n, byte in enumerate(others)}
