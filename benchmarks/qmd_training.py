"""SFT beside mlx_lm.lora and GRPO beside mlx-lm-lora: one model, the same rows, equal lengths, in one run.

A random Qwen3 of --size, generated rows, LoRA of rank 16 on the seven projections. SFT is measured in target
tokens a second, each side with its own batches: ours in length buckets, and packed. GRPO in completions a
second: nothing ends a completion, so both sides write equally many tokens. The peers stand in processes of
their own; the sides take turns. On Linux this measures MLX's CPU backend, not a Mac.
    python benchmarks/qmd_training.py          # needs mlx-lm-lora: pip install mlx-lm-lora==5.10.2
    python benchmarks/qmd_training.py --quick  # does it run?
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.peer import Peer, answer_all
from benchmarks.record import RESULTS, Record, compared
from common.data.expansion import load_expansions
from common.errors import UserError, run_command
from common.expansion.config import GrpoConfig, SftConfig
from common.expansion.prompts import ExpansionPrompts, load_tokenizer
from common.expansion.tiny_qwen import tiny_base

SIZES = {
    "small": {},
    "medium": {
        **{"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6},
        **{"num_attention_heads": 8, "num_key_value_heads": 4},
    },
}
RANK, ALPHA, RATE, SEED = 16, 32.0, 1e-4, 0
Contest = dict[str, list[float]]


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    if importlib.util.find_spec("mlx_lm") is None:
        raise UserError("MLX is not installed here; install it with `pip install -e '.[mlx]'`.")
    workload = {name: value for name, value in vars(options).items() if name != "results"}
    record = Record("qmd_training", workload, device="cpu", folder=Path(options.results))
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder) / "base", options.size)
        rows = sft_rows(base, options) + (grpo_rows(base, options) if options.grpo else [])
    record.add(*rows, replace=True)
    for row in rows:
        print(f"{row['what']}: {row['ours']:.4g}, {row['peer_name']} {row['peer']:.4g} {row['unit']}, "
              f"ratio {row['ratio']:.2f}")  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument(
        "--system", choices=["mixed", "none"], default="mixed", help="QMD's system prompt, as in the recipes"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="rows of an SFT step")
    parser.add_argument("--steps", type=int, default=20, help="SFT steps of a repetition")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of a GRPO step")
    parser.add_argument("--group", type=int, default=4, help="completions of a prompt")
    parser.add_argument("--tokens", type=int, default=200, help="length of a completion")
    parser.add_argument("--grpo-steps", type=int, default=3, help="GRPO steps of a repetition")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--no-grpo", dest="grpo", action="store_false", help="SFT alone")
    parser.add_argument("--quick", action="store_true", help="few steps of few rows")
    parser.add_argument("--results", default=str(RESULTS))
    options = parser.parse_args(argv)
    if options.quick:
        options.batch_size, options.steps, options.repetitions = 2, 2, 1
        options.prompts, options.group, options.tokens, options.grpo_steps = 2, 2, 4, 1
    del options.quick
    if options.grpo and importlib.util.find_spec("mlx_lm_lora") is None:
        raise UserError("mlx-lm-lora is not installed; `pip install mlx-lm-lora==5.10.2`, or --no-grpo.")
    return options


def make_base(directory: Path, size: str) -> Path:
    """A random Qwen3 whose tokenizer knows the generated rows."""
    return tiny_base(directory, load_expansions("generated"), SEED, SIZES[size])


def sft_rows(base: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Target tokens a second and peak memory, in buckets and packed."""
    found: list[dict[str, Any]] = []
    with Peer(serve, str(base), vars(options)) as peer:
        ours = {"length buckets": OurSft(base, options, False), "packed": OurSft(base, options, True)}
        rates: Contest = {name: [] for name in (*ours, "peer")}
        memory: Contest = {name: [] for name in rates}
        for _ in range(options.repetitions):
            for name, side in ours.items():
                _note(rates, memory, name, side.run())
            _note(rates, memory, "peer", peer.run("sft", None))
    for name in ours:
        more = {"peer_name": "mlx_lm.lora"}
        found.append(compared(f"SFT, {name}", rates[name], rates["peer"], unit="target tokens/s", **more))
        found.append(
            compared(
                f"SFT, {name}: peak memory",
                *(memory[name], memory["peer"]),
                unit="MB",
                higher_is_better=False,
                **more,
            )
        )
    return found


def grpo_rows(base: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Completions a second at equal lengths, and peak memory."""
    with Peer(serve, str(base), vars(options)) as peer:
        side = OurGrpo(base, options)
        rates: Contest = {"ours": [], "peer": []}
        memory: Contest = {"ours": [], "peer": []}
        for _ in range(options.repetitions):
            _note(rates, memory, "ours", side.run())
            _note(rates, memory, "peer", peer.run("grpo", None))
    name = "mlx-lm-lora"
    return [
        compared("GRPO", rates["ours"], rates["peer"], name, "completions/s"),
        compared(
            "GRPO: peak memory", memory["ours"], memory["peer"], name, "MB", higher_is_better=False
        ),
    ]  # fmt: skip


def _note(rates: Contest, memory: Contest, name: str, measured: tuple[float, float]) -> None:
    rates[name].append(measured[0])
    memory[name].append(measured[1])


class OurSft:
    """SftTrainer, stepped by hand; `run` returns target tokens a second and the peak in MB."""

    def __init__(self, base: Path, options: argparse.Namespace, packed: bool) -> None:
        from mlx_impl.training.sft import SftTrainer

        config, data = SftConfig(), load_expansions("generated")
        size = max(1, options.batch_size // 3) if packed else options.batch_size  # about the same tokens
        training = replace(
            config.training, epochs=1000.0, batch_size=size, gradient_accumulation_steps=1, packing=packed
        )
        training = replace(training, learning_rate=RATE)
        config = replace(config, training=training, prompt=replace(config.prompt, system=options.system))
        loaded, prompts = _adapted(base, options.system)
        self.trainer = SftTrainer(config, loaded, prompts, data, say=lambda _: None)
        self.trainer.model.train()
        self.steps, self.done = options.steps, 0
        self.run()  # compiles

    def run(self) -> tuple[float, float]:
        import mlx.core as mx

        mx.reset_peak_memory()
        start, tokens = time.perf_counter(), 0.0
        for step in range(self.done + 1, self.done + self.steps + 1):
            tokens += self.trainer.train_step(step)["tokens"]
        self.done += self.steps
        return tokens / (time.perf_counter() - start), mx.get_peak_memory() / 1e6


class OurGrpo:
    """GrpoTrainer, likewise; `run` returns completions a second and the peak in MB."""

    def __init__(self, base: Path, options: argparse.Namespace) -> None:
        from mlx_impl.training.grpo import GrpoTrainer

        config = GrpoConfig()
        completions = options.prompts * options.group
        config = replace(
            config,
            prompt=replace(config.prompt, system=options.system),
            training=replace(
                config.training,
                **{"epochs": 1000.0, "max_steps": None, "batch_size": options.prompts},
                **{"gradient_accumulation_steps": options.group, "learning_rate": RATE},
            ),
            grpo=replace(config.grpo, num_generations=options.group, max_completion_length=options.tokens),
        )
        assert config.completions == completions
        loaded, prompts = _adapted(base, options.system)
        prompts.end_id = -1  # nothing ends a completion
        rows = load_expansions("generated").train
        rewards = {"vowels": (1.0, lambda pairs: [vowels(text) for _, text in pairs])}
        queries = [row.query for row in rows]
        self.trainer = GrpoTrainer(
            config, loaded, prompts, queries, queries[:1], rewards, data_name="generated", say=lambda _: None
        )
        self.trainer.folder = _Nowhere()  # type: ignore[assignment]
        self.trainer.model.train()
        self.steps, self.done, self.completions = options.grpo_steps, 0, completions
        self.length = float(options.tokens)
        self.run()

    def run(self) -> tuple[float, float]:
        import mlx.core as mx

        mx.reset_peak_memory()
        start = time.perf_counter()
        for step in range(self.done + 1, self.done + self.steps + 1):
            logged = self.trainer.train_step(step)
            _same_length(logged["length"], self.length)
        self.done += self.steps
        return self.steps * self.completions / (time.perf_counter() - start), mx.get_peak_memory() / 1e6


class _Nowhere:
    """A run's folder without a past, for the trainer's look at earlier steps."""

    def read_metrics(self, kind: str) -> list[dict[str, float]]:
        return []


def vowels(text: str) -> float:
    """A reward that differs between completions of a random model: the share of vowels."""
    return sum(text.count(letter) for letter in "aeiou") / max(1, len(text))


def _same_length(found: float, wanted: float) -> None:
    if found != wanted:
        raise UserError(f"completions of {found} tokens instead of {wanted}: the two sides differ.")


def _adapted(base: Path, system: Any) -> tuple[Any, ExpansionPrompts]:
    from common.expansion.config import LoraConfig
    from mlx_impl.models.qwen import Origin, add_lora, load_base

    loaded = load_base(Origin(base))
    add_lora(loaded, LoraConfig(rank=RANK, alpha=ALPHA), SEED)
    return loaded, ExpansionPrompts(load_tokenizer(base), system=system)


# --- the peers, in their own processes ---


def reporting(callback: type) -> Any:
    """A callback of either library that keeps what it is told of training, in `reports`."""

    class Kept(callback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.reports: list[dict[str, float]] = []

        def on_train_loss_report(self, train_info: dict[str, float]) -> None:
            self.reports.append(train_info)

    return Kept()


def serve(connection: Any, base: str, options: dict[str, Any]) -> None:
    """Answer ("sft" or "grpo", None) with what `run` of our side returns."""
    sides: dict[str, Any] = {}
    kinds = {"sft": TheirSft, "grpo": TheirGrpo}

    def run(kind: str, _: Any) -> tuple[float, float]:
        if kind not in sides:
            sides[kind] = kinds[kind](Path(base), argparse.Namespace(**options))
        return sides[kind].run()

    answer_all(connection, run)


class TheirSft:
    """mlx_lm.lora's trainer on the same rows, with its own order and padding of batches."""

    def __init__(self, base: Path, options: argparse.Namespace) -> None:
        from mlx_lm.tuner.datasets import CacheDataset

        loaded, prompts = _adapted(base, options.system)
        self.model, self.options = loaded.model, options
        examples = [prompts.example(row, i) for i, row in enumerate(load_expansions("generated").train)]

        class Rows(list):
            def process(self, row: Any) -> Any:
                return row

        self.data = CacheDataset(Rows((list(example.ids), example.start) for example in examples))
        self.run()

    def run(self) -> tuple[float, float]:
        import mlx.core as mx
        import mlx.optimizers as optim
        from mlx_lm.tuner.callbacks import TrainingCallback
        from mlx_lm.tuner.trainer import TrainingArgs, train

        kept = reporting(TrainingCallback)
        mx.reset_peak_memory()
        steps = self.options.steps
        with tempfile.TemporaryDirectory() as folder:
            settings = TrainingArgs(
                batch_size=self.options.batch_size,
                iters=2 * steps,  # the first half compiles
                steps_per_report=steps,
                steps_per_save=10**9,
                max_seq_length=512,
                adapter_file=str(Path(folder) / "adapters.safetensors"),
            )
            train(
                self.model, optim.AdamW(RATE), self.data, None, settings, training_callback=kept
            )  # fmt: skip
        return float(kept.reports[-1]["tokens_per_second"]), mx.get_peak_memory() / 1e6


class TheirGrpo:
    """mlx-lm-lora's trainer: the same prompts, group, length, reward and beta, which takes a second model."""

    def __init__(self, base: Path, options: argparse.Namespace) -> None:
        from mlx_lm.tokenizer_utils import TokenizerWrapper

        from mlx_impl.models.qwen import Origin, load_base

        loaded, prompts = _adapted(base, options.system)
        self.model, self.options = loaded.model, options
        self.reference = load_base(Origin(base)).model
        tokenizer = load_tokenizer(base)
        self.tokenizer = TokenizerWrapper(tokenizer)
        self.tokenizer.eos_token_ids = [10**9]  # nothing ends a completion
        rows = load_expansions("generated").train
        self.data = [
            (prompts.prompt(row.query, consumer=options.system != "none"), [0], row.query, "", None)
            for row in rows
        ]
        self.run()

    def run(self) -> tuple[float, float]:
        import mlx.core as mx
        import mlx.optimizers as optim
        from mlx_lm_lora.trainer.grpo_trainer import GRPOTrainingArgs, train_grpo
        from mlx_lm_lora.trainer.sft_trainer import TrainingCallback

        kept = reporting(TrainingCallback)

        def share_of_vowels(prompts: Any, completions: Any, answer: Any, types: Any = None) -> list[float]:
            return [vowels(text) for text in completions]

        mx.reset_peak_memory()
        options = self.options
        with tempfile.TemporaryDirectory() as folder:
            settings = GRPOTrainingArgs(
                batch_size=options.prompts,
                iters=2 * options.grpo_steps,
                steps_per_report=options.grpo_steps,
                steps_per_save=10**9,
                max_seq_length=512,
                adapter_file=str(Path(folder) / "adapters.safetensors"),
                group_size=options.group,
                max_completion_length=options.tokens,
                **{"beta": 0.04, "epsilon": 0.2, "temperature": 1.0, "top_p": 1.0, "top_k": 0},
            )
            train_grpo(
                self.model,
                self.reference,
                self.tokenizer,
                optim.AdamW(RATE),
                self.data,
                reward_funcs=[share_of_vowels],
                args=settings,
                training_callback=kept,
                end_answer_token="",
            )
        _same_length(kept.reports[-1]["train_average_generated_tokens"], float(options.tokens))
        rate = kept.reports[-1]["iterations_per_second"] * options.prompts * options.group
        return rate, mx.get_peak_memory() / 1e6


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    run_command(main)
