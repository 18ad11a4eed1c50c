"""How QMD uses an expansion model (tobi/qmd 2.8, src/llm.ts and src/store.ts): grammar, sampling, parsing."""

from __future__ import annotations

import re
from dataclasses import dataclass

from common.data.expansion import TYPES, Line
from common.metrics.expansion import clean, keeps_term


@dataclass(frozen=True)
class Sampling:
    """How QMD samples; the penalty looks at the last `penalty_window` tokens."""

    temperature: float = 0.7
    top_k: int = 20
    top_p: float = 0.8
    presence_penalty: float = 0.5
    penalty_window: int = 64
    max_tokens: int = 600


@dataclass(frozen=True)
class Parsed:
    """The lines that QMD searches with; `dropped` lines it left out; `fallback`: it had to take its own."""

    lines: tuple[Line, ...]
    dropped: int
    fallback: bool


def parse_completion(query: str, text: str) -> Parsed:
    """A model's text as QMD reads it: known types with a word of the query, no line equal to the query; with
    nothing left, QMD's own stand-in."""
    found: list[Line] = []
    written = [line for line in clean(text)[0].split("\n") if line.strip()]
    for line in written:
        kind, colon, content = line.partition(":")
        kind, content = kind.strip(), content.strip()
        if colon and kind in TYPES and content and keeps_term(content, query):
            found.append((kind, content))
    fallback = not found
    if fallback:
        found = [("hyde", f"Information about {query}"), ("lex", query), ("vec", query)]
    lines = tuple(line for line in found if line[1] != query.strip())
    return Parsed(lines, len(written) - (0 if fallback else len(lines)), fallback)


def in_grammar(text: str) -> bool:
    """Whether QMD's grammar could have produced a text: lines `type: content`, each with its newline."""
    return re.fullmatch(r"((lex|vec|hyde): [^\n]+\n)+", text) is not None
