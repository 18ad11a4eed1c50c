"""One query and its passages: ranked by a reranker, with the confidence that the first is relevant."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from common.backends import Scorer
from common.checkpoint import read_config
from common.config import FirstStage
from common.data.records import BadRows, is_unicode, json_rows, read_text
from common.errors import UserError
from common.hub import resolve_model
from common.metrics.calibration import Confidence


@dataclass(frozen=True)
class RankedPassage:
    """A passage in its place; `probability` is softmax over the scores of all passages of the query."""

    rank: int  # from 1
    id: str
    score: float
    resonance: float  # in [-1, 1]
    probability: float  # in [0, 1]
    text: str


@dataclass(frozen=True)
class Ranking:
    """`confidence`: calibrated probability that the first passage is relevant, or None and the reason."""

    query: str
    passages: list[RankedPassage]
    confidence: float | None
    no_confidence: str = ""


def rerank(
    scorer: Scorer, query: str, passages: dict[str, str], confidence: Confidence | None = None
) -> Ranking:
    """Rank passages (id -> text) by the full score, ties in their given order.

    Raises UserError for an empty query, for no passages and for what is no Unicode text.
    """
    if not query.strip():
        raise UserError("the query is empty: give some words to rank by")
    if not passages:
        raise UserError("no passages to rank: give at least one")
    for what, text in (("the query", query), *((f"passage {key}", text) for key, text in passages.items())):
        if not is_unicode(text):
            raise UserError(f"{what} holds bytes that are not UTF-8: {text[:40]!a}; give it as UTF-8 text")
    scores = scorer.score([query] * len(passages), list(passages.values()))
    values = scores.score.astype(np.float64)  # [N]
    if not np.isfinite(values).all():
        raise UserError(f"{scorer.name}: a score is not finite; the checkpoint is damaged, use another")
    probability = np.exp(values - values.max())
    probability /= probability.sum()
    ids = list(passages)
    order = np.argsort(-values, kind="stable")
    ranked = [
        RankedPassage(
            rank,
            ids[place],
            float(values[place]),
            float(scores.resonance[place]),
            float(probability[place]),
            passages[ids[place]],
        )
        for rank, place in enumerate(order.tolist(), 1)
    ]
    if confidence is None:
        return Ranking(query, ranked, None, "none was fitted: a base, or a run with few dev queries")
    sure = confidence.of(values, scores.resonance)
    short = f"was fitted on lists of {confidence.candidates} passages, and these are less than half as many"
    return Ranking(query, ranked, sure, "" if sure is not None else short)


def load_confidence(directory: str | Path) -> Confidence | None:
    """The confidence that training fitted on dev; None for a base or where dev was too small."""
    settings = read_config(Path(directory)).get("resonance") or {}
    stored = settings.get("confidence")
    try:
        return Confidence.from_json(stored) if stored else None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{directory}: the confidence in its config.json is not one of this version ({error!r}). "
            "Set it to null to go on without, or train again."
        ) from None


def load_confidences(models: Sequence[str | Path], scorers: Sequence[Scorer]) -> dict[str, Confidence]:
    """The confidence of each checkpoint that has one, by its scorer's identity (for `evaluate`)."""
    found = {
        scorer.identity: load_confidence(resolve_model(model, say=lambda _: None))
        for model, scorer in zip(models, scorers, strict=True)
    }
    return {identity: confidence for identity, confidence in found.items() if confidence is not None}


def fitted_over(directory: str | Path) -> tuple[FirstStage, int] | None:
    """The first stage and the depth that a checkpoint's fusion weight and confidence are meant for; None for
    a base, and for checkpoints of the first versions."""
    settings = read_config(Path(directory)).get("resonance") or {}
    stage, depth = settings.get("first_stage"), settings.get("depth")
    known: FirstStage | None = next((name for name in get_args(FirstStage) if name == stage), None)
    return (known, depth) if known and isinstance(depth, int) and depth > 0 else None


def read_passages(path: str | Path) -> dict[str, str]:
    """Passages by id, from a text file (one a line, the id is the line) or .jsonl with id?, text, title?.

    "-" reads lines from standard input. Raises UserError naming file and line, and for no passages at all.
    """
    path = str(path)
    if path.removesuffix(".gz").endswith((".jsonl", ".json")):
        found = _json_passages(Path(path))
    else:
        lines = (_standard_input() if path == "-" else read_text(path)).split("\n")
        found = {str(number): line.strip() for number, line in enumerate(lines, 1) if line.strip()}
    if not found:
        raise UserError(f"{'standard input' if path == '-' else path}: no passages; give one a line")
    return found


def _standard_input() -> str:
    try:
        text = sys.stdin.read()
        text.encode()  # fails for the bytes that a C locale lets through
    except UnicodeError:
        raise UserError("standard input: not UTF-8; convert the passages to UTF-8") from None
    return text


def _json_passages(path: Path) -> dict[str, str]:
    bad, found = BadRows("error"), dict[str, str]()
    for number, (where, row) in enumerate(json_rows(path, bad), 1):
        fields = row if isinstance(row, dict) else {}
        text, title = fields.get("text"), fields.get("title") or ""
        given = next((fields[key] for key in ("id", "_id") if fields.get(key) is not None), number)
        identity = str(given)
        if not isinstance(text, str) or not isinstance(title, str) or not (title + text).strip():
            bad.add(where, 'expected an object {"id"?, "text", "title"?} with some text', "not a passage")
        elif not isinstance(given, str | int):
            bad.add(where, f"the id {given!r} is neither a text nor a whole number", "not an id")
        elif identity in found:
            bad.add(where, f"the id {identity!r} appears twice", "repeated id")
        else:
            found[identity] = " ".join(part.strip() for part in (title, text) if part.strip())
    bad.raise_if_any("Mend them.")
    return found


def shown(ranking: Ranking, top: int | None = None, words: int = 12) -> str:
    """The ranking as aligned lines: rank, score, resonance, probability, id, first words; then confidence."""
    lines = [f"{'rank':>4}  {'score':>8}  {'resonance':>9}  {'p':>6}  passage"]
    for item in ranking.passages[:top]:
        start = item.text.split(maxsplit=words)
        text = " ".join(start[:words]) + (" …" if len(start) > words else "")
        lines.append(
            f"{item.rank:>4}  {item.score:>8.3f}  {item.resonance:>+9.3f}  {item.probability:>6.3f}  "
            f"{item.id}: {text}"
        )
    sure = ranking.no_confidence if ranking.confidence is None else f"{ranking.confidence:.2f}"
    return "\n".join([*lines, f"confidence that the first is relevant: {sure}"])
