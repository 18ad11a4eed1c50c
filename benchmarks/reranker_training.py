"""Speed of training and scoring a reranker, beside sentence-transformers on the same pairs in the same run.

Ours is a step of the real Trainer on the batches of ListPlan; the peer is what CrossEncoderTrainer does in
a step: random batches, padded to their longest pair, BinaryCrossEntropyLoss, clipping, fused AdamW. It runs
in a process of its own; the two take turns. Both begin with texts cut to the same limits, and only real
tokens count. Compilation and warm-up are left out. On GPU both compute in bfloat16.
    python benchmarks/reranker_training.py            # SciFact, about 10 minutes on 2 cores
    python benchmarks/reranker_training.py --quick    # does it run?
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peer import Peer, answer_all
from benchmarks.record import RESULTS, Record, compared, device_name
from common.config import DataConfig, EvalConfig, ModelConfig, RerankerConfig, TrainConfig
from common.errors import UserError, run_command

if TYPE_CHECKING:
    from common.reranker.prepare import Prepared

ROOT = Path(__file__).resolve().parents[1]
PEER = "sentence-transformers"
PEAK = {"h100": 989e12, "h200": 989e12, "a100": 312e12}  # bfloat16 FLOP/s without sparsity, by the makers
Pairs = list[tuple[str, str, float]]  # query, passage, label


def main() -> None:
    options = speed_options(__doc__)
    config = speed_recipe(options, options.steps * options.repetitions)
    ours = Ours(config, options)
    windows = [ours.window(i) for i in range(options.repetitions)]
    workload = {
        "data": Path(options.data).name,
        "pairs": sum(len(window.pairs) for window in windows),
        "real_tokens": sum(window.tokens for window in windows),
        "pairs_per_step": options.lists * options.list_size,
        "token_limits": [config.data.max_query_tokens, config.data.max_passage_tokens],
        "dropout": {"hidden": config.train.hidden_dropout, "attention": config.train.attention_dropout},
        "repetitions": options.repetitions,
        "base": options.base,
    }
    record = Record("reranker_training", workload, folder=Path(options.results))
    rates, size = (config.train.hidden_dropout, config.train.attention_dropout), workload["pairs_per_step"]
    with Peer(serve_peer, str(ours.directory), rates, config.train.learning_rate, size) as peer:
        for row in measure(ours, peer, windows):
            record.add(row, replace=True)
            print(f"{row['what']}: {row['ours']:,.0f} against {row['peer']:,.0f} {row['unit']}, "
                  f"ratio {row['ratio']:.2f}", flush=True)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Window:
    """The pairs of one repetition: `steps` batches of the plan, beginning at `first`."""

    first: int
    steps: int
    pairs: Pairs
    tokens: int  # real ones
    forward_flops: float  # of the real tokens, in the encoder's layers


def measure(ours: Ours, peer: Peer, windows: Sequence[Window]) -> list[dict[str, Any]]:
    """Rows of training and scoring: each repetition runs every contestant on one window, in turn."""
    for window in windows:  # every shape once
        ours.train(window)
        ours.score(window)
    for kind in ("train", "train_default", "score"):
        peer.run(kind, windows[0].pairs)
    seconds: dict[str, list[float]] = {}
    for window in windows:
        for kind, run in (("train", ours.train), ("score", ours.score)):
            seconds.setdefault("ours " + kind, []).append(run(window))
        for kind in ("train", "train_default", "score"):
            seconds.setdefault("peer " + kind, []).append(peer.run(kind, window.pairs))

    def row(what: str, mine: str, theirs: str, passes: int) -> dict[str, Any]:
        def per_second(name: str, amount: Callable[[Window], float]) -> list[float]:
            return [amount(w) / s for w, s in zip(windows, seconds[name], strict=True)]

        made = compared(
            what,
            per_second("ours " + mine, lambda w: w.tokens),
            per_second("peer " + theirs, lambda w: w.tokens),
            PEER,
            "real tokens/s",
        )
        pairs = sum(len(w.pairs) for w in windows) / sum(w.tokens for w in windows)
        made["pairs_per_second"] = {side: made[side] * pairs for side in ("ours", "peer")}
        if device_name() in PEAK:
            flops = sum(w.forward_flops for w in windows) / sum(w.tokens for w in windows) * passes
            made["model_flop_utilisation"] = {
                side: made[side] * flops / PEAK[device_name()] for side in ("ours", "peer")
            }
        return made

    return [
        row("training, the same dropout", "train", "train", 3),
        row("training, the peer with its own dropout", "train", "train_default", 3),
        row("scoring", "score", "score", 1),
    ]


class Ours:
    """The Trainer of a recipe, stepped by hand."""

    def __init__(self, config: RerankerConfig, options: argparse.Namespace) -> None:
        from common.hub import resolve_model
        from jax_impl.training.loop import Trainer

        prepared = bm25_lists(config, options.lists * options.steps * options.repetitions)
        self.directory = resolve_model(config.model.base, say=lambda _: None)
        self.trainer = Trainer(config, prepared, say=lambda _: None)
        self.steps = options.steps

    def window(self, number: int) -> Window:
        """The pairs of repetition `number`, as texts that both sides tokenize again."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.directory)
        pairs: Pairs = []
        lengths: list[int] = []
        first = number * self.steps
        for step in range(first, first + self.steps):
            batch = self.trainer.plan.batch(step)
            for b, c in zip(*batch.mask.nonzero(), strict=True):
                ids, sides = batch.input_ids[b, c], batch.sides[b, c]
                texts = [
                    tokenizer.decode(ids[sides == side].tolist(), skip_special_tokens=True) for side in (1, 2)
                ]
                pairs.append((texts[0], texts[1], float(batch.labels[b, c] > 0)))
                lengths.append(int((sides > 0).sum()))
        bert = self.trainer.loaded.model.encoder.config
        weights = 4 * bert.hidden_size**2 + 2 * bert.hidden_size * bert.intermediate_size
        flops = sum(2 * n * weights + 4 * n * n * bert.hidden_size for n in lengths) * bert.num_hidden_layers
        return Window(first, self.steps, pairs, sum(lengths), float(flops))

    def train(self, window: Window) -> float:
        """Seconds of the window's steps; tokenizing, which the Trainer does once, is counted in."""
        import jax

        start = time.perf_counter()
        self.trainer.tokenizer.encode_pairs([p[0] for p in window.pairs], [p[1] for p in window.pairs])
        for step in range(window.first, window.first + window.steps):
            self.trainer._one_step(step + 1, self.trainer.plan.batch(step))
        jax.block_until_ready(self.trainer.state)
        return time.perf_counter() - start

    def score(self, window: Window) -> float:
        """Seconds to score the window's pairs, from texts to numbers."""
        scorer = self.trainer.scorer()
        start = time.perf_counter()
        scorer.score([p[0] for p in window.pairs], [p[1] for p in window.pairs])
        return time.perf_counter() - start


def serve_peer(
    connection: Connection, directory: str, rates: tuple[float, float], learning_rate: float, size: int
) -> None:
    """The peer's process: takes (kind, pairs) and answers with seconds.

    Kinds: `train` with our dropout, `train_default` with its own, `score`.
    """
    import torch
    from sentence_transformers import CrossEncoder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = {"dtype": torch.bfloat16} if device == "cuda" else {}
    same = {"hidden_dropout_prob": rates[0], "attention_probs_dropout_prob": rates[1]}
    trained = {}
    for kind, settings in (("train", same), ("train_default", {})):
        model = CrossEncoder(directory, num_labels=1, device=device, config_kwargs=dict(settings))
        trained[kind] = peer_step(model, learning_rate)
    scorer = CrossEncoder(directory, num_labels=1, device=device, model_kwargs=half)

    def took(kind: str, pairs: Pairs) -> float:
        random.Random(0).shuffle(pairs)
        start = time.perf_counter()
        if kind == "score":
            scorer.predict([(query, passage) for query, passage, _ in pairs], show_progress_bar=False)
        else:
            for first in range(0, len(pairs), size):
                trained[kind](pairs[first : first + size])
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    answer_all(connection, took)


def peer_step(model: Any, learning_rate: float) -> Callable[[Pairs], None]:
    """A training step as CrossEncoderTrainer takes it with its default settings (bf16=True on GPU)."""
    import torch
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    loss = BinaryCrossEntropyLoss(model)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True)

    def step(pairs: Pairs) -> None:
        queries, passages, labels = zip(*pairs, strict=True)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            value = loss([queries, passages], torch.tensor(labels, device=model.device))
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def bm25_lists(config: RerankerConfig, needed: int) -> Prepared:
    """Training lists with BM25's negatives, at least `needed`, and a dev split that nobody looks at."""
    from common.data import lists
    from common.data.sources import load_ranking_data
    from common.reranker.prepare import Prepared
    from common.retrieval.lexical import bm25_run

    data = load_ranking_data(config.data.name)
    stages = {
        split: bm25_run(data.corpus, {query: data.queries[query] for query in data.split(split)}, 50)
        for split in ("train", "dev")
    }
    made, _ = lists.build_lists(data, "train", stages["train"], config.data.negative_pool)
    if len(made) < needed:
        raise UserError(f"{config.data.name}: {len(made)} training lists, but {needed} are to be measured")
    return Prepared(data, made, {"bm25": stages["dev"]}, {}, "bm25")  # type: ignore[arg-type]


def speed_recipe(options: argparse.Namespace, steps: int) -> RerankerConfig:
    """The recipe whose steps are timed."""
    return RerankerConfig(
        name="speed",
        model=ModelConfig(base=options.base),
        data=DataConfig(name=options.data, negatives="bm25", list_size=options.list_size),
        train=TrainConfig(batch_size=options.lists, epochs=0, max_steps=steps),
        evaluation=EvalConfig(first_stage="bm25", dev_queries=4, dev_depth=5),
    ).validate()


def speed_options(description: str | None, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of a benchmark that times training steps, from its docstring's first line. UserError for
    those out of range."""
    parser = argparse.ArgumentParser(
        description=(description or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
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
    least = {"lists": 1, "list_size": 2, "steps": 1, "repetitions": 1}
    wrong = [
        f"--{name.replace('_', '-')} is {getattr(options, name)}; allowed: >= {allowed}"
        for name, allowed in least.items()
        if getattr(options, name) < allowed
    ]
    if wrong:
        raise UserError("; ".join(wrong))
    return options


if __name__ == "__main__":
    run_command(main)
