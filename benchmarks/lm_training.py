"""Speed of training a language model, beside a plain PyTorch GPT of the same shape on the same tokens.

Ours is a step of the real LanguageTrainer with its batches; the peer is nanoGPT's step: learned positions,
GELU of four widths, flash attention, tied head, the same dropout, clipping, fused AdamW. It runs in a process
of its own and the two take turns. Compilation and warm-up are left out. On GPU both compute in bfloat16.
CPU seconds stand beside the rates. Measure on an idle machine: PyTorch's threads spin while they wait for a
busy core, which inflates both its times.
    python benchmarks/lm_training.py            # the recipe infinito_small: plain, with memory; indra
    python benchmarks/lm_training.py --quick    # does it run?
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peer import Peer, answer_all
from benchmarks.record import RESULTS, Record, Row, compared
from common.config import load_recipe
from common.errors import UserError, run_command
from common.language.config import InfinitoRecipe, LanguageRecipe
from common.language.prepare import prepare_language

ROOT = Path(__file__).resolve().parents[1]
PEER = "PyTorch GPT"
MODELS = ("transformer", "infinito", "indra")
Took = tuple[float, float]  # seconds by the clock, of the processor


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the peer is built from."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    inner: int  # of two matrices: as many parameters as the three of a SwiGLU
    context: int
    dropout: float
    learning_rate: float


def main(argv: Sequence[str] | None = None) -> None:
    options = parsed(argv)
    workload = {name: getattr(options, name) for name in ("data", "steps", "repetitions", "batch_size")}
    if options.recipe != "infinito_small":
        workload["recipe"] = options.recipe
    record = Record("lm_training", workload, folder=Path(options.results))
    for name in options.models:
        row = measure(name, options)
        record.add(row, replace=True)
        print(
            f"{row['what']}: {row['ours']:,.0f} against {row['peer']:,.0f} {row['unit']}, ratio "
            f"{row['ratio']:.2f}; by CPU time {row['cpu_ratio']:.2f}",
            flush=True,
        )


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", default="pydocs", help="a corpus, as train.py's --data.name")
    parser.add_argument(
        "--recipe", default="infinito_small", choices=("infinito_small", "infinito"), help="small or 71 M"
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--steps", type=int, default=3, help="steps in a repetition")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--batch-size", type=int, default=None, help="rows of a step; the recipe's when absent"
    )
    parser.add_argument("--results", default=str(RESULTS), help="where the JSON goes")
    parser.add_argument("--quick", action="store_true", help="tiny models, one step, one repetition")
    options = parser.parse_args(argv)
    if options.quick:
        options.steps = options.repetitions = 1
    if min(options.steps, options.repetitions) < 1:
        raise UserError("--steps and --repetitions: at least 1")
    return options


def speed_recipe(name: str, options: argparse.Namespace) -> LanguageRecipe:
    """The recipe whose steps are timed."""
    file, preset = ("indra.py", "small") if name == "indra" else (f"{options.recipe}.py", None)
    recipe: Any = load_recipe(str(ROOT / "configs" / file), preset)
    if name == "transformer":
        recipe = recipe.changed(model={"architecture": "transformer"})
    train: dict[str, Any] = {"epochs": 0.0, "max_steps": options.steps * (options.repetitions + 1)}
    if options.batch_size:
        train["batch_size"] = options.batch_size
    changes: dict[str, Any] = {"name": "speed", "train": train, "data": {"name": options.data}}
    if options.quick:
        tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        changes["model"] = {**tiny, "context": 16}
        changes["data"] |= {"vocab_size": 512}
    made: LanguageRecipe = recipe.changed(**changes).validate()
    return made


def measure(name: str, options: argparse.Namespace) -> Row:
    """A row: each repetition runs both on the tokens of the same steps, in turn."""
    recipe = speed_recipe(name, options)
    ours = Ours(recipe)
    steps = [range(n * options.steps, (n + 1) * options.steps) for n in range(options.repetitions + 1)]
    tokens = [ours.tokens(window) for window in steps]
    mine: list[Took] = []
    theirs: list[Took] = []
    with Peer(serve_peer, dataclasses.asdict(ours.shape)) as peer:
        for window, ids in zip(steps, tokens, strict=True):
            mine.append(ours.train(window))
            theirs.append(peer.run("train", ids))
    counts = [sum(a.size for a in ids) for ids in tokens][1:]  # the first compiles and warms up

    def rates(took: list[Took], which: int) -> list[float]:
        return [count / t[which] for count, t in zip(counts, took[1:], strict=True)]

    cpu = {"ours": rates(mine, 1), "peer": rates(theirs, 1)}
    ratio = float(np.median(cpu["ours"]) / np.median(cpu["peer"]))
    what = f"training, {name}"
    made = compared(what, rates(mine, 0), rates(theirs, 0), PEER, "tokens/s", cpu_ratio=ratio)
    parameters = {"ours": ours.parameters, "peer": parameter_count(ours.shape)}
    return {**made, "tokens_per_cpu_second": cpu, "parameters": parameters}


class Ours:
    """The LanguageTrainer of a recipe, stepped by hand."""

    def __init__(self, recipe: LanguageRecipe) -> None:
        from common.language.architectures import parameter_count
        from jax_impl.training.language import LanguageTrainer

        self.trainer = LanguageTrainer(recipe, prepare_language(recipe, say=_quiet), say=_quiet)
        config = self.trainer.model_config
        self.parameters = parameter_count(config)
        blocks: Any = recipe.model.blocks()
        self.shape = Shape(
            vocab_size=config.vocab_size,
            width=blocks.hidden_size,
            layers=blocks.num_hidden_layers,
            heads=blocks.num_attention_heads,
            inner=round(1.5 * blocks.intermediate_size),
            context=blocks.context,
            dropout=blocks.hidden_dropout if isinstance(recipe, InfinitoRecipe) else 0.0,
            learning_rate=recipe.train.learning_rate,
        )

    def tokens(self, steps: range) -> list[np.ndarray]:
        """What the steps read and are to say, each [2, rows, context]."""
        found = []
        for step in steps:
            batch = self.trainer.plan.batch(step)
            pair = np.stack((batch.input_ids, batch.labels))
            found.append(pair.reshape(2, -1, pair.shape[-1]))
        return found

    def train(self, steps: range) -> Took:
        """What these steps take."""
        import jax

        wall, cpu = time.perf_counter(), time.process_time()
        for step in steps:
            self.trainer._one_step(step + 1, self.trainer.plan.batch(step))
        jax.block_until_ready(self.trainer.state)
        return time.perf_counter() - wall, time.process_time() - cpu


def serve_peer(connection: Connection, settings: dict[str, Any]) -> None:
    """The peer's process: takes (kind, batches) and answers with what the steps took."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = gpt(Shape(**settings)).to(device).train()
    rate = settings["learning_rate"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1, fused=True)

    def train(_: str, batches: list[np.ndarray]) -> Took:
        wall, cpu = time.perf_counter(), time.process_time()
        for pair in batches:
            ids, labels = torch.from_numpy(pair.astype(np.int64)).to(device)
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1).float(), labels.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - wall, time.process_time() - cpu

    answer_all(connection, train)


def gpt(shape: Shape) -> Any:
    """A GPT-2 as nanoGPT writes it, without biases."""
    import torch
    from torch import nn

    functional = nn.functional

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width = shape.width
            self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
            self.c_attn, self.c_proj = nn.Linear(width, 3 * width, False), nn.Linear(width, width, False)
            self.c_fc = nn.Linear(width, shape.inner, False)
            self.mlp_proj = nn.Linear(shape.inner, width, False)

        def forward(self, x: Any) -> Any:
            query, key, value = (
                part.unflatten(-1, (shape.heads, -1)).transpose(1, 2)
                for part in self.c_attn(self.ln_1(x)).chunk(3, dim=-1)
            )
            context = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            context = self.c_proj(context.transpose(1, 2).flatten(2))
            x = x + functional.dropout(context, shape.dropout, self.training)
            inner = self.mlp_proj(functional.gelu(self.c_fc(self.ln_2(x))))
            return x + functional.dropout(inner, shape.dropout, self.training)

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte = nn.Embedding(shape.vocab_size, shape.width)
            self.wpe = nn.Embedding(shape.context, shape.width)
            self.h = nn.ModuleList([Block() for _ in range(shape.layers)])
            self.ln_f = nn.LayerNorm(shape.width, bias=False)
            for parameter in self.parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=0.02)

        def forward(self, ids: Any) -> Any:
            places = torch.arange(ids.shape[1], device=ids.device)
            x = functional.dropout(self.wte(ids) + self.wpe(places), shape.dropout, self.training)
            for block in self.h:
                x = block(x)
            return functional.linear(self.ln_f(x), self.wte.weight)

    return GPT()


def parameter_count(shape: Shape) -> int:
    """Of the peer."""
    layer = 4 * shape.width**2 + 2 * shape.width * shape.inner + 2 * shape.width
    return (shape.vocab_size + shape.context + 1) * shape.width + shape.layers * layer


def _quiet(_: str) -> None:
    """Nothing is said while speed is measured."""


if __name__ == "__main__":
    run_command(main)
