"""Basic training: a reranker from a few hundred queries, and the table that says whether it helps.

    python examples/basic_training.py [--quick] [--data my_pairs.jsonl]

Data: pydocs, or yours. Time on 2 CPU cores: about 10 minutes, as `make train`; --quick: not measured yet.
"""

from __future__ import annotations

from pathlib import Path

import tyro

from common.config import RunOptions, load_recipe
from common.errors import run_command
from common.reranker.workflow import cut_short, train_recipe

RECIPE = Path(__file__).parents[1] / "configs" / "quantum_resonance.py"


def main(data: str = "pydocs", base: str = "default", runs: Path = Path("runs"), quick: bool = False) -> Path:
    """Train from `base` on `data`; returns the folder of the checkpoint that ranks dev best."""
    config = load_recipe(str(RECIPE)).changed(
        name="example_basic", model={"base": base}, data={"name": data, "encoder": base}
    )
    config = cut_short(config) if quick else config
    trained = train_recipe(config, RunOptions(runs=runs))  # prints first stages, reranker alone and fused
    return trained.best


if __name__ == "__main__":
    run_command(lambda: print(tyro.cli(main, description=__doc__)))
