"""The training loop of a reranker: steps, dev evaluation, best and final checkpoints, exact resume.

Twin: mlx_impl/training/loop.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

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
from jax_impl.loading import LoadedReranker, load_cross_encoder, save_cross_encoder
from jax_impl.models.lora import add_lora, trainable
from jax_impl.scoring import JaxEncoder, JaxOriginal, JaxScorer, accelerator, default_dtype
from jax_impl.training.optimizer import learning_rate, make_optimizer
from jax_impl.training.parallel import Devices, current
from jax_impl.training.state import StateFolder
from jax_impl.training.step import Batch, Moment, TrainState, make_step


class Trainer:
    """One run of a recipe. `run(folder)` starts it or goes on where an interrupted one stopped.

    Several processes each have one and do the same; the first alone scores dev, logs and writes checkpoints.
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
        train, data = config.train, config.data
        self.processes, self.devices = current(), Devices(train.parallel)
        self.dtype = default_dtype(train.precision)
        directory = resolve_base(config, say=say)
        self.tokenizer = PairTokenizer(directory, data.max_query_tokens, data.max_passage_tokens)
        self.loaded = _load(config, directory, self.dtype)
        check_model(config, self.loaded.config["model_type"], self.loaded.settings["head"])
        original = self._frozen(directory)
        self._original = None if original is None else original.identity
        encoder = self._base_encoder(directory)
        self.plan = self.processes.in_turn(
            lambda: plan_batches(config, prepared, self.tokenizer, encoder, original)
        )
        self.steps = planned_steps(config, len(self.plan))
        self._report_start()
        graphdef, learned, fixed = nnx.split(self.loaded.model, _learns(config), ...)  # type: ignore[misc]
        optimizer = make_optimizer(train, self.steps)
        key = jax.random.fold_in(jax.random.key(train.seed), 1)
        dropout = train.hidden_dropout > 0 or train.attention_dropout > 0
        self._step = make_step(config, graphdef, optimizer, key if dropout else None, self.devices)
        self._share = self.devices.share(config.lists_per_step, train.micro_batches)
        state = TrainState(learned, fixed, optimizer.init(learned), jnp.zeros((), jnp.int32))
        self._same_start(state)
        self.state: TrainState = self.devices.replicate(state)
        self.dev = DevSet(config, prepared, self.tokenizer)
        self._last: tuple[int, DevResult] | None = None
        self._scorer = JaxScorer(self.loaded.model, self.tokenizer, name="dev")

    def _same_start(self, state: TrainState) -> None:
        """Refuse processes that would train something else than the first one does."""
        if self.processes.count == 1:
            return
        weight = sum(float(np.abs(np.asarray(x, np.float64)).sum()) for x in jax.tree.leaves(state.learned))
        mine = [float(self.steps), float(len(self.plan.lists)), weight]
        theirs = self.processes.told(mine)
        with self.processes.together():
            if mine != theirs:
                raise UserError(
                    f"process {self.processes.index} has steps, lists and sum of parameters {mine}, the "
                    f"first one {theirs}: give all processes the same command, files and versions."
                )
        self.devices.meet()

    def _base_encoder(self, directory: Path) -> JaxEncoder | None:
        """The base as it was, where the recipe holds the states to its own."""
        width = self.loaded.model.encoder.config.hidden_size
        if self.loaded.start != "sentence_encoder" or not self.config.quantum.alignment_weight:
            return None
        if self.loaded.settings["state_size"] != width:
            self.say(f"no alignment: model.complex_width is not the encoder's {width}")
            return None
        return JaxEncoder(directory)

    def _frozen(self, directory: Path) -> JaxOriginal | None:
        """The base before any step, where the recipe preserves what it says."""
        if not self.config.preserves:
            return None
        identity = checkpoint_identity(directory, str(self.dtype))
        states = self.config.retrain.resonance_alignment > 0
        return JaxOriginal(self.loaded.model, self.tokenizer, identity, states=states)

    def run(self, folder: RunFolder) -> dict[str, Any]:
        """Train to the end; returns the summary that results.json holds. Raises UserError (see `errors`)."""
        self.folder = folder
        with contextlib.closing(StateFolder(self.folder.state)) as states, interruptible() as stop:
            notes = self._restore(states)
            if not notes.get("stopped"):
                with explained(self.config):
                    self._train(states, notes, stop)
            summary = self._finish(notes)
            if self.processes.any(stop[0]):
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
        loaded, notes = states.load(self.devices.whole(self.state))
        self.state = self.devices.replicate(loaded)
        if notes.get("original") != self._original:
            raise UserError(
                f"model.base {self.config.model.base}: has changed since this run began, and the run "
                "preserves what it was. Put it back to go on, or start over with --fresh."
            )
        self.folder.rewind(self._steps_done())
        self.say(f"resumed at step {self._steps_done()} of {self.steps}")
        return notes

    def _train(self, states: StateFolder, notes: dict[str, Any], stop: list[bool]) -> None:
        train = self.config.train
        first = self._steps_done()
        batches = self.plan.loader(self.steps, self._share)
        if notes["data"] is not None:
            batches.set_state(notes["data"])
        evaluate_at = {round(self.steps * (i + 1) / train.evaluations) for i in range(train.evaluations)}
        if first == 0:
            self._evaluate(0, notes)
        step, ends = first, False
        with progress(self.steps, "training", start=first) as bar:
            for step in range(first + 1, self.steps + 1):
                logged = self._one_step(step, next(batches))
                if step % LOG_EVERY == 0 or step in (1, self.steps) or step in evaluate_at:
                    bar.update(step, self._log(step, logged))
                if step in evaluate_at and self._evaluate(step, notes):
                    ends = notes["stopped"] = True
                ends = self._asked_to_stop(step, stop) or ends
                if step % train.checkpoint_every == 0 or step == self.steps or ends:
                    finite(step, logged)
                    states.save(self.devices.whole(self.state), notes | {"data": batches.get_state()})
                if ends:
                    break
        if ends and not notes.get("stopped"):
            self.say(f"stopped at step {step}; the same command goes on from there")
            raise KeyboardInterrupt

    def _one_step(self, step: int, batch: ListBatch) -> dict[str, Any]:
        phase = self._phase(step)
        moment = Moment(phase.temperature, phase.entropy_bonus, phase.ramp, self._openness(step))
        placed = self.devices.place(Batch(*(getattr(batch, name) for name in Batch._fields)))
        self.state, logged = self._step(self.state, placed, moment)
        pairs = {"related_pairs": batch.related_pairs} if self.config.entangles else {}
        return logged | {"real_tokens": batch.token_share} | pairs

    def _openness(self, step: int) -> float:
        return openness_at((step - 1) / self.steps, self.config.train.separable_start)

    def _asked_to_stop(self, step: int, stop: list[bool]) -> bool:
        """Whether Ctrl-C or SIGTERM came, in any process: they meet at every LOG_EVERY-th step."""
        if self.processes.count > 1 and step % LOG_EVERY:
            return False
        return self.processes.any(stop[0])

    def _steps_done(self) -> int:
        return int(self.devices.local(self.state.step))

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
        result = self._measure()
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

    def _measure(self) -> DevResult:
        """Dev as the first process scores it; the others wait and are told the numbers."""
        result = DevResult(0.0, 0.0, 0.0, 0.0, 0.0, None)
        with self.processes.together():
            if self.processes.first:
                result = self.dev.evaluate(self._scorer_now())
        names = [field.name for field in dataclasses.fields(result) if field.name != "confidence"]
        told = self.processes.told([getattr(result, name) for name in names])
        numbers: dict[str, Any] = dict(zip(names, told, strict=True))
        return dataclasses.replace(result, **numbers)

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
        step = self._steps_done()
        if self._last is None or self._last[0] != step:
            self._last = (step, self._measure())
        self._save(self.folder.final, step, self._last[1])
        return {
            "steps": step,
            "best_step": notes["best_step"],
            "best_dev": notes["best"],
            "best_dev_fused": notes["best_fused"],
            "dev_first_stage": self.dev.baseline,
        }

    def _scorer_now(self) -> JaxScorer:
        self._scorer.set_state(self._parameters())
        return self._scorer

    def _parameters(self) -> Any:
        return nnx.merge_state(*self.devices.local((self.state.learned, self.state.fixed)))

    def _save(self, directory: Path, step: int, result: DevResult) -> None:
        with self.processes.together():
            if self.processes.first:
                self._write(directory, step, result)

    def _write(self, directory: Path, step: int, result: DevResult) -> None:
        nnx.update(self.loaded.model, self._parameters())
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
            f"{self.devices.count} {jax.devices()[0].device_kind} device(s), {self.dtype}"
        )
        if self.processes.count > 1:
            self.say(f"{self.processes.count} processes; this one, the first, scores dev and writes")
        part = config.lists_per_step // config.train.micro_batches
        if self.devices.count > 1 and part % self.devices.count:
            empty = -part % self.devices.count
            self.say(
                f"{part} lists of a micro-batch leave {empty} of {part + empty} places on "
                f"{self.devices.count} devices empty: the same result, at the cost of a full batch"
            )
        self.say(self.tokenizer.truncated)


def _load(config: RerankerConfig, directory: Path, dtype: DTypeLike) -> LoadedReranker:
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
            rngs = nnx.Rngs(train.seed)
            add_lora(loaded.model.encoder, lora.rank, lora.alpha, lora.targets, rngs=rngs)
        except ValueError as error:
            raise UserError(f"model.lora.targets: {error}") from None
    return loaded


def _learns(config: RerankerConfig) -> Any:
    """Which parameters learn. The bias b only under a pointwise loss: elsewhere its gradient is rounding
    noise, which Adam would blow up to full steps."""
    learns: Any = trainable if config.model.use_lora else nnx.Param
    return learns if config.train.objective == "bce" else nnx.All(learns, nnx.Not(nnx.PathContains("b")))
