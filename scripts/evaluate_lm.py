"""Measure a language model on a corpus: perplexity, what it generates, human text beside it, its memory.

example: python scripts/evaluate_lm.py --model runs/infinito_small --data pydocs --metrics all

Perplexity by token, by word of the original text and in bits a byte, ± its standard error over documents.
What is generated goes on from places of the split; BLEU compares it with how the author went on, and the
human column is the author's own text with another place's as the reference. Writes evaluation_lm.json and
.html into the run's folder, whose report then shows them too, or to --out.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from common.backends import checkpoint_identity, checkpoint_name, language_module
from common.checkpoint import check_writable, json_numbers, read_config, to_json, write_file
from common.errors import UserError, run_command
from common.hub import resolve_model
from common.language.architectures import language_config
from common.language.config import MODEL_REMEDY
from common.language.evaluation import LanguageResult
from common.language.generation import SamplingConfig
from common.language.prepare import PreparedLanguage, evaluation_recipe, prepare_language
from common.language.samples import (
    human_metrics,
    load_generator,
    measured_samples,
    metrics_table,
    split_prompts,
)
from common.language.workflow import perplexities, perplexity_table
from common.metrics.language import perplexity_ratio
from common.report import Table, page, table_html, tables_text, write_report
from common.runs import environment

FILES = ("evaluation_lm.json", "evaluation_lm.html")


@dataclasses.dataclass(frozen=True)
class Args:
    model: str
    """A checkpoint directory, a run's folder, or an ONNX export with --data."""
    against: str | None = None
    """Another model: the perplexities' ratio, with an interval over documents (paired)."""
    data: str | None = None
    """A corpus, as train.py's --data; the one the model was trained on when absent."""
    form: Literal["literal", "detokenised"] | None = None
    """Of WikiText; as in training when absent."""
    split: Literal["train", "dev", "test"] = "test"
    metrics: Literal["perplexity", "human", "all"] = "perplexity"
    """human measures the split's own text, all what the model generates too."""
    batch_size: int = 16
    stride: int | None = None
    """Tokens between two windows of the static perplexity; the context when absent."""
    max_documents: int | None = None
    """Only the first documents of the split; said in the output."""
    samples: int = 32
    prompt_tokens: int = 32
    max_new_tokens: int = 128
    temperature: float = 1.0
    """Of what is generated; 0 is greedy."""
    top_p: float = 1.0
    seed: int = 0
    allow_unknown: bool = False
    """Lets the model write `<unk>`, which is banned otherwise."""
    backend: Literal["auto", "jax", "mlx", "onnx"] = "auto"
    out: Path | None = None
    """The folder to write into; the run's own when absent."""


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    args = tyro.cli(Args, args=words, description=__doc__)
    check(args)
    directory = resolve_model(args.model, remedy=MODEL_REMEDY)
    other = None if args.against is None else resolve_model(args.against, remedy=MODEL_REMEDY)
    for model in filter(None, (directory, other)):
        language_config(read_config(model), model)
    place = args.out or (directory.parent if directory.name in ("best", "final") else directory)
    table_file, page_file = (place / file for file in FILES)
    for file in (table_file, page_file):
        check_writable(file)
    prepared = prepare_language(evaluation_recipe(directory, args.data, args.form))
    if args.max_documents is not None:
        prepared = Limited(**vars(prepared), limit=args.max_documents)
    tables, found = measure(args, directory, prepared, other)
    print(tables_text(tables))
    place.mkdir(parents=True, exist_ok=True)
    found |= {"model": checkpoint_identity(directory), "settings": vars(args), **environment()}
    write_file(table_file, to_json(found))
    name = checkpoint_name(directory)
    write_file(page_file, page(name, "\n".join(map(table_html, tables))).encode())
    print(f"written: {table_file}, {page_file}")
    if args.out is None and (place / "metrics.jsonl").exists():
        print(f"report: {write_report(place)}")


def check(args: Args) -> None:
    """UserError for a number out of range."""
    checks = [
        ("--batch-size", args.batch_size, args.batch_size >= 1, ">= 1"),
        ("--stride", args.stride, args.stride is None or args.stride >= 1, ">= 1"),
        ("--samples", args.samples, args.samples >= 2, ">= 2"),
        ("--prompt-tokens", args.prompt_tokens, args.prompt_tokens >= 1, ">= 1"),
        ("--max-new-tokens", args.max_new_tokens, args.max_new_tokens >= 1, ">= 1"),
        (
            "--max-documents",
            args.max_documents,
            args.max_documents is None or args.max_documents >= 1,
            ">= 1",
        ),
        ("--temperature", args.temperature, args.temperature >= 0, ">= 0"),
        ("--top-p", args.top_p, 0 < args.top_p <= 1, "(0, 1]"),
    ]
    if wrong := [
        f"{name} is {value}; allowed: {allowed}" for name, value, good, allowed in checks if not good
    ]:
        raise UserError("; ".join(wrong))


@dataclasses.dataclass(frozen=True)
class Limited(PreparedLanguage):
    """The first documents of each split."""

    limit: int | None = None

    def split(self, name: str, limit: int | None = None) -> Any:
        return super().split(name, limit or self.limit)


def measure(
    args: Args, directory: Path, prepared: PreparedLanguage, other: Path | None = None
) -> tuple[list[Table], dict[str, Any]]:
    """Tables, and all numbers as JSON values; `other` is the directory of --against."""
    name = checkpoint_name(directory)
    scorer = language_module(args.backend, "language_scoring", directory).load_segment_scorer(directory)
    if args.stride is not None and args.stride > scorer.context:
        raise UserError(f"--stride is {args.stride}; allowed: 1 to the context, {scorer.context}")
    results = perplexities(scorer, prepared, args.split, args.batch_size, args.stride)
    tables = [perplexity_table(name, prepared, args.split, results)]
    found: dict[str, Any] = {"perplexity": [result.json() for result in results]}
    if other is not None:
        found["against"] = beside(args, directory, other, prepared, results)
        tables.append(against_table(name, found["against"]))
    memory = next((result.memory for result in results if result.memory), None)
    if memory:
        tables.append(metrics_table("Memory", {name: memory}, "Over the segments of the cache row."))
    if args.metrics == "perplexity":
        return tables, found
    prompts = split_prompts(
        prepared.split(args.split),
        count=args.samples,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.max_new_tokens,
        seed=args.seed,
    )
    columns = {"human": human_metrics(prompts, prepared.tokenizer)}
    if args.metrics == "all":
        sampling = SamplingConfig(
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
            banned=() if args.allow_unknown else prepared.tokenizer.unknown_ids,
        )
        generator = load_generator(directory, args.backend, say=lambda _: None)
        columns[name], made = measured_samples(generator, prompts, sampling)
        found["samples"] = [
            {"prompt": prepared.tokenizer.decode(prompt), "text": item.text}
            for prompt, item in zip(prompts.prompts, made, strict=True)
        ]
    found["generation"] = {column: json_numbers(values) for column, values in columns.items()}
    tables.append(metrics_table(f"Generated after {args.samples} places of {args.split}", columns, NOTE))
    return tables, found


def beside(
    args: Args, own: Path, directory: Path, prepared: PreparedLanguage, results: Sequence[LanguageResult]
) -> dict[str, Any]:
    """The perplexity a word over that of the model in `directory`, which reads the same documents by its own
    tokenizer."""
    data = evaluation_recipe(own, args.data, args.form).data
    recipe = evaluation_recipe(directory, data.name, data.form)
    theirs = prepare_language(dataclasses.replace(recipe, data=data), say=lambda _: None)
    if args.max_documents is not None:
        theirs = Limited(**vars(theirs), limit=args.max_documents)
    words = prepared.split(args.split).words
    scorer = language_module(args.backend, "language_scoring", directory).load_segment_scorer(directory)
    stride = None if args.stride is None else min(args.stride, scorer.context)
    others = {r.mode: r for r in perplexities(scorer, theirs, args.split, args.batch_size, stride)}
    rows = []
    for result in results:
        other = others.get(result.mode, others["static"])
        found = json_numbers(perplexity_ratio(result.nll, other.nll, words))
        rows.append({"mode": result.mode, "other": other.mode, **found})
    return {"model": checkpoint_name(directory), "rows": rows}


def against_table(name: str, found: dict[str, Any]) -> Table:
    """A row for each mode."""
    rows: list[list[str | float | None]] = []
    for row in found["rows"]:
        ends = (row["low"], row["high"])
        interval = "–" if None in ends else f"[{ends[0]:.4f}, {ends[1]:.4f}]"
        rows.append([row["mode"], row["other"], row["ratio"] and round(row["ratio"], 4), interval])
    return {
        "title": f"Perplexity a word of {name} over that of {found['model']}",
        "columns": ["mode", "the other's", "ratio", "95 % interval"],
        "rows": rows,
        "note": "Below 1 this model predicts better. Paired over documents; one has no interval.",
    }


NOTE = (
    "Repetition: share of n-grams that stood in the text before, of tokens; character repetition slices the "
    "text's characters as the source's formula does. BLEU: against how the author went on; of human text, "
    "against another place. Self-BLEU: of each text against the others. Exploration: sampled tokens that are "
    "not the argmax."
)


if __name__ == "__main__":
    run_command(main)
