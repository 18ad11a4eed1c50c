"""The trainer of a language model's adapter; the loop itself is common.training's.

A subclass says what a step and an evaluation are (training/sft.py, training/grpo.py). What is random in a
step depends on the seed and its number alone, so that a run goes on bit for bit where it stopped. No twin
yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_map

from common.checkpoint import TRAINING_FILE, to_json, write_directory
from common.config import TrainConfig, to_dict
from common.expansion.config import GrpoConfig, SftConfig
from common.expansion.prompts import ExpansionPrompts
from common.expansion.qmd import Sampling
from common.runs import RunFolder, environment
from common.training import Notes, TrainingLoop, finite
from mlx_impl.models.qwen import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    LanguageModel,
    adapter_config,
    adapter_tensors,
    with_fused_adapters,
    write_tensors,
)
from mlx_impl.scoring import accelerator
from mlx_impl.training.generation import Continuation, generate
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


class Places:
    """Where a run stands in data that follow from the seed and a step's number: there is nothing to keep."""

    def __init__(self, done: int) -> None:
        self.step = done

    def __next__(self) -> int:
        self.step += 1
        return self.step

    def get_state(self) -> None:
        return None


class AdapterTrainer(TrainingLoop[Logged, int]):
    """One run; see TrainingLoop.

    `loaded` holds the model with the adapter that learns; `steps` counts the calls of `train_step`, of
    `updates` optimizer steps each.
    """

    prompts: ExpansionPrompts
    log_every = 1
    finite_advice = "Lower training.learning_rate or training.max_grad_norm, then start over with --fresh."

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
        training = config.training
        pace = TrainConfig(
            learning_rate=training.learning_rate,
            warmup=training.warmup_ratio,
            schedule=training.lr_scheduler,
            checkpoint_every=training.save_steps,
        )
        super().__init__(pace, say=say)
        self.config, self.loaded, self.steps, self.data = config, loaded, steps, data
        self.model, self.device = loaded.model, accelerator()
        self.rate = learning_rate(pace, steps * updates)
        optimizer = optim.AdamW(
            self.rate, betas=[0.9, 0.999], eps=1e-8, weight_decay=training.weight_decay, bias_correction=True
        )
        self.state = AdapterState(self.model, optimizer)
        self.update = make_update(self.model, optimizer, training.max_grad_norm)
        self._saved = time.monotonic()

    def asked_as(self, query: str) -> list[int]:
        """The prompt of a query as QMD asks it: what is measured and rewarded is what it would get."""
        return self.prompts.prompt(query, consumer=self.config.prompt.system != "none")

    def answers(
        self,
        queries: Sequence[str],
        sampling: Sampling,
        copies: int = 1,
        *,
        seed: int | None = None,
        batch_size: int | None = None,
    ) -> list[Continuation]:
        """What the model writes for each query, `copies` of them together."""
        with with_fused_adapters(self.loaded):
            return generate(
                self.model,
                [self.asked_as(query) for query in queries],
                end=self.prompts.end_id,
                copies=copies,
                sampling=sampling,
                seed=self.config.training.seed if seed is None else seed,
                batch_size=batch_size or self.config.evaluation.batch_size,
            )

    def learned(self) -> list[tuple[str, mx.array]]:
        """What learns, by name."""
        return sorted(adapter_tensors(self.loaded).items())

    def train_step(self, step: int) -> Logged:
        """One step, numbered from 1: what is logged of it."""
        raise NotImplementedError

    def evaluate(self) -> Logged:
        """Validation figures; `loss` or `score`, whichever training.best names, chooses best/."""
        raise NotImplementedError

    def run(self, folder: RunFolder, max_minutes: float | None = None) -> dict[str, Any]:
        """See TrainingLoop."""
        self.model.train()
        return super().run(folder, max_minutes)

    def _states(self, folder: Path) -> StateFolder:
        return StateFolder(folder, self.config.training.save_total_limit)

    def _save_state(self, states: StateFolder, notes: Notes) -> None:
        self.state.save(states, notes)
        self._saved = time.monotonic()

    def _load_state(self, states: StateFolder) -> Notes:
        return self.state.load(states)

    def _steps_done(self) -> int:
        return self.state.step

    def _batches(self) -> Places:
        return Places(self.state.step)

    def _one_step(self, step: int, batch: int) -> Logged:
        logged = self.train_step(step)
        self.state.step = step
        return logged | {"peak_memory_gb": mx.get_peak_memory() / 1e9}

    def _evaluation_steps(self) -> set[int]:
        each = self.config.training.eval_steps
        return {*range(each, self.steps, each), self.steps}

    def _state_is_due(self, step: int) -> bool:
        minutes = self.config.training.save_interval_minutes
        return (
            super()._state_is_due(step) if minutes is None else time.monotonic() - self._saved > 60 * minutes
        )

    def _log(self, step: int, logged: Mapping[str, Any], batch: int) -> str:
        values = finite(step, logged, self.finite_advice)
        self.folder.log(step, "train", values)
        return f"loss {values['loss']:.4f}"

    def _measure(self) -> Logged:
        self.model.eval()
        found = self.evaluate()
        self.model.train()
        mx.clear_cache()
        return found

    def _tell(self, step: int, result: Logged, notes: Notes) -> None:
        self.folder.log(step, "dev", result)
        self.say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in result.items()))

    def _better(self, result: Logged, notes: Notes) -> Notes | None:
        name = self.config.training.best
        sign = 1 if name == "score" else -1
        better = notes["best"] is None or sign * result[name] > sign * notes["best"]
        return {"best": result[name]} if better else None

    def _write(self, directory: Path, step: int, result: Logged) -> None:
        training = {
            "config": to_dict(self.config),
            "data": dict(self.data),
            "step": step,
            "evaluation": result,
            **environment(self.device),
        }
        save_adapter(directory, self.loaded, self.config, training)

    def _memory_advice(self) -> str:
        training = self.config.training
        return (
            f"halve training.batch_size (now {training.batch_size}) and double "
            f"training.gradient_accumulation_steps ({training.gradient_accumulation_steps}), which keeps "
            "the result; set training.grad_checkpoint: true; or quantise the base with model.load_in_4bit: "
            "true"
        )


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
