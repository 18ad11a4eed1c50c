"""Training steps per second of the two backends on one CPU, in turn in one process. For information.

Both make the same steps of the real Trainer, on the same batches from the same parameters; compilation and
warm-up are left out. MLX's Linux wheel carries a slow BLAS, so `make bench` preloads OpenBLAS where it is
installed; a row says which one it was. Says nothing about a Mac's GPU.
    python benchmarks/mlx_vs_jax.py            # SciFact, about 10 minutes on 2 cores
    python benchmarks/mlx_vs_jax.py --quick    # does it run?
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.record import Record, compared
from benchmarks.reranker_training import bm25_lists, speed_options, speed_recipe
from common.config import RerankerConfig
from common.errors import UserError, run_command
from common.reranker.prepare import Prepared


def main() -> None:
    options = speed_options(__doc__)
    config, needed = speed_recipe(options, options.steps), options.lists * options.steps
    prepared = bm25_lists(config, needed)
    prepared = dataclasses.replace(prepared, training=prepared.training[:needed])  # what both repeat
    contestants = {name: contestant(name, config, prepared) for name in ("jax", "mlx")}
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
    record = Record("mlx_vs_jax", workload, device="cpu", folder=Path(options.results))
    seconds = measure(contestants, options.steps, options.repetitions)
    blas = "OpenBLAS" if "blas" in os.environ.get("LD_PRELOAD", "") else "its own BLAS"
    rates = {name: [options.steps / value for value in values] for name, values in seconds.items()}
    row = compared(f"training, MLX with {blas}", rates["mlx"], rates["jax"], "jax", "steps/s")
    record.add(row, replace=True)
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


if __name__ == "__main__":
    run_command(main)
