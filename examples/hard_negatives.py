"""Hard negatives: the same training on random and on mined negatives, and what the difference is worth.

    python examples/hard_negatives.py [--quick] [--data my_pairs.jsonl]

Data: pydocs, or yours. Time on 2 CPU cores: not measured yet, about two runs of examples/basic_training.py.
"""

from __future__ import annotations

from pathlib import Path

import tyro

from common.backends import load_encoder, load_scorer
from common.config import RunOptions, load_recipe
from common.data.negatives import MiningRules
from common.data.sources import load_ranking_data
from common.errors import run_command
from common.reranker.evaluation import Table, evaluate
from common.reranker.mining import mine_negatives, with_negatives
from common.reranker.prepare import cache_root, candidates
from common.reranker.workflow import cut_short, train_recipe

RECIPE = Path(__file__).parents[1] / "configs" / "quantum_resonance.py"


def main(
    data: str = "pydocs",
    base: str = "default",
    runs: Path = Path("runs"),
    margin: float = 0.05,
    quick: bool = False,
) -> Table:
    """Mine, train both ways from `base`, evaluate both over the same candidates."""
    config = load_recipe(str(RECIPE)).changed(model={"base": base}, data={"name": data, "encoder": base})
    config = cut_short(config) if quick else config
    documents, encoder = load_ranking_data(data), load_encoder(base)
    # 0.05: a negative scores at most 95 % of the positive; what is closer is often relevant, only unlabelled
    mined, lost = mine_negatives(documents, rules=MiningRules(10, relative_margin=margin), encoder=encoder)
    print(f"mined for {len(mined)} queries; left out: {lost}")
    scorers = []
    for negatives, training in (("given", with_negatives(documents, mined)), ("random", documents)):
        recipe = config.changed(name=f"example_negatives_{negatives}", data={"negatives": negatives})
        trained = train_recipe(recipe, RunOptions(runs=runs, evaluate_test=False), training)
        scorers.append(load_scorer(trained.best))
    depth = 5 if quick else 20
    stages = candidates(documents, "test", encoder, depth=depth)
    # the table's last part compares both checkpoints query by query
    return evaluate(documents, "test", stages, scorers, depth=depth, cache_dir=cache_root())


if __name__ == "__main__":
    run_command(lambda: print(tyro.cli(main, description=__doc__).text()))
