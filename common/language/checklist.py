"""The checklist after a language model's training: what a run's log says, and what its checkpoint does.

The source names one limit, a validation perplexity of 50 to 80; the others are this project's, and settings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.backends import backend_name
from common.checkpoint import CONFIG_FILE, TRAINING_FILE, read_config, read_json, read_tensors
from common.errors import UserError
from common.language.architectures import language_config
from common.language.dashboard import SOURCE_PERPLEXITY, LanguageRun, read_run
from common.language.generation import SamplingConfig
from common.language.samples import DEMO_PROMPTS, LanguageGenerator, load_generator
from common.metrics.language import text_metrics

TAIL = 0.25  # share of the log at its end that must be stable


@dataclasses.dataclass(frozen=True)
class Limits:
    """What passes."""

    max_perplexity: float = SOURCE_PERPLEXITY
    """A validation token; what the source hopes for at most."""
    max_repetition: float = 0.5
    """Share of token 3-grams that stood in the generated text before, in [0, 1]."""
    min_utilisation: float = 0.1
    """Of the memory's slots, e^entropy of their read weights / slots, in [0, 1]."""
    min_exploration: float = 0.02
    """Share of tokens sampled at temperature 1 that are not the likeliest, in [0, 1]."""
    max_exploration: float = 0.98
    max_spread: float = 0.05
    """Standard deviation of the phase and magnitude terms over the last quarter of the log."""

    def problems(self) -> list[str]:
        """Every flag out of range, in words."""
        shares = ("max_repetition", "min_utilisation", "min_exploration", "max_exploration")
        checks = [(name, 0 <= getattr(self, name) <= 1, "[0, 1]") for name in shares]
        checks += [(name, getattr(self, name) > 0, "> 0") for name in ("max_perplexity", "max_spread")]
        return [
            f"--{name.replace('_', '-')} is {getattr(self, name)!r}; allowed: {allowed}"
            for name, good, allowed in checks
            if not good
        ]


@dataclasses.dataclass(frozen=True)
class Item:
    """A line of the checklist."""

    name: str
    value: str | float | None
    limit: str
    passed: bool | None  # None: does not apply, or cannot be known; `why` says which
    why: str = ""


def check_model(
    directory: Path,
    limits: Limits,
    *,
    backend: str = "auto",
    new_tokens: int = 64,
    seed: int = 0,
) -> list[Item]:
    """All items, of a checkpoint directory and of the log of the run that it lies in, where there is one.

    UserError for what is not a language model's, and for a backend that is not here.
    """
    language_config(read_config(directory), directory / CONFIG_FILE)  # refuses other kinds of models
    backend = backend_name(backend)  # refuses one that is not installed
    run = run_of(directory)
    items = log_items(run, limits) if run else [_without_log(directory)]
    items.append(perplexity_item(directory, run, limits))
    try:
        generator = load_generator(directory, backend, say=lambda _: None)
    except UserError as error:
        return [*items, Item("checkpoint loads strictly", str(error), "no error", False)]
    items += [Item("checkpoint loads strictly", "loaded", "no error", True), finite_weights(directory)]
    if items[-1].passed is False:
        return items  # it can write nothing
    return items + generation_items(generator, limits, new_tokens=new_tokens, seed=seed)


def run_of(directory: Path) -> LanguageRun | None:
    """The run whose best/ or final/ a directory is. UserError of a reranker's run."""
    if directory.name not in ("best", "final") or not (directory.parent / "metrics.jsonl").exists():
        return None
    return read_run(directory.parent)


def _without_log(directory: Path) -> Item:
    return Item(
        "log", None, "-", None, f"{directory} lies in no run's folder: nothing of its training is known"
    )


# --- the log ---


def log_items(run: LanguageRun, limits: Limits) -> list[Item]:
    """What metrics.jsonl and results.json say."""
    return [
        _finished(run),
        _all_finite(run),
        _loss_decreased(run),
        _weight_reached(run),
        *(_stable(run, name, limits.max_spread) for name in ("magnitude", "phase")),
        *_memory_items(run, limits),
    ]


def _finished(run: LanguageRun) -> Item:
    ended = (run.directory / "final").is_dir()
    value = f"step {max(line['step'] for line in run.metrics):,}"
    return Item("training ended", value, "final/ is written", ended)


def _all_finite(run: LanguageRun) -> Item:
    broken = sum(value is None for line in run.metrics for value in line.values())
    return Item("values of the log that are not finite", float(broken), "0", broken == 0)


def _loss_decreased(run: LanguageRun) -> Item:
    """Of cross-entropy, which is the same quantity throughout; the total loss moves with its weights."""
    name, values = "cross-entropy, end / begin", _logged(run, "cross_entropy")
    if len(values) < 2:
        return Item(name, None, "< 1", None, "fewer than two lines were logged")
    part = max(1, len(values) // 10)
    ratio = float(np.mean(values[-part:]) / np.mean(values[:part]))
    return Item(name, ratio, "< 1", ratio < 1)


def _weight_reached(run: LanguageRun) -> Item:
    name = "distillation weight reached"
    if not run.taught:
        return Item(name, None, "-", None, "there is no teacher")
    end = run.config["distillation"]["end_weight"]
    return Item(name, run.distillation_weight(), f"{end:g}, to one step", run.weight_reached())


def _stable(run: LanguageRun, term: str, limit: float) -> Item:
    name, values = f"{term} stable: spread at the end", _logged(run, term)
    tail = values[-max(2, math.ceil(TAIL * len(values))) :]
    if len(tail) < 2:
        return Item(name, None, f"<= {limit:g}", None, f"no {term} term was logged")
    spread = float(np.std(tail))
    return Item(name, spread, f"<= {limit:g}", spread <= limit)


def _memory_items(run: LanguageRun, limits: Limits) -> list[Item]:
    if not run.slots:
        return [Item("memory used", None, "-", None, "this model has no memory of slots")]
    last = run.lines("dev")[-1] if run.lines("dev") else {}
    used, rotation = last.get("utilisation"), last.get("rotation")
    return [
        Item(
            "memory utilisation",
            used,
            f">= {limits.min_utilisation:g}",
            used is not None and used >= limits.min_utilisation,
        ),
        Item("memory rotation", rotation, "> 0", rotation is not None and rotation > 0),
    ]


def _logged(run: LanguageRun, name: str) -> list[float]:
    return [line[name] for line in run.lines("train") if line.get(name) is not None]


def perplexity_item(directory: Path, run: LanguageRun | None, limits: Limits) -> Item:
    """Of the checkpoint itself, as it was measured when it was written. UserError where it was not."""
    file = directory / TRAINING_FILE
    dev = read_json(file).get("dev") if file.exists() else None
    value = dev.get("token") if isinstance(dev, dict) else None
    if value is None and run is not None:
        raise UserError(
            f"{directory}: was never evaluated, {TRAINING_FILE} has no dev perplexity; train it with this "
            "version's scripts/train.py"
        )
    limit = f"<= {limits.max_perplexity:g}"
    if value is None:
        return Item("validation perplexity, a token", None, limit, None, f"{TRAINING_FILE} has none")
    return Item("validation perplexity, a token", value, limit, value <= limits.max_perplexity)


# --- the checkpoint ---


def finite_weights(directory: Path) -> Item:
    """Numbers of the weights that are NaN or infinite; UserError for a file that cannot be read."""
    broken = sum(int((~np.isfinite(x.astype(np.float32))).sum()) for x in read_tensors(directory).values())
    return Item("weights that are not finite", float(broken), "0", broken == 0)


def generation_items(
    generator: LanguageGenerator, limits: Limits, *, new_tokens: int, seed: int
) -> list[Item]:
    """What the model writes after the source's demonstration prompts, sampled at temperature 1."""
    tokenizer, context = generator.tokenizer, generator.engine.context
    room = None if context is None else max(1, context // 2)  # a prompt is cut to half of the context
    prompts = [tokenizer.encode(prompt).tolist()[:room] for prompt in DEMO_PROMPTS]
    sampling = SamplingConfig(
        max_new_tokens=new_tokens, temperature=1.0, seed=seed, banned=tokenizer.unknown_ids
    )
    made, again, other = (
        generator.continued(prompts, dataclasses.replace(sampling, seed=number))
        for number in (seed, seed, seed + len(prompts))
    )
    ids = [item.ids for item in made]
    found = text_metrics(ids, [item.text for item in made], tokenizer.unknown_ids)
    counts = [len(part) for part in ids]
    explored = (
        float(np.average([item.explored for item in made], weights=counts)) if sum(counts) else math.nan
    )
    empty = sum(not item.text.strip() for item in made)
    same, differs = ids == [item.ids for item in again], ids != [item.ids for item in other]
    between = f"[{limits.min_exploration:g}, {limits.max_exploration:g}]"
    return [
        Item("generated texts that are empty", float(empty), f"0 of {len(made)}", empty == 0),
        Item("the same text for the same seed", _yes(same), "yes", same),
        Item("another text for another seed", _yes(differs), "yes", differs),
        _measured(
            "repetition of 3-grams",
            found["repetition_3"],
            f"<= {limits.max_repetition:g}",
            lambda x: x <= limits.max_repetition,
        ),
        _measured(
            "exploration",
            explored,
            between,
            lambda x: limits.min_exploration <= x <= limits.max_exploration,
        ),
    ]


def _measured(name: str, value: float, limit: str, good: Callable[[float], bool]) -> Item:
    """An item of what could be NaN, of texts that are too short."""
    if math.isnan(value):
        return Item(name, None, limit, False, "the texts are too short to measure it")
    return Item(name, value, limit, good(value))


def _yes(good: bool) -> str:
    return "yes" if good else "no"


def passed(items: Sequence[Item]) -> bool:
    """Whether no item failed."""
    return all(item.passed is not False for item in items)


def items_json(items: Sequence[Item]) -> list[dict[str, Any]]:
    """As JSON values; `result` is pass, fail or not applicable."""
    return [
        {
            "name": item.name,
            "value": item.value,
            "limit": item.limit,
            "result": result(item),
            "why": item.why,
        }
        for item in items
    ]


def result(item: Item) -> str:
    """In a word."""
    return "not applicable" if item.passed is None else "pass" if item.passed else "fail"
