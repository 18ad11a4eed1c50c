"""Export a reranker or a sentence encoder to ONNX or GGUF, verified beside its source on real pairs.

example: python scripts/export.py runs/quantum_resonance/best --out exports/mine --precision fp32 int8
         python scripts/export.py runs/quantum_resonance/best --out exports/llama --format gguf

Each precision has its own folder, OUT/fp32 and so on. One of ONNX is a model for every command (`--backend
onnx`). GGUF (F32, F16, Q8_0) holds the portable score for `llama-server --reranking`, or a sentence encoder
for `--embedding`; it is verified in llama.cpp's own server.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from common.backends import load_encoder, load_scorer
from common.checkpoint import surviving
from common.data.records import OnBadRow, Qrels, RankingData, Run
from common.data.sources import load_split_data
from common.errors import UserError, run_command
from common.export.llama_server import LlamaServer, of_llama_server
from common.export.verification import (
    MAX_LOSS,
    Exported,
    Format,
    Judge,
    Measured,
    Precision,
    Verification,
    compare,
    export_table,
    measure,
    of_encoder,
    of_scorer,
    write_export,
)
from common.hub import resolve_model
from common.report import tables_text
from common.reranker.evaluation import chosen_qrels
from common.retrieval.lexical import bm25_run


@dataclasses.dataclass(frozen=True)
class Args:
    model: tyro.conf.Positional[str]
    """A checkpoint directory, or the name of a base model."""
    out: Path
    """The folder of the exports."""
    format: Format = "onnx"
    kind: Literal["cross-encoder", "bi-encoder"] = "cross-encoder"
    """What the model is exported as."""
    score: Literal["full", "portable"] | None = None
    """Of a cross-encoder: full (ONNX's default), or portable, with the inputs and outputs of transformers'
    own exports and the only one that GGUF has."""
    precision: tuple[Precision, ...] = ("fp32", "int8")
    """fp16 halves the file and computes in float32; int8 quantizes matrices and embeddings, a scale a
    channel."""
    reduce_range: bool = False
    """int8 weights of 7 bits, for processors without VNNI."""
    data: str = "pydocs"
    """Whose pairs the export is verified on: as --data of scripts/evaluate.py, one source."""
    split: str = "test"
    on_bad_row: OnBadRow = "error"
    queries: int = 100
    """How many of the split's queries, the first by id."""
    depth: int = 20
    """Passages of a query, the best of BM25."""
    max_loss: float = 100 * MAX_LOSS
    """Percent of the source's nDCG@10 that an export may lose; a worse one is not written."""
    force: bool = False
    """Writes it all the same."""

    def validate(self) -> Args:
        """Return self, or raise a UserError for a flag out of range."""
        for flag, value in (("queries", self.queries), ("depth", self.depth)):
            if value < 1:
                raise UserError(f"--{flag} is {value}; allowed: >= 1")
        if not 0 <= self.max_loss <= 100:
            raise UserError(f"--max-loss is {self.max_loss}; allowed: percent, 0 to 100")
        if not self.precision:
            raise UserError("--precision needs at least one of fp32, fp16, int8")
        if self.kind == "bi-encoder" and self.score is not None:
            raise UserError("--score is of a cross-encoder: leave out --kind bi-encoder")
        if self.format == "gguf" and (self.score == "full" or self.reduce_range):
            raise UserError(
                "GGUF holds the portable score, in llama.cpp's types: no --score full, no --reduce-range"
            )
        return self

    @property
    def portable(self) -> bool:
        """Whether the score is the portable one."""
        return self.format == "gguf" or self.score == "portable"


def main(argv: Sequence[str] | None = None) -> None:
    args = tyro.cli(Args, description=__doc__, args=argv).validate()
    say = functools.partial(print, file=sys.stderr)
    directory = surviving(resolve_model(args.model, say=say))
    export = exporter(args, directory)
    first = export(args.precision[0])  # what cannot be exported is refused before anything is measured
    data, stage, qrels = real_pairs(args)
    source = measure(loaded(args, directory), directory, data, stage, qrels)
    found: dict[str, Verification] = {}
    for precision in dict.fromkeys(args.precision):
        exported = first if precision == args.precision[0] else export(precision)
        place = args.out / precision

        def verify(folder: Path) -> Verification:
            return compare(source, measured(args, folder, data, stage, qrels))

        found[precision] = write_export(place, exported, verify, args.max_loss / 100, args.force)
        say(f"written: {place}")
    print(tables_text([export_table(args.model, found, args.format)]), end="")


def exporter(args: Args, directory: Path) -> functools.partial[Exported]:
    """What makes the export of a precision."""
    if args.format == "gguf":
        from common.export import gguf

        return functools.partial(
            gguf.export_bi_encoder if args.kind == "bi-encoder" else gguf.export_cross_encoder, directory
        )
    from jax_impl.export import onnx

    if args.kind == "bi-encoder":
        return functools.partial(onnx.export_bi_encoder, directory, reduce_range=args.reduce_range)
    return functools.partial(
        onnx.export_cross_encoder,
        directory,
        score="portable" if args.portable else "full",
        reduce_range=args.reduce_range,
    )


def real_pairs(args: Args) -> tuple[RankingData, Run, Qrels]:
    """The data, BM25's passages of the first queries, and their judgements."""
    data = load_split_data(args.data, args.split, on_bad_row=args.on_bad_row)
    if data.parts:
        raise UserError("an export is verified on one source: give --data a single one")
    qrels = chosen_qrels(data, args.split, None, args.queries)
    stage = bm25_run(data.corpus, {query: data.queries[query] for query in qrels}, args.depth)
    stage = {query: run for query, run in stage.items() if run}
    if not stage:
        raise UserError(f"{args.data}: no query of split {args.split} shares a word with a passage")
    return data, stage, {query: qrels[query] for query in stage}


def loaded(args: Args, directory: Path) -> Judge:
    """What scores pairs with the model in a directory, exported or not."""
    if args.kind == "bi-encoder":
        return of_encoder(load_encoder(directory, say=lambda _: None))
    return of_scorer(load_scorer(directory, say=lambda _: None), args.portable)


def measured(args: Args, folder: Path, data: RankingData, stage: Run, qrels: Qrels) -> Measured:
    """The export that was just written, read back."""
    if args.format == "gguf":
        server = LlamaServer(folder, args.kind)
        found = measure(of_llama_server(server, args.kind), folder, data, stage, qrels)
        for text, how in list(server.apart.items())[:3]:
            print(f"note: {text[:60]!r}: {how}", file=sys.stderr)
        if server.apart:
            print(f"note: llama.cpp reads {len(server.apart)} texts as other tokens", file=sys.stderr)
        return found
    return measure(loaded(args, folder), folder, data, stage, qrels)


if __name__ == "__main__":
    run_command(main)
