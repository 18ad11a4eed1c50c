"""The training loop of a reranker: steps, dev evaluation, best and final checkpoints, exact resume.

Twin: jax_impl/training/loop.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from common.backends import checkpoint_identity
from common.config import RerankerConfig, to_dict
from common.data.pipeline import ListBatch
from common.errors import UserError
from common.prepare import Prepared, plan_batches, resolve_base
from common.progress import progress
from common.runs import RunFolder, environment
from common.schedule import Phase, openness_at, phase_at
from common.text import PairTokenizer
from common.training import (
    COLLAPSED_SPREAD,
    LOG_EVERY,
    DevResult,
    DevSet,
    check_model,
    explained,
    finite,
    interruptible,
    model_card,
    planned_steps,
)
from mlx_impl.loading import LoadedReranker, load_cross_encoder, save_cross_encoder
from mlx_impl.models.dropout import fold_in
from mlx_impl.models.layers import Rngs
from mlx_impl.models.lora import add_lora, trainable
from mlx_impl.scoring import MlxEncoder, MlxOriginal, MlxScorer, accelerator, default_dtype
from mlx_impl.training.distributed import World
from mlx_impl.training.optimizer import learning_rate, make_optimizer
from mlx_impl.training.state import StateFolder
from mlx_impl.training.step import Batch, Moment, TrainState, make_step


class Trainer:
    """One run of a recipe. `run(folder)` starts it or goes on where an interrupted one stopped.

    Raises UserError for a recipe that does not fit base, data or devices, before anything is written.
    """

    def __init__(
        self,
        config: RerankerConfig,
        prepared: Prepared,
        *,
        say: Callable[[str], None] = print,
    ) -> None:
        self.config, self.prepared, self.say = config, prepared, say
        if config.train.parallel != "jit":
            raise UserError(
                f"train.parallel {config.train.parallel} is JAX's: add --backend jax, or leave it out."
            )
        train, data = config.train, config.data
        self.dtype = default_dtype(train.precision)
        directory = resolve_base(config, say=say)
        self.tokenizer = PairTokenizer(directory, data.max_query_tokens, data.max_passage_tokens)
        self.loaded = _load(config, directory, self.dtype)
        check_model(config, self.loaded.config["model_type"], self.loaded.settings["head"])
        original = self._frozen(directory)
        self._original = None if original is None else original.identity
        self.plan = plan_batches(config, prepared, self.tokenizer, self._base_encoder(directory), original)
        self.steps = planned_steps(config, len(self.plan))
        self.world = World()
        self._meet(directory)
        self._report_start()
        model = self.loaded.model
        _freeze(model, _learns(config))
        key = fold_in(mx.random.key(train.seed), 1)
        dropout = train.hidden_dropout > 0 or train.attention_dropout > 0
        self.state = TrainState(model, make_optimizer(train, self.steps))
        self._step = make_step(config, self.state, key if dropout else None, self.world)
        self.dev = DevSet(config, prepared, self.tokenizer)
        self._last: tuple[int, DevResult] | None = None
        self._scorer = MlxScorer(self.loaded.model, self.tokenizer, name="dev")

    def _meet(self, directory: Path) -> None:
        """See that the processes can share a step, and that all begin with the same."""
        config, size = self.config, self.world.size
        if config.lists_per_step // config.train.micro_batches % size:
            beside = " + retrain.old_batch_size" if config.retrain.old_data else ""
            raise UserError(
                f"train.batch_size{beside} {config.lists_per_step} / micro_batches "
                f"{config.train.micro_batches} does not divide over {size} devices; choose a multiple."
            )
        if size == 1:
            return
        old = None if self.prepared.old is None else len(self.prepared.old)
        data = [self.prepared.data.fingerprint, len(self.prepared.training), old]
        base, here = checkpoint_identity(directory), environment()
        self.world.agree([to_dict(config), data, base, here["git_commit"], here["versions"].get("mlx")])

    def _base_encoder(self, directory: Path) -> MlxEncoder | None:
        """The base as it was, where the recipe holds the states to its own."""
        width = self.loaded.model.encoder.config.hidden_size
        if self.loaded.start != "sentence_encoder" or not self.config.quantum.alignment_weight:
            return None
        if self.loaded.settings["state_size"] != width:
            self.say(f"no alignment: model.complex_width is not the encoder's {width}")
            return None
        return MlxEncoder(directory)

    def _frozen(self, directory: Path) -> MlxOriginal | None:
        """The base before any step, where the recipe preserves what it says."""
        if not self.config.preserves:
            return None
        identity = checkpoint_identity(directory, str(self.dtype))
        states = self.config.retrain.resonance_alignment > 0
        return MlxOriginal(self.loaded.model, self.tokenizer, identity, states=states)

    def run(self, folder: RunFolder) -> dict[str, Any]:
        """Train to the end; returns the summary that results.json holds. Raises UserError (see `errors`)."""
        self.folder = folder
        with contextlib.closing(StateFolder(self.folder.state)) as states, interruptible() as stop:
            notes = self.world.from_leader(self._restore(states) if self.world.leader else None)
            for tree in self.state.arrays():
                self.world.fill_from_leader(tree)
            if not notes.get("stopped"):
                with explained(self.config):
                    self._train(states, notes, stop)
            summary = self._finish(notes)
            if stop[0]:
                raise KeyboardInterrupt
            return summary

    def _restore(self, states: StateFolder) -> dict[str, Any]:
        if states.latest() is None:
            self.folder.rewind(-1)
            begun: dict[str, Any] = {
                "best": None,
                "best_step": None,
                "best_fused": None,
                "collapsed": 0,
                "waited": 0,
            }
            return begun | {"data": None, "original": self._original}
        self.state, notes = states.load(self.state)
        if notes.get("original") != self._original:
            raise UserError(
                f"model.base {self.config.model.base}: has changed since this run began, and the run "
                "preserves what it was. Put it back to go on, or start over with --fresh."
            )
        self.folder.rewind(int(self.state.step))
        self.say(f"resumed at step {int(self.state.step)} of {self.steps}")
        return notes

    def _train(self, states: StateFolder, notes: dict[str, Any], stop: list[bool]) -> None:
        train = self.config.train
        first = int(self.state.step)
        batches = self.plan.loader(self.steps)
        if notes["data"] is not None:
            batches.set_state(notes["data"])
        evaluate_at = {round(self.steps * (i + 1) / train.evaluations) for i in range(train.evaluations)}
        leader = self.world.leader
        if first == 0 and leader:
            self._evaluate(0, notes)
        self.world.any(False)  # nobody waits for the leader inside a step
        step, ends = first, False
        with progress(self.steps, "training", start=first) as bar:
            for step in range(first + 1, self.steps + 1):
                logged = self._one_step(step, next(batches))
                if step % LOG_EVERY == 0 or step in (1, self.steps) or step in evaluate_at:
                    bar.update(step, self._log(step, logged))
                early = step in evaluate_at and leader and self._evaluate(step, notes)
                if step in evaluate_at and self.world.any(early):
                    ends = notes["stopped"] = True
                ends = self.world.any(stop[0]) or ends
                if step % train.checkpoint_every == 0 or step == self.steps or ends:
                    finite(step, logged)
                    if leader:
                        states.save(self.state, notes | {"data": batches.get_state()})
                if ends:
                    break
        if ends and not notes.get("stopped"):
            self.say(f"stopped at step {step}; the same command goes on from there")
            raise KeyboardInterrupt

    def _one_step(self, step: int, batch: ListBatch) -> dict[str, Any]:
        phase = self._phase(step)
        moment = Moment(phase.temperature, phase.entropy_bonus, phase.ramp, self._openness(step))
        logged = self._step(Batch(*(mx.array(getattr(batch, name)) for name in Batch._fields)), moment)
        pairs = {"related_pairs": batch.related_pairs} if self.config.entangles else {}
        return logged | {"real_tokens": batch.token_share} | pairs

    def _openness(self, step: int) -> float:
        return openness_at((step - 1) / self.steps, self.config.train.separable_start)

    def _phase(self, step: int) -> Phase:
        quantum = self.config.quantum
        return phase_at(
            (step - 1) / self.steps,
            quantum.phase,
            tau0=quantum.temperature_start,
            tau1=quantum.temperature_end,
            beta=quantum.entropy_bonus,
        )

    def _log(self, step: int, logged: dict[str, Any]) -> str:
        values = finite(step, logged)
        phase = self._phase(step)
        rate = float(learning_rate(self.config.train, self.steps)(step - 1))
        settings = {"temperature": phase.temperature, "ramp": phase.ramp, "learning_rate": rate}
        if self.config.train.separable_start:
            settings["openness"] = self._openness(step)
        self.folder.log(step, "train", values | settings)
        return f"loss {values['loss']:.4f}"

    def _evaluate(self, step: int, notes: dict[str, Any]) -> bool:
        """Score dev, keep the best checkpoint; true when training should stop early."""
        train = self.config.train
        result = self.dev.evaluate(self._scorer_now())
        self._last = (step, result)
        self.folder.log(
            step,
            "dev",
            {
                self.config.evaluation.metric: result.metric,
                f"{self.config.evaluation.metric} fused": result.fused,
                f"{self.config.evaluation.metric} portable": result.portable,
                "fusion_weight": result.fusion_weight,
                "score_spread": result.spread,
            },
        )
        self.say(
            f"dev at step {step}: {self.config.evaluation.metric} {result.metric:.4f} alone, "
            f"{result.fused:.4f} fused, {result.portable:.4f} portable (first stage {self.dev.baseline:.4f})"
        )
        self._guard_collapse(step, result, notes)
        collapsed = result.spread < COLLAPSED_SPREAD  # a chance order may rank dev well
        if notes["best"] is None or (result.metric > notes["best"] and not collapsed):
            notes |= {"best": result.metric, "best_step": step, "waited": 0, "best_fused": result.fused}
            self._save(self.folder.best, step, result)
        else:
            notes["waited"] += 1
        stops = train.patience is not None and notes["waited"] >= train.patience
        if stops:
            self.say(f"no better dev result in {train.patience} evaluations: stopped early at step {step}")
        return stops

    def _guard_collapse(self, step: int, result: DevResult, notes: dict[str, Any]) -> None:
        if step <= self.config.train.warmup * self.steps:
            return
        notes["collapsed"] = notes["collapsed"] + 1 if result.spread < COLLAPSED_SPREAD else 0
        if notes["collapsed"] >= 2:
            raise UserError(
                f"step {step}: the scores have collapsed: within a query they differ by {result.spread:.1e}, "
                "twice in a row. Lower --train.learning-rate, or check that positives and negatives differ."
            )

    def _finish(self, notes: dict[str, Any]) -> dict[str, Any]:
        """Write final/, the last parameters; best/ holds those with the best dev metric."""
        step = int(self.state.step)
        if self.world.leader:
            if self._last is None or self._last[0] != step:
                self._last = (step, self.dev.evaluate(self._scorer_now()))
            self._save(self.folder.final, step, self._last[1])
        return {
            "steps": step,
            "best_step": notes["best_step"],
            "best_dev": notes["best"],
            "best_dev_fused": notes["best_fused"],
            "dev_first_stage": self.dev.baseline,
        }

    def _scorer_now(self) -> MlxScorer:
        return self._scorer

    def _save(self, directory: Path, step: int, result: DevResult) -> None:
        data = self.config.data
        self.loaded.settings.update(
            {
                "fusion_weight": result.fusion_weight,
                "first_stage": self.prepared.first_stage,
                "depth": self.config.evaluation.depth,
                "precision": self.config.train.precision,
                "max_query_tokens": data.max_query_tokens,
                "max_passage_tokens": data.max_passage_tokens,
                "confidence": None if result.confidence is None else result.confidence.to_json(),
            }
        )
        metrics = {
            self.config.evaluation.metric: result.metric,
            "fused": result.fused,
            "first_stage": self.dev.baseline,
        }
        training = {
            "config": to_dict(self.config),
            "data": {"name": self.prepared.data.name, "fingerprint": self.prepared.data.fingerprint},
            "step": step,
            "dev": metrics
            | {
                "queries": len(self.dev.qrels),
                "depth": self.config.evaluation.dev_depth,
                "first_stage_name": self.prepared.first_stage,
            },
            **environment(accelerator()),
        }
        save_cross_encoder(
            directory,
            self.loaded,
            training=training,
            tokenizer_save=self.tokenizer.save,
            card=model_card(self.config, self.loaded.settings, training),
        )

    def _report_start(self) -> None:
        began = self.loaded.settings["start"]
        start = f"a run's checkpoint that began as {began}" if self.loaded.start == "resumed" else began
        size, config = self.config.train.batch_size, self.config
        beside = f" + {config.retrain.old_batch_size} old" if config.retrain.old_data else ""
        self.say(
            f"start: {start}; {self.steps} steps of {size}{beside} lists of {config.data.list_size}; "
            f"{self.world.size} x {mx.default_device()}, {self.dtype}"
        )
        self.say(self.tokenizer.truncated)


def _load(config: RerankerConfig, directory: Path, dtype: mx.Dtype) -> LoadedReranker:
    train, lora = config.train, config.model.lora
    loaded = load_cross_encoder(
        directory,
        config.model,
        dtype=dtype,
        seed=train.seed,
        dropout=(train.hidden_dropout, train.attention_dropout),
    )
    if config.model.use_lora:
        try:
            rngs = Rngs(train.seed)
            add_lora(loaded.model.encoder, lora.rank, lora.alpha, lora.targets, rngs=rngs)
        except ValueError as error:
            raise UserError(f"model.lora.targets: {error}") from None
    return loaded


def _learns(config: RerankerConfig) -> Callable[[tuple[str | int, ...], mx.array], bool]:
    """Which parameters learn. The bias b only under a pointwise loss: elsewhere its gradient is rounding
    noise, which Adam would blow up to full steps."""

    def learns(path: tuple[str | int, ...], value: mx.array) -> bool:
        if path[-1] == "b" and config.train.objective != "bce":
            return False
        return trainable(path, value) if config.model.use_lora else True

    return learns


def _freeze(model: nn.Module, learns: Callable[[tuple[str | int, ...], mx.array], bool]) -> None:
    """Freeze every parameter that does not learn."""
    for path, module in model.named_modules():
        parts = path.split(".")
        arrays = {name: value for name, value in module.items() if isinstance(value, mx.array)}
        resting = [name for name, value in arrays.items() if not learns((*parts, name), value)]
        module.freeze(recurse=False, keys=resting)
