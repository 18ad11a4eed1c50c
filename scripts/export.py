"""Export a reranker, a sentence encoder or a language model to ONNX or GGUF, verified beside its source.

example: python scripts/export.py runs/quantum_resonance/best --out exports/mine --precision fp32 int8
         python scripts/export.py runs/quantum_resonance/best --out exports/llama --format gguf
         python scripts/export.py runs/infinito_small --out exports/infinito

Each precision has its own folder, OUT/fp32 and so on. One of ONNX is a model for every command (`--backend
onnx`). GGUF (F32, F16, Q8_0) holds the portable score for `llama-server --reranking`, or a sentence encoder
for `--embedding`; it is verified in llama.cpp's own server. A language model (llama, qwen3, indra, infinito:
its config.json says so) becomes ONNX with its past and memory as inputs and outputs, verified by perplexity,
logits and greedy tokens. scripts/generate.py reads it; the README.md beside it shows how others do.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import tyro

from common.backends import checkpoint_name, load_encoder, load_scorer
from common.checkpoint import read_config, surviving
from common.data.records import OnBadRow, Qrels, RankingData, Run
from common.data.sources import load_split_data
from common.errors import UserError, run_command
from common.export.language_verification import (
    MAX_PERPLEXITY_LOSS,
    LanguageSource,
    language_export_table,
    measure_language,
    verify_language,
)
from common.export.llama_server import LlamaServer, of_llama_server
from common.export.verification import (
    MAX_LOSS,
    Exported,
    Format,
    Found,
    Judge,
    Measured,
    Precision,
    Verification,
    calibration_pairs,
    compare,
    export_table,
    measure,
    of_encoder,
    of_scorer,
    write_export,
)
from common.hub import resolve_model
from common.language.architectures import LANGUAGE_MODELS
from common.language.prepare import evaluation_recipe, prepare_language
from common.report import tables_text
from common.reranker.evaluation import chosen_qrels
from common.retrieval.lexical import bm25_run

Kind = Literal["cross-encoder", "bi-encoder", "language-model"]
# flags of one kind alone
RANKING_FLAGS = ("score", "on_bad_row", "queries", "depth")
LANGUAGE_FLAGS = ("max_documents",)


@dataclasses.dataclass(frozen=True)
class Args:
    model: tyro.conf.Positional[str]
    """A checkpoint directory, or the name of a base model."""
    out: Path
    """The folder of the exports."""
    format: Format = "onnx"
    kind: Kind | None = None
    """What the model is exported as; when absent, a language model where config.json is one's, else a
    cross-encoder."""
    score: Literal["full", "portable"] | None = None
    """Of a cross-encoder: full (ONNX's default), or portable, with the inputs and outputs of transformers'
    own exports and the only one that GGUF has."""
    precision: tuple[Precision, ...] = ("fp32", "int8")
    """fp16 halves the file and computes in float32; int8 quantizes matrices and embeddings, a scale a
    channel."""
    reduce_range: bool = False
    """int8 weights of 7 bits, for processors without VNNI."""
    data: str | None = None
    """What the export is verified on. Pairs, as --data of scripts/evaluate.py, of one source: pydocs when
    absent. Of a language model a corpus, as --data of scripts/evaluate_lm.py: that of its training."""
    split: str | None = None
    """test when absent, of a language model dev."""
    on_bad_row: OnBadRow = "error"
    queries: int = 100
    """How many of the split's queries, the first by id."""
    max_documents: int = 64
    """Of a language model: how many of the split's documents, the first ones."""
    depth: int = 20
    """Passages of a query, the best of BM25."""
    max_loss: float | None = None
    """Percent of the source's nDCG@10 that an export may lose (0.5 when absent), or that its perplexity may
    grow by (2 when absent); a worse one is not written."""
    force: bool = False
    """Writes it all the same."""

    def validate(self) -> Args:
        """Return self, or raise a UserError for a flag out of range."""
        for flag in ("queries", "depth", "max_documents"):
            if getattr(self, flag) < 1:
                raise UserError(f"--{flag.replace('_', '-')} is {getattr(self, flag)}; allowed: >= 1")
        if self.max_loss is not None and not 0 <= self.max_loss <= 100:
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

    def fitting(self, directory: Path) -> Args:
        """Self with the kind of the model in a directory. UserError for flags of another kind."""
        config = read_config(directory)
        if "onnx" in config:
            raise UserError(f"{directory}: an export, which is not exported again: name its source")
        known = config.get("model_type") in LANGUAGE_MODELS
        kind = self.kind or ("language-model" if known else "cross-encoder")
        own = LANGUAGE_FLAGS if kind == "language-model" else RANKING_FLAGS
        usual = {field.name: field.default for field in dataclasses.fields(self)}
        for flag in {*LANGUAGE_FLAGS, *RANKING_FLAGS} - {*own}:
            if getattr(self, flag) != usual[flag]:
                raise UserError(
                    f"--{flag.replace('_', '-')} is not of a {kind}, which {directory} is: leave it out"
                )
        if kind == "language-model" and self.format == "gguf":
            raise UserError(
                "a language model is exported to ONNX: leave out --format. GGUF of an expander of queries is "
                "written by mlx_impl/convert.py."
            )
        return dataclasses.replace(self, kind=kind)

    @property
    def portable(self) -> bool:
        """Whether the score is the portable one."""
        return self.format == "gguf" or self.score == "portable"


def main(argv: Sequence[str] | None = None) -> None:
    args = tyro.cli(Args, description=__doc__, args=argv).validate()
    say = functools.partial(print, file=sys.stderr)
    directory = surviving(resolve_model(args.model, say=say))
    args = args.fitting(directory)
    export = exporter(args, directory, {})
    first = export(args.precision[0])  # what cannot be exported is refused before anything is read
    if args.kind == "language-model":
        source = language_source(args, directory, say)
        texts = written(args, first, export, functools.partial(verify_language, source))
        print(tables_text([language_export_table(texts)]), end="")
        return
    data, stage, qrels = real_pairs(args)
    export = exporter(args, directory, data.corpus)
    first = export(args.precision[0])
    measured_source = measure(loaded(args, directory), directory, data, stage, qrels)

    def verify(precision: Precision, folder: Path) -> Verification:
        return compare(measured_source, measured(args, folder, data, stage, qrels))

    found = written(args, first, export, verify)
    print(tables_text([export_table(args.model, found, args.format)]), end="")


def written(
    args: Args,
    first: Exported,
    export: Callable[[Precision], Exported],
    verify: Callable[[Precision, Path], Found],
) -> dict[Precision, Found]:
    """Every precision in its folder, verified; `first` is the export in the first one."""
    usual = MAX_PERPLEXITY_LOSS if args.kind == "language-model" else MAX_LOSS
    limit = usual if args.max_loss is None else args.max_loss / 100
    found: dict[Precision, Found] = {}
    for precision in dict.fromkeys(args.precision):
        exported = first if precision == args.precision[0] else export(precision)
        place = args.out / precision
        verified = functools.partial(verify, precision)
        found[precision] = write_export(place, exported, verified, limit, args.force)
        print(f"written: {place}", file=sys.stderr)
    return found


def language_source(args: Args, directory: Path, say: Callable[[str], None]) -> LanguageSource:
    """The language model in a directory, measured on the first documents of the split."""
    from jax_impl.generation import ModelEngine
    from jax_impl.language import load_language_model
    from jax_impl.language_scoring import ModelScorer

    split = args.split or "dev"
    prepared = prepare_language(evaluation_recipe(directory, args.data), say=say)
    documents, end = prepared.split(split, args.max_documents), prepared.tokenizer.end
    model, config = load_language_model(directory)
    scorer = ModelScorer(model)
    found = measure_language(directory, scorer, documents, end, config.vocab_size)
    corpus = f"{prepared.name}, split {split}"
    return LanguageSource(checkpoint_name(directory), corpus, ModelEngine(model), documents, end, found)


def exporter(args: Args, directory: Path, corpus: Mapping[str, str]) -> functools.partial[Exported]:
    """What makes the export of a precision; ONNX's int8 is calibrated on passages of the corpus."""
    if args.format == "gguf":
        from common.export import gguf

        return functools.partial(
            gguf.export_bi_encoder if args.kind == "bi-encoder" else gguf.export_cross_encoder, directory
        )
    from jax_impl.export import onnx, onnx_language

    if args.kind == "language-model":
        return functools.partial(
            onnx_language.export_language_model, directory, reduce_range=args.reduce_range
        )
    pairs = calibration_pairs(corpus)
    if args.kind == "bi-encoder":
        texts = [passage for _, passage in pairs]
        return functools.partial(
            onnx.export_bi_encoder, directory, reduce_range=args.reduce_range, calibration=texts
        )
    return functools.partial(
        onnx.export_cross_encoder,
        directory,
        score="portable" if args.portable else "full",
        reduce_range=args.reduce_range,
        calibration=pairs,
    )


def real_pairs(args: Args) -> tuple[RankingData, Run, Qrels]:
    """The data, BM25's passages of the first queries, and their judgements."""
    name, split = args.data or "pydocs", args.split or "test"
    data = load_split_data(name, split, on_bad_row=args.on_bad_row)
    if data.parts:
        raise UserError("an export is verified on one source: give --data a single one")
    qrels = chosen_qrels(data, split, None, args.queries)
    stage = bm25_run(data.corpus, {query: data.queries[query] for query in qrels}, args.depth)
    stage = {query: run for query, run in stage.items() if run}
    if not stage:
        raise UserError(f"{name}: no query of split {split} shares a word with a passage")
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
