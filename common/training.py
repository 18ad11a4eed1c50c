"""The loop of every training run: steps, evaluations, best and final checkpoints, exact resume, a clean stop.

common.reranker.training and common.language.training say what is trained; a backend's trainer derives from
one of them: {jax_impl,mlx_impl}/training/{loop,language}.py.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from common.errors import UserError, out_of_memory
from common.processes import Processes
from common.progress import progress
from common.runs import RunFolder

LOG_EVERY = 10  # steps between lines of the log, and between looks for NaN
FINITE_ADVICE = "Lower --train.learning-rate or --train.max-grad-norm, then start --fresh."

Result = TypeVar("Result")  # what an evaluation says
Batch = TypeVar("Batch")
Notes = dict[str, Any]  # what a run knows beside its arrays; JSON, saved with every state


class Pace(Protocol):
    """How long a run is, how often it evaluates and saves, when it gives up: a part of every recipe."""

    @property
    def epochs(self) -> float: ...
    @property
    def min_steps(self) -> int: ...
    @property
    def max_steps(self) -> int | None: ...
    @property
    def evaluations(self) -> int: ...
    @property
    def patience(self) -> int | None: ...
    @property
    def checkpoint_every(self) -> int: ...


class States(Protocol):
    """The state/ folder of a run, as a backend writes it."""

    def latest(self) -> int | None: ...
    def close(self) -> None: ...


class TrainingLoop(Generic[Result, Batch]):
    """One run. `run(folder)` starts it or goes on where an interrupted one stopped.

    Several processes each have one and do the same; the first alone evaluates, and writes checkpoints.
    """

    steps: int
    device: str | None = None  # the accelerator in words
    processes = Processes()
    evaluates_start = False  # before the first step too
    log_every = LOG_EVERY
    finite_advice = FINITE_ADVICE

    def __init__(self, pace: Pace, *, say: Callable[[str], None]) -> None:
        self.say = say
        self._pace = pace
        self._last: tuple[int, Result] | None = None

    # --- what a backend brings ---

    def _states(self, folder: Path) -> Any:
        raise NotImplementedError

    def _save_state(self, states: Any, notes: Notes) -> None:
        raise NotImplementedError

    def _load_state(self, states: Any) -> Notes:
        raise NotImplementedError

    def _steps_done(self) -> int:
        raise NotImplementedError

    def _batches(self) -> Any:
        """An iterator over the batches of all steps, with `get_state` and `set_state`."""
        raise NotImplementedError

    def _one_step(self, step: int, batch: Batch) -> Mapping[str, Any]:
        raise NotImplementedError

    def _learning_rate(self, step: int) -> float:
        raise NotImplementedError

    def scorer(self) -> Any:
        """The model as it is now, its averaged weights where there are some, to be evaluated."""
        raise NotImplementedError

    def write(self, directory: Path, training: dict[str, Any], card: str) -> None:
        """Write the model as `scorer` has it to a checkpoint directory."""
        raise NotImplementedError

    # --- what the thing that is trained brings ---

    def _begin(self) -> Notes:
        """Notes of a new run, beside those of the loop."""
        return {}

    def _check_resumed(self, notes: Notes) -> None:
        """UserError where an interrupted run cannot go on."""

    def _log(self, step: int, logged: Mapping[str, Any], batch: Batch) -> str:
        """Write a line of the log; returns what the progress bar says."""
        raise NotImplementedError

    def _measure(self) -> Result:
        raise NotImplementedError

    def _tell(self, step: int, result: Result, notes: Notes) -> None:
        """Log an evaluation and say it."""
        raise NotImplementedError

    def _better(self, result: Result, notes: Notes) -> Notes | None:
        """What to note of a result that is the best so far, `best` among it; None when it is not."""
        raise NotImplementedError

    def _write(self, directory: Path, step: int, result: Result) -> None:
        """Write the model as it was evaluated to a checkpoint directory."""
        raise NotImplementedError

    def _evaluation_steps(self) -> set[int]:
        """The steps after which dev is measured: `evaluations` of them, evenly."""
        count = self._pace.evaluations
        return {round(self.steps * (i + 1) / count) for i in range(count)}

    def _state_is_due(self, step: int) -> bool:
        """Whether the state is saved after this step; after the last and at a stop it always is."""
        return step % self._pace.checkpoint_every == 0

    def _summary(self, notes: Notes) -> dict[str, Any]:
        """What results.json holds of the training beside its steps."""
        return {}

    def _memory_advice(self) -> str:
        raise NotImplementedError

    # --- the loop ---

    def run(self, folder: RunFolder, max_minutes: float | None = None) -> dict[str, Any]:
        """Train to the end; returns the summary that results.json holds.

        After `max_minutes` the first evaluation is the end: the summary's `stopped` says "time" then.
        KeyboardInterrupt after a stop, whose state is saved; UserError for scores or losses that are broken.
        """
        self.folder = folder
        self._ends_at = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
        with contextlib.closing(self._states(folder.state)) as states, interruptible() as stop:
            notes = self._restore(states)
            if not notes.get("stopped"):
                with memory_explained(self._memory_advice()):
                    self._train(states, notes, stop)
            summary = self._finish(notes)
            if self.processes.any(stop[0]):
                raise KeyboardInterrupt
            return summary

    def _restore(self, states: States) -> Notes:
        if states.latest() is None:
            self.folder.rewind(-1)
            return {"best": None, "best_step": None, "waited": 0, "data": None} | self._begin()
        notes = self._load_state(states)
        self._check_resumed(notes)
        self.folder.rewind(self._steps_done())
        self.say(f"resumed at step {self._steps_done()} of {self.steps}")
        return notes

    def _train(self, states: States, notes: Notes, stop: list[bool]) -> None:
        first, evaluate_at = self._steps_done(), self._evaluation_steps()
        batches = self._batches()
        if notes["data"] is not None:
            batches.set_state(notes["data"])
        if first == 0 and self.evaluates_start:
            self._evaluate(0, notes)
        step, ends = first, False
        with progress(self.steps, "training", start=first) as bar:
            for step in range(first + 1, self.steps + 1):
                batch = next(batches)
                logged = self._one_step(step, batch)
                if step % self.log_every == 0 or step in (1, self.steps) or step in evaluate_at:
                    bar.update(step, self._log(step, logged, batch))
                if step in evaluate_at and (reason := self._evaluate(step, notes)):
                    ends, notes["stopped"] = True, reason
                ends = self._asked_to_stop(step, stop) or ends
                if self._state_is_due(step) or step == self.steps or ends:
                    finite(step, logged, self.finite_advice)
                    self._save_state(states, notes | {"data": batches.get_state()})
                if ends:
                    break
        if ends and not notes.get("stopped") and step < self.steps:
            self.say(f"stopped at step {step}; the same command goes on from there")
            raise KeyboardInterrupt

    def _asked_to_stop(self, step: int, stop: list[bool]) -> bool:
        """Whether Ctrl-C or SIGTERM came, in any process: they meet at every LOG_EVERY-th step."""
        if self.processes.count > 1 and step % LOG_EVERY:
            return False
        return self.processes.any(stop[0])

    def _evaluate(self, step: int, notes: Notes) -> str | None:
        """Measure, keep the best checkpoint; why training should stop early, None when it should go on."""
        result = self._measure()
        self._last = (step, result)
        self._tell(step, result, notes)
        better = self._better(result, notes)
        if better is not None:
            notes |= better | {"best_step": step, "waited": 0}
            self._save(self.folder.best, step, result)
        else:
            notes["waited"] += 1
        patience = self._pace.patience
        if patience is not None and notes["waited"] >= patience:
            self.say(f"no better dev result in {patience} evaluations: stopped early at step {step}")
            return "patience"
        if step < self.steps and self.processes.any(time.monotonic() >= self._ends_at):
            self.say(f"the time is up: stopped at step {step} of {self.steps}")
            return "time"
        return None

    def _finish(self, notes: Notes) -> dict[str, Any]:
        """Write final/, the last parameters; best/ holds those that were best on dev."""
        step = self._steps_done()
        if self._last is None or self._last[0] != step:
            self._last = (step, self._measure())
        self._save(self.folder.final, step, self._last[1])
        best = {"best_step": notes["best_step"], "best_dev": notes["best"]}
        ended = {"steps": step, "planned_steps": self.steps, "stopped": notes.get("stopped")}
        return ended | best | self._summary(notes)

    def _save(self, directory: Path, step: int, result: Result) -> None:
        with self.processes.together():
            if self.processes.first:
                self._write(directory, step, result)


def planned_steps(pace: Pace, steps_per_epoch: int) -> int:
    """Optimizer steps of a run: `epochs` of the data, at least `min_steps`, at most `max_steps`."""
    wanted = round(pace.epochs * steps_per_epoch) if pace.epochs else pace.max_steps or 0
    wanted = max(1, wanted, pace.min_steps)
    return min(wanted, pace.max_steps or wanted)


@contextlib.contextmanager
def interruptible() -> Iterator[list[bool]]:
    """A flag that Ctrl-C or SIGTERM sets; a second Ctrl-C interrupts at once."""
    stop = [False]

    def request(number: int, _frame: object) -> None:
        if stop[0]:
            raise KeyboardInterrupt
        stop[0] = True

    wanted = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, request) for number in wanted}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def finite(step: int, logged: Mapping[str, Any], advice: str = FINITE_ADVICE) -> dict[str, float]:
    """A step's values as floats; UserError names those that are not finite."""
    values = {name: float(np.asarray(value).flat[0]) for name, value in logged.items()}
    if not all(map(math.isfinite, values.values())):
        broken = ", ".join(name for name, value in values.items() if not math.isfinite(value))
        raise UserError(
            f"step {step}: {broken} is not a finite number; what was learned since the last state "
            f"is lost. {advice}"
        )
    return values


@contextlib.contextmanager
def memory_explained(advice: str) -> Iterator[None]:
    """Turn running out of memory into a UserError with `advice`."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        text = str(error)
        raise UserError(
            f"out of memory: {advice}. Then start --fresh, or as another run. "
            f"({text.splitlines()[0] if text else 'host memory'})"
        ) from error
