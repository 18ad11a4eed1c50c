"""The training loop of a language model's adapter: steps, evaluation, best and final adapters, exact resume.

A subclass says what a step and an evaluation are (training/sft.py, training/grpo.py). What is random in a
step depends on the seed and its number alone, so that a run goes on bit for bit where it stopped. No twin
yet.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_map

from common.checkpoint import TRAINING_FILE, to_json, write_directory
from common.config import TrainConfig, to_dict
from common.errors import UserError, out_of_memory
from common.expansion.config import GrpoConfig, SftConfig
from common.progress import progress
from common.runs import RunFolder, environment
from common.training import interruptible
from mlx_impl.models.qwen import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    LanguageModel,
    adapter_config,
    adapter_tensors,
    write_tensors,
)
from mlx_impl.scoring import accelerator
from mlx_impl.training.optimizer import global_norm, learning_rate
from mlx_impl.training.state import StateFolder

Logged = dict[str, float]


class AdapterState:
    """All that changes in training: what learns in `model`, its optimizer, the number of steps done."""

    def __init__(self, model: Any, optimizer: optim.Optimizer) -> None:
        self.model, self.optimizer, self.step = model, optimizer, 0
        self._learned: Any = model.trainable_parameters()
        optimizer.init(self._learned)

    def arrays(self) -> list[Any]:
        """The trees that a state on disk holds."""
        return [self._learned, self.optimizer.state]

    def save(self, states: StateFolder, notes: dict[str, Any]) -> None:
        """Write the state of this step."""
        self._learned = self.model.trainable_parameters()
        states.save(self, notes)

    def load(self, states: StateFolder) -> dict[str, Any]:
        """Take the latest state; returns its notes."""
        self._learned = self.model.trainable_parameters()
        _, notes = states.load(self)
        self.model.update(self._learned)
        step = states.latest()
        assert step is not None
        self.step = step
        return notes


class AdapterTrainer:
    """One run. `run(folder)` starts it, or goes on where an interrupted one stopped.

    `loaded` holds the model with the adapter that learns; `steps` counts the calls of `train_step`, of
    `updates` optimizer steps each.
    """

    evaluates_start = False

    def __init__(
        self,
        config: SftConfig | GrpoConfig,
        loaded: LanguageModel,
        data: Mapping[str, Any],
        steps: int,
        *,
        updates: int = 1,
        say: Callable[[str], None] = print,
    ) -> None:
        self.config, self.loaded, self.steps, self.say = config, loaded, steps, say
        self.model, self.data = loaded.model, data
        training = config.training
        self.rate = learning_rate(
            TrainConfig(
                learning_rate=training.learning_rate,
                warmup=training.warmup_ratio,
                schedule=training.lr_scheduler,
            ),
            steps * updates,
        )
        optimizer = optim.AdamW(
            self.rate, betas=[0.9, 0.999], eps=1e-8, weight_decay=training.weight_decay, bias_correction=True
        )
        self.state = AdapterState(self.model, optimizer)
        self.update = make_update(self.model, optimizer, training.max_grad_norm)

    def learned(self) -> list[tuple[str, mx.array]]:
        """What learns, by name."""
        return sorted(adapter_tensors(self.loaded).items())

    def train_step(self, step: int) -> Logged:
        """One step, numbered from 1: what is logged of it."""
        raise NotImplementedError

    def evaluate(self) -> Logged:
        """Validation figures; `loss` or `score`, whichever training.best names, chooses best/."""
        raise NotImplementedError

    def run(self, folder: RunFolder) -> dict[str, Any]:
        """Train to the end; returns the summary. KeyboardInterrupt after a stop, whose state is saved."""
        self.folder = folder
        self.model.train()
        states = StateFolder(folder.state, self.config.training.save_total_limit)
        with contextlib.closing(states), interruptible() as stop, checkpointed(self.model, self.config):
            notes = self._restore(states)
            with _explained(self.config):
                self._train(states, notes, stop)
            self._save(folder.final, notes)
            return {"steps": self.state.step, "best_step": notes["best_step"], "best": notes["best"]}

    def _restore(self, states: StateFolder) -> dict[str, Any]:
        if states.latest() is None:
            self.folder.rewind(-1)
            return {"best": None, "best_step": None, "evaluation": {}, "extra": {}}
        notes = self.state.load(states)
        self.folder.rewind(self.state.step)
        self.say(f"resumed at step {self.state.step} of {self.steps}")
        return notes

    def _train(self, states: StateFolder, notes: dict[str, Any], stop: list[bool]) -> None:
        training = self.config.training
        saved, first = time.monotonic(), self.state.step
        if first == 0 and self.evaluates_start:
            self._evaluate(0, notes)
        with progress(self.steps, "training", start=first) as bar:
            for step in range(first + 1, self.steps + 1):
                logged = self.train_step(step) | {"peak_memory_gb": mx.get_peak_memory() / 1e9}
                self._check_finite(step, logged)
                self.state.step = step
                self.folder.log(step, "train", logged)
                bar.update(step, f"loss {logged['loss']:.4f}")
                if step % training.eval_steps == 0 or step == self.steps:
                    self._evaluate(step, notes)
                minutes = training.save_interval_minutes
                due = (
                    step % training.save_steps == 0
                    if minutes is None
                    else time.monotonic() - saved > 60 * minutes
                )
                if due or step == self.steps or stop[0]:
                    self.state.save(states, notes)
                    saved = time.monotonic()
                if stop[0] and step < self.steps:
                    self.say(f"stopped at step {step}; the same command goes on from there")
                    raise KeyboardInterrupt

    def _evaluate(self, step: int, notes: dict[str, Any]) -> None:
        self.model.eval()
        found = self.evaluate()
        self.model.train()
        mx.clear_cache()
        self.folder.log(step, "dev", found)
        self.say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
        name = self.config.training.best
        value = found[name]
        sign = 1 if name == "score" else -1
        notes["evaluation"] = found
        if notes["best"] is None or sign * value > sign * notes["best"]:
            notes |= {"best": value, "best_step": step}
            self._save(self.folder.best, notes)

    def _check_finite(self, step: int, logged: Logged) -> None:
        broken = [name for name, value in logged.items() if not math.isfinite(value)]
        if broken:
            raise UserError(
                f"step {step}: {', '.join(broken)} is not a finite number. Lower training.learning_rate or "
                "training.max_grad_norm, then start over with --fresh."
            )

    def _save(self, directory: Path, notes: Mapping[str, Any]) -> None:
        training = {
            "config": to_dict(self.config),
            "data": dict(self.data),
            "step": self.state.step,
            "evaluation": notes["evaluation"],
            **environment(accelerator()),
        }
        save_adapter(directory, self.loaded, self.config, training)


def save_adapter(
    directory: Path, loaded: LanguageModel, config: SftConfig | GrpoConfig, training: Mapping[str, Any]
) -> None:
    """Write an adapter directory, whole or not at all: mlx-lm's two files, training.json and a card."""

    def fill(folder: Path) -> None:
        write_tensors(folder / ADAPTER_FILE, adapter_tensors(loaded))
        (folder / ADAPTER_CONFIG).write_bytes(to_json(adapter_config(loaded, config.lora)))
        (folder / TRAINING_FILE).write_bytes(to_json(training))
        (folder / "README.md").write_text(_card(loaded, training), encoding="utf-8")

    write_directory(directory, fill)


def make_update(model: Any, optimizer: optim.Optimizer, max_norm: float) -> Callable[[Any], mx.array]:
    """A compiled optimizer step on gradients that are clipped by their global norm, which it returns."""
    captured = [model.state, optimizer.state]

    @partial(mx.compile, inputs=captured, outputs=captured)
    def update(gradients: Any) -> mx.array:
        norm = global_norm(gradients)
        scale = mx.where(norm < max_norm, 1.0, max_norm / norm)
        optimizer.update(model, tree_map(lambda x: x * scale, gradients))
        return norm

    def run(gradients: Any) -> mx.array:
        norm = update(gradients)
        mx.eval(captured, norm)
        return norm

    return run


@contextlib.contextmanager
def checkpointed(model: Any, config: SftConfig | GrpoConfig) -> Iterator[None]:
    """Inside the block a layer's activations are computed again in the backward pass, where the config
    asks.
    """
    if not config.training.grad_checkpoint:
        yield
        return
    kind = type(model.layers[0])
    plain = kind.__call__

    def call(layer: Any, *arguments: Any) -> Any:
        def inner(parameters: Any, *inputs: Any) -> Any:
            layer.update(parameters)
            return plain(layer, *inputs)

        return mx.checkpoint(inner)(layer.trainable_parameters(), *arguments)

    kind.__call__ = call
    try:
        yield
    finally:
        kind.__call__ = plain


@contextlib.contextmanager
def _explained(config: SftConfig | GrpoConfig) -> Iterator[None]:
    """Turn running out of memory into the settings that lower it."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        training = config.training
        raise UserError(
            f"out of memory: halve training.batch_size (now {training.batch_size}) and double "
            f"training.gradient_accumulation_steps ({training.gradient_accumulation_steps}), which keeps "
            "the result; set training.grad_checkpoint: true; or quantise the base with model.load_in_4bit: "
            "true. Then start over with --fresh. "
            f"({str(error).splitlines()[0] if str(error) else 'host memory'})"
        ) from error


def _card(loaded: LanguageModel, training: Mapping[str, Any]) -> str:
    """README.md of an adapter directory."""
    figures = "".join(f"| {name} | {value:.4f} |\n" for name, value in training["evaluation"].items())
    below = "".join(f", above the adapter `{path}`" for path in loaded.origin.below)
    return f"""---
library_name: mlx
---
# A LoRA adapter that expands search queries

On the base `{loaded.origin.name or loaded.origin.base}`{below}; data `{training["data"]["name"]}`, step
{training["step"]}.

| validation | |
|---|---|
{figures}
The score is easy to game: compare it with the template baseline that `mlx_impl/eval.py` prints beside it.
`mlx_impl/convert.py` fuses it into a checkpoint and writes GGUF for QMD, llama.cpp and Ollama.
"""
