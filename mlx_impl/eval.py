"""Judge query expanders: scores, groups, complaints, golden rows, what they do for a search; JSON and a page.

example: python mlx_impl/eval.py runs/qmd-sft --queries queries.txt
example: python mlx_impl/eval.py runs/qmd-grpo runs/qmd-sft --sampled --retrieval path/to/beir_folder

A template without a model is judged beside them. Queries stand one a line; without a file generated ones are
asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from common.backends import load_encoder
from common.checkpoint import check_writable
from common.data.expansion import EvalQuery, load_expansions, read_queries
from common.data.generated import generated_queries
from common.data.records import RankingData
from common.data.sources import load_ranking_data
from common.errors import UserError, run_command
from common.expansion.evaluation import ExpansionEvaluation, evaluate_expansions
from common.expansion.grammar import Grammar
from common.expansion.prompts import ExpansionPrompts, load_tokenizer
from common.expansion.qmd import Sampling, parse_completion
from common.expansion.retrieval_effect import Effect, retrieval_effect
from common.reranker.evaluation import chosen_qrels


@dataclass(frozen=True)
class EvalOptions:
    models: tyro.conf.Positional[tuple[str, ...]]
    """Runs, adapter directories or Qwen3 checkpoints; several are shown side by side."""
    queries: Path | None = None
    """File of queries, one a line (QMD's evals/queries.txt)."""
    max_queries: int | None = None
    """Ask at most so many."""
    sampled: bool = False
    """Sample with QMD's settings instead of greedily."""
    grammar: bool = False
    """Hold answers to QMD's grammar, as QMD does."""
    prompt: Literal["consumer", "plain"] = "consumer"
    """With node-llama-cpp's system prompt, as QMD asks, or without."""
    max_tokens: int = 600
    batch_size: int = 16
    golden: str | None = None
    """Rows whose lines are the right ones (their validation split): precision, recall, F1."""
    retrieval: str | None = None
    """BEIR folder, or `generated`: the effect on its searches."""
    split: str = "test"
    """Of the retrieval data."""
    max_retrieval_queries: int | None = None
    encoder: str = "default"
    """Of the dense search; `none`: BM25 alone."""
    base: str | None = None
    """Where the adapters' base lies, if not where they were trained."""
    output: Path = Path("runs/qmd-eval")
    """Folder of expansion.json and expansion.html."""
    seed: int = 0


class Expander:
    """A trained model that answers queries in the prompt form that QMD uses."""

    def __init__(self, name: str, options: EvalOptions, say: Callable[[str], None]) -> None:
        try:
            from mlx_impl.models.qwen import check_vocabulary, load_trained
            from mlx_impl.training.generation import greedy
        except ImportError as error:
            raise UserError(
                f"MLX cannot be loaded here ({error}); install it with `pip install -e '.[mlx]'`."
            ) from None
        self.options, self.name = options, name
        loaded = load_trained(name, options.base, say)
        tokenizer = load_tokenizer(loaded.origin.base)
        check_vocabulary(loaded, tokenizer)
        self.model = loaded.model
        self.prompts = ExpansionPrompts(tokenizer)
        limit = options.max_tokens
        self.sampling = replace(Sampling(), max_tokens=limit) if options.sampled else greedy(limit)
        size = loaded.config["vocab_size"]
        self.grammar = Grammar(tokenizer, self.prompts.end_id, size) if options.grammar else None

    def answer(self, queries: Sequence[str]) -> list[str]:
        """A text for each query."""
        from mlx_impl.training.generation import generate

        if not queries:
            return []
        consumer = self.options.prompt == "consumer"
        written = generate(
            self.model,
            [self.prompts.prompt(query, consumer=consumer) for query in queries],
            end=self.prompts.end_id,
            sampling=self.sampling,
            seed=self.options.seed,
            batch_size=self.options.batch_size,
            grammar=self.grammar,
        )
        return [self.prompts.decode(row.ids) for row in written]


def main(argv: Sequence[str] | None = None) -> None:
    evaluation = evaluate(tyro.cli(EvalOptions, args=argv, description=__doc__))
    print(evaluation.text())


def evaluate(options: EvalOptions, say: Callable[[str], None] = print) -> ExpansionEvaluation:
    """Ask every model, judge, and write the two files. Raises UserError, before a model is loaded, for bad
    input.
    """
    if not options.models:
        raise UserError("no model given: name a run, an adapter directory or a checkpoint.")
    places = [Path(name) for name in options.models]
    twice = sorted({str(place) for place in places if places.count(place) > 1})
    if twice:
        raise UserError(f"given more than once: {', '.join(twice)}. Name each model once.")
    _check(options)
    queries = _queries(options)
    golden = load_expansions(options.golden).val if options.golden else ()
    data = load_ranking_data(options.retrieval) if options.retrieval else None
    searched = _searched(options, data) if data else []
    asked = list(dict.fromkeys([*(q.query for q in queries), *(row.query for row in golden), *searched]))
    answers = {}
    for name, label in zip(options.models, _labels(options.models), strict=True):
        answers[label] = dict(zip(asked, Expander(name, options, say).answer(asked), strict=True))
    effects = [_effect(options, data, answers)] if data else []
    evaluation = evaluate_expansions(
        queries,
        {label: [texts[q.query] for q in queries] for label, texts in answers.items()},
        golden=golden,
        golden_answers={label: [texts[row.query] for row in golden] for label, texts in answers.items()},
        effects=effects,
    )
    options.output.mkdir(parents=True, exist_ok=True)
    for path in evaluation.write(options.output):
        say(f"written: {path}")
    return evaluation


def _check(options: EvalOptions) -> None:
    least = {"max_queries": 1, "max_tokens": 1, "batch_size": 1, "max_retrieval_queries": 1, "seed": 0}
    given = {name: getattr(options, name) for name in least}
    wrong = [
        f"--{name.replace('_', '-')} is {value}; allowed: {least[name]} or more"
        for name, value in given.items()
        if value is not None and value < least[name]
    ]
    if wrong:
        raise UserError("; ".join(wrong))
    check_writable(options.output / "expansion.json")


def _queries(options: EvalOptions) -> list[EvalQuery]:
    queries = read_queries(options.queries) if options.queries else generated_queries()
    return queries[: options.max_queries]


def _labels(models: Sequence[str]) -> list[str]:
    """Short names of the models, whole where the last parts are the same."""
    short = [Path(name).name for name in models]
    return short if len(set(short)) == len(short) else list(models)


def _searched(options: EvalOptions, data: RankingData) -> list[str]:
    qrels = chosen_qrels(data, options.split, max_queries=options.max_retrieval_queries)
    return [data.queries[query] for query in qrels]


def _effect(options: EvalOptions, data: RankingData, answers: dict[str, dict[str, str]]) -> Effect:
    encoder = None if options.encoder == "none" else load_encoder(options.encoder, "mlx")
    expanders = {
        label: lambda query, texts=texts: parse_completion(query, texts[query]).lines
        for label, texts in answers.items()
    }
    return retrieval_effect(
        data, options.split, expanders, encoder, max_queries=options.max_retrieval_queries
    )


if __name__ == "__main__":
    run_command(main)
