"""Training steps per second of the two backends on one CPU, in turn in one process. For information.

Both make the same steps of the real Trainer, on the same batches from the same parameters; compilation and
warm-up are left out. MLX's Linux wheel carries a slow BLAS, so `make bench` preloads OpenBLAS where it is
installed; a row says which one it was. Says nothing about a Mac's GPU.
    python benchmarks/mlx_vs_jax.py            # SciFact, about 10 minutes on 2 cores
    python benchmarks/mlx_vs_jax.py --quick    # does it run?
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, Record, compared
from common.config import DataConfig, EvalConfig, ModelConfig, RerankerConfig, TrainConfig
from common.data import lists
from common.data.sources import load_ranking_data
from common.errors import UserError, run_command
from common.prepare import Prepared
from common.retrieval.lexical import bm25_run

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    options = _options()
    config = _recipe(options)
    prepared = prepare(config, options.lists * options.steps)
    contestants = {name: contestant(name, config, prepared) for name in ("jax", "mlx")}
    seconds = measure(contestants, options.steps, options.repetitions)
    plan = contestants["jax"].trainer.plan
    batches = [plan.batch(step) for step in range(options.steps)]
    workload = {
        "data": Path(options.data).name,
        "base": options.base,
        "pairs_per_step": options.lists * options.list_size,
        "tokens_per_step": sum(int((batch.sides > 0).sum()) for batch in batches) / options.steps,
        "padded_tokens_per_step": sum(batch.sides.size for batch in batches) / options.steps,
        "steps": options.steps,
        "repetitions": options.repetitions,
        "dropout": [config.train.hidden_dropout, config.train.attention_dropout],
    }
    blas = "OpenBLAS" if "blas" in os.environ.get("LD_PRELOAD", "") else "its own BLAS"
    rates = {name: [options.steps / value for value in values] for name, values in seconds.items()}
    row = compared(f"training, MLX with {blas}", rates["mlx"], rates["jax"], "jax", "steps/s")
    Record("mlx_vs_jax", workload, device="cpu", folder=Path(options.results)).add(row, replace=True)
    print(f"{row['what']}: {row['ours']:.2f} steps/s, JAX {row['peer']:.2f}, ratio {row['ratio']:.2f}")


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A backend's Trainer; `wait` returns when what was sent off is done."""

    trainer: Any
    wait: Callable[[Any], object]

    def train(self, steps: int) -> float:
        """Seconds of the first `steps` steps of the plan."""
        start = time.perf_counter()
        for step in range(steps):
            self.trainer._one_step(step + 1, self.trainer.plan.batch(step))
        self.wait(self.trainer.state)
        return time.perf_counter() - start


def prepare(config: RerankerConfig, needed: int) -> Prepared:
    """The first `needed` training lists, BM25's negatives, and a dev split that nobody looks at."""
    data = load_ranking_data(config.data.name)
    stages = {
        split: bm25_run(data.corpus, {query: data.queries[query] for query in data.split(split)}, 50)
        for split in ("train", "dev")
    }
    made, _ = lists.build_lists(data, "train", stages["train"], config.data.negative_pool)
    if len(made) < needed:
        raise UserError(f"{config.data.name}: {len(made)} training lists, but {needed} are to be measured")
    return Prepared(data, made[:needed], {"bm25": stages["dev"]}, {}, "bm25")  # type: ignore[arg-type]


def contestant(name: str, config: RerankerConfig, prepared: Prepared) -> Contestant:
    """The Trainer of a backend, ready to take steps."""
    if name == "jax":
        import jax

        from jax_impl.training.loop import Trainer

        wait: Callable[[Any], object] = jax.block_until_ready
    else:
        try:
            from mlx_impl.training.loop import Trainer  # type: ignore[assignment]
        except ImportError:
            raise UserError("MLX is not installed here; install it with `pip install -e '.[mlx]'`") from None

        wait = lambda _: None  # noqa: E731  a step of MLX ends evaluated
    return Contestant(Trainer(config, prepared, say=lambda _: None), wait)


def measure(contestants: dict[str, Contestant], steps: int, repetitions: int) -> dict[str, list[float]]:
    """Seconds of every repetition, the backends in turn, after one that compiles every length."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for repetition in range(repetitions + 1):
        for name, one in contestants.items():
            taken = one.train(steps)
            if repetition:
                seconds[name].append(taken)
    return seconds


def _recipe(options: argparse.Namespace) -> RerankerConfig:
    return RerankerConfig(
        name="speed",
        model=ModelConfig(base=options.base),
        data=DataConfig(name=options.data, negatives="bm25", list_size=options.list_size),
        train=TrainConfig(batch_size=options.lists, epochs=0, max_steps=options.steps),
        evaluation=EvalConfig(first_stage="bm25", dev_queries=4, dev_depth=5),
    ).validate()


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    shared = Path(os.environ.get("RESONANCE_DATA") or ROOT.parent / "shared" / "data")
    parser.add_argument("--data", default=str(shared / "scifact"), help="ranking data, as --data.name")
    parser.add_argument("--base", default="default", help="the model that both begin with")
    parser.add_argument("--lists", type=int, default=4, help="lists in a step")
    parser.add_argument("--list-size", type=int, default=4, help="pairs in a list")
    parser.add_argument("--steps", type=int, default=4, help="steps in a repetition")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--results", default=str(RESULTS), help="where the JSON goes")
    parser.add_argument("--quick", action="store_true", help="one step and one repetition")
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps = options.repetitions = 1
    return options


if __name__ == "__main__":
    run_command(main)
