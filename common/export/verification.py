"""Exports: written whole, read back, measured beside their source, and refused when they are worse.

Here rerankers and encoders on real pairs; language models: common/export/language_verification.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from common.backends import Encoder, Scorer
from common.checkpoint import (
    CONFIG_FILE,
    EXPORT_FILE,
    GGUF_FILE,
    ONNX_FILE,
    to_json,
    write_directory,
)
from common.data.records import Qrels, RankingData, Run
from common.errors import UserError
from common.metrics.latency import percentiles
from common.metrics.ranking import evaluate_run, mean, ranked
from common.progress import progress
from common.report import Table

Format = Literal["onnx", "gguf"]
Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
MODEL_FILES: dict[Format, str] = {"onnx": ONNX_FILE, "gguf": GGUF_FILE}
METRIC = "nDCG@10"
MAX_LOSS = 0.005  # of it, beyond which an export is refused
CARD_FILE = "README.md"
Judge = Callable[[str, Sequence[str]], NDArray[np.float32]]  # a query and L passages -> scores [L]


def calibration_pairs(corpus: Mapping[str, str], count: int = 128) -> list[tuple[str, str]]:
    """Texts on which int8 sees the ranges of its activations: up to `count` passages from all over the
    corpus, each asked by the first words of another. No query and no judgement is read.
    """
    names = sorted(corpus)
    texts = [corpus[name] for name in names[:: max(1, -(-len(names) // count))]]
    return [(" ".join(texts[i - 1].split()[:8]), text) for i, text in enumerate(texts)]


@dataclass(frozen=True)
class Exported:
    """A model in another format: its bytes, config.json, what writes the tokenizer into a folder, and the
    relative error |W - W'|/|W| of each matrix that was quantized."""

    model: bytes
    config: dict[str, Any]  # what was exported stands under the format's name
    tokenizer_save: Callable[[Path], None]
    errors: dict[str, float]
    format: Format = "onnx"


class Verified(Protocol):
    """What a verification says of an export."""

    def refused(self, max_loss: float) -> str | None: ...  # why it is not written, None where it is
    def json(self) -> dict[str, Any]: ...
    def card(self, config: Mapping[str, Any]) -> str | None: ...  # README.md; None without one


Found = TypeVar("Found", bound=Verified)


@dataclass(frozen=True)
class Measured:
    """One model over the candidates of some queries; times are of a query with its candidates, texts to
    scores."""

    megabytes: float  # 10^6 bytes of weights
    ndcg: float  # mean nDCG@10
    milliseconds: dict[str, float]  # p50, p95, p99
    pairs_per_second: float
    scores: Run


@dataclass(frozen=True)
class Verification:
    """An export beside its source. `difference`: largest and mean |score - score of the source|; `loss`:
    the part of the source's nDCG@10 that is lost, below 0 where it is gained."""

    queries: int
    pairs: int
    source: Measured
    export: Measured
    difference: dict[str, float]
    loss: float

    def refused(self, max_loss: float) -> str | None:
        """Why an export is not written that may lose `max_loss` of its source's nDCG@10; None where it is."""
        if self.loss <= max_loss:
            return None
        return (
            f"this export ranks worse than its source: nDCG@10 {self.export.ndcg:.4f} against "
            f"{self.source.ndcg:.4f}, a loss of {self.loss:.2%} (allowed: {max_loss:.2%}). Choose another "
            "--precision, more --queries to measure it by, or --force it."
        )

    def json(self) -> dict[str, Any]:
        found = asdict(self)
        for side in ("source", "export"):
            del found[side]["scores"]
        return found

    def card(self, config: Mapping[str, Any]) -> str | None:
        """None: the source's card says how it is used."""
        return None


def write_export(
    directory: Path, exported: Exported, verify: Callable[[Path], Found], max_loss: float, force: bool
) -> Found:
    """Write a directory, read it back and verify it; it takes its place only when the verification does not
    refuse it for losing more than `max_loss`, a part of the source's quality, or when `force` says so.

    Raises UserError for an export that is worse, and for a full disk; an earlier export there stays.
    """
    found: list[Found] = []

    def fill(folder: Path) -> None:
        (folder / MODEL_FILES[exported.format]).write_bytes(exported.model)
        (folder / CONFIG_FILE).write_bytes(to_json(exported.config))
        exported.tokenizer_save(folder)
        found.append(verify(folder))
        refused = found[0].refused(max_loss)
        if refused is not None and not force:
            raise UserError(f"{directory}: not written, {refused}")
        if (card := found[0].card(exported.config)) is not None:
            (folder / CARD_FILE).write_text(card, encoding="utf-8")
        report = {
            **exported.config[exported.format],
            "verification": found[0].json(),
            "forced": refused is not None,
        }
        report["quantization_error"] = exported.errors
        (folder / EXPORT_FILE).write_bytes(to_json(report))

    write_directory(directory, fill)
    return found[0]


def of_scorer(scorer: Scorer, portable: bool = False) -> Judge:
    """The full or the portable score of a reranker."""

    def judge(query: str, passages: Sequence[str]) -> NDArray[np.float32]:
        scores = scorer.score([query] * len(passages), list(passages))
        return scores.portable if portable else scores.score

    return judge


def of_encoder(encoder: Encoder) -> Judge:
    """The inner products of a bi-encoder's vectors; query and passages are encoded each time."""

    def judge(query: str, passages: Sequence[str]) -> NDArray[np.float32]:
        asked = encoder.encode([query], kind="query")[0]
        return encoder.encode(list(passages), kind="passage") @ asked

    return judge


def measure(judge: Judge, directory: Path, data: RankingData, stage: Run, qrels: Qrels) -> Measured:
    """Scores, nDCG@10, times and size of a model over the candidates in `stage` of each query.

    Every list is scored twice and timed the second time, so that compiling does not count.
    """
    scores: Run = {}
    seconds = []
    with progress(len(stage), f"measuring {directory.name}") as steps:
        for query, candidates in stage.items():
            names = ranked(candidates)
            passages = [data.corpus[name] for name in names]
            judge(data.queries[query], passages)
            began = time.perf_counter()
            found = judge(data.queries[query], passages)
            seconds.append(time.perf_counter() - began)
            scores[query] = dict(zip(names, map(float, found), strict=True))
            steps.advance(1)
    judged = {query: qrels[query] for query in scores}
    pairs = sum(map(len, scores.values()))
    return Measured(
        weights_size(directory) / 1e6,
        mean(evaluate_run(scores, judged, (METRIC,))[METRIC]),
        percentiles(seconds),
        pairs / sum(seconds),
        scores,
    )


def compare(source: Measured, export: Measured) -> Verification:
    """The verification of an export over the same pairs as its source."""
    differences = np.abs(
        [source.scores[q][p] - score for q, run in export.scores.items() for p, score in run.items()]
    )
    loss = (source.ndcg - export.ndcg) / max(source.ndcg, 1e-9)
    apart = {"largest": float(differences.max()), "mean": float(differences.mean())}
    return Verification(len(export.scores), differences.size, source, export, apart, loss)


def weights_size(directory: Path) -> int:
    """Bytes of the weights in a directory."""
    exported = [directory / name for name in MODEL_FILES.values() if (directory / name).exists()]
    return sum(file.stat().st_size for file in exported or directory.glob("*.safetensors"))


def export_table(name: str, found: Mapping[str, Verification], form: Format = "onnx") -> Table:
    """The exports of one model, a row each below their source."""
    columns = ["model", "MB", "nDCG@10", "loss %", "|Δ score| max", "mean", "p50 ms", "p95", "p99", "pairs/s"]

    def row(label: str, side: Measured, own: Verification | None) -> list[str | float | None]:
        lost = None if own is None else round(100 * own.loss, 3)
        apart = (None, None) if own is None else (own.difference["largest"], own.difference["mean"])
        digits = [None if value is None else float(f"{value:.3g}") for value in apart]
        times = [round(side.milliseconds[key], 2) for key in ("p50", "p95", "p99")]
        size = round(side.megabytes, 1)
        return [label, size, round(side.ndcg, 4), lost, *digits, *times, round(side.pairs_per_second, 1)]

    first = next(iter(found.values()))
    rows = [row(f"{name} (source)", first.source, None)]
    rows += [row(f"{form} {precision}", own.export, own) for precision, own in found.items()]
    note = (
        f"{first.queries} queries, {first.pairs} pairs; times: a query with its candidates, texts to "
        "scores, the second time that they are scored; loss: part of the source's nDCG@10"
    )
    return {"title": f"Exports of {name}", "columns": columns, "rows": rows, "note": note}
