"""Load and check a recipe's data; compute candidates and vectors, which training then finds on disk.

example: python scripts/prepare_data.py --data ../shared/data/scifact --data.max-passage-tokens 192

Takes the settings of scripts/train.py: --config FILE, --preset NAME, --data NAME.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from common.backends import load_encoder
from common.config import parse_command
from common.errors import run_command
from common.prepare import cache_root, candidates, load_data, plan_batches, prepare, resolve_base
from common.text import PairTokenizer
from common.workflow import check_splits


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    backend: Literal["auto", "jax", "mlx"] = "auto"
    evaluate_test: bool = True
    """Prepare the test split too; without, the data need none."""


def main(argv: Sequence[str] | None = None) -> None:
    config, options = parse_command(__doc__ or "", argv, PrepareOptions)
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
