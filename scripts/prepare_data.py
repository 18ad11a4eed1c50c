"""Load and check a recipe's data and write what training finds on disk: of a reranker or a language model.

example: python scripts/prepare_data.py --data ../shared/data/scifact --data.max-passage-tokens 192
example: python scripts/prepare_data.py mixed --data.tokenizer llama2

Takes the settings of scripts/train.py: --config FILE, --preset NAME, --data NAME. A corpus named first
(mixed, wikitext-2, alpaca, pydocs, a file or folder) is tokenized for configs/indra.py, or for the --config
of another language model.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Literal

from common.backends import load_encoder
from common.config import RerankerConfig, parse_recipe
from common.errors import run_command
from common.expansion.sft import PreparedExpansion
from common.language.config import LanguageRecipe
from common.language.prepare import counted_tokens, plan_language
from common.language.workflow import prepare as prepare_recipe
from common.reranker.prepare import cache_root, candidates, load_data, plan_batches, prepare, resolve_base
from common.reranker.workflow import check_splits
from common.text import PairTokenizer


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    backend: Literal["auto", "jax", "mlx"] = "auto"
    evaluate_test: bool = True
    """Prepare the test split too; without, the data need none."""


def main(argv: Sequence[str] | None = None) -> None:
    words, usual = list(sys.argv[1:] if argv is None else argv), "configs/quantum_resonance.py"
    if words and not words[0].startswith("-"):
        words, usual = ["--data", *words], "configs/indra.py"
    config, options = parse_recipe(__doc__ or "", words, PrepareOptions, usual)
    if isinstance(config, LanguageRecipe):
        language(config)
    else:
        ranking(config, options)


def language(recipe: LanguageRecipe, say: Callable[[str], None] = print) -> None:
    """Corpus, tokenizer and tokens of a language model, and the size of its epoch."""
    recipe, prepared = prepare_recipe(recipe, say=say)
    documents = prepared.split("train")
    plan = plan_language(recipe, prepared, say)
    counted = int(counted_tokens(documents).sum())
    say(f"train: {len(documents.ids):,} tokens, {counted:,} of which are counted")
    train = recipe.train
    say(f"epoch: {len(plan):,} steps of {train.batch_size} x {train.unroll} x {recipe.model.context} tokens")
    if not isinstance(prepared, PreparedExpansion):  # whose rows become tokens when training begins
        say(f"tokens: {prepared.tokens}")


def ranking(config: RerankerConfig, options: PrepareOptions) -> None:
    """Data, candidates, vectors and training lists of a reranker."""
    settings = config.data
    base = resolve_base(config)
    data = load_data(settings)
    check_splits(config, data, options.evaluate_test)
    encoder = load_encoder(settings.encoder, options.backend)
    prepared = prepare(config, encoder, data)
    found = {settings.dev_split: prepared.dev}
    if options.evaluate_test:
        judged = config.evaluation.candidates == "judged"
        found[settings.test_split] = candidates(
            data, settings.test_split, encoder, judged, depth=config.evaluation.depth
        )
    for split, stages in found.items():
        print(f"candidates: {split} by {', '.join(stages)}")
    tokenizer = PairTokenizer(base, settings.max_query_tokens, settings.max_passage_tokens)
    plan = plan_batches(config, prepared, tokenizer)
    print(f"{tokenizer.truncated}; longest pair {plan.lists.longest} tokens")
    print(f"epoch: {len(plan):,} steps of {config.train.batch_size} lists of {settings.list_size}")
    print(f"lists: {prepared.training.directory}\ncandidates and vectors: {cache_root()}")


if __name__ == "__main__":
    run_command(main)
