"""What the training loops of both backends share: dev evaluation, the length of a run, its card, its end."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from common.backends import Scores
from common.config import RerankerConfig
from common.config_language import LanguageRecipe
from common.data.records import Run
from common.errors import UserError, out_of_memory
from common.hub import DEFAULT_MODEL
from common.metrics.calibration import Confidence, confidence_features
from common.metrics.ranking import evaluate_run, mean, ranked
from common.prepare import FEW_DEV_QUERIES, Prepared, dev_candidates
from common.retrieval.fusion import choose_omega
from common.text import Encoded, PairTokenizer

LOG_EVERY = 10  # steps between lines of the log, and between looks for NaN
COLLAPSED_SPREAD = 1e-3  # mean spread of a query's scores below which a reranker says nothing


@dataclasses.dataclass(frozen=True)
class DevResult:
    """What dev says of the parameters at one moment."""

    metric: float  # of the reranker alone
    fused: float  # with the best fusion weight
    portable: float  # of the portable score
    fusion_weight: float
    spread: float  # mean standard deviation of a query's scores
    confidence: Confidence | None


class EncodedScorer(Protocol):
    """A Scorer that takes pairs which are tokens already."""

    def score_encoded(self, encodeds: Sequence[Encoded]) -> Scores: ...


class DevSet:
    """The dev queries' candidates, tokenized once; `baseline` is the first stage's metric."""

    def __init__(self, config: RerankerConfig, prepared: Prepared, tokenizer: PairTokenizer) -> None:
        settings = config.evaluation
        self.settings = settings
        self.qrels, self.first = dev_candidates(config, prepared)
        self.baseline = mean(evaluate_run(self.first, self.qrels, (settings.metric,))[settings.metric])
        pairs = [(query, passage) for query, run in self.first.items() for passage in run]
        data = prepared.data
        self._encoded = tokenizer.encode_pairs(
            [data.queries[query] for query, _ in pairs], [data.corpus[passage] for _, passage in pairs]
        )

    def evaluate(self, scorer: EncodedScorer) -> DevResult:
        """Rank the candidates by a scorer, alone and fused, and fit its confidence."""
        scores = scorer.score_encoded(self._encoded)
        run: Run = {}
        portable: Run = {}
        correct, spread, start = [], [], 0
        length = int(np.median([len(passages) for passages in self.first.values()]))
        features = []
        for query, passages in self.first.items():
            rows = slice(start, start + len(passages))
            start += len(passages)
            values = scores.score[rows]
            run[query] = dict(zip(passages, map(float, values), strict=True))
            portable[query] = dict(zip(passages, map(float, scores.portable[rows]), strict=True))
            features.append(confidence_features(values, scores.resonance[rows], best=length))
            best = ranked(run[query], 1)[0]
            correct.append(self.qrels[query].get(best, 0) > 0)
            spread.append(float(np.std(values)))
        metric = self.settings.metric
        omega, table = choose_omega(self.first, run, self.qrels, self.settings.fusion_grid, metric)
        enough = len(correct) >= FEW_DEV_QUERIES and 0 < sum(correct) < len(correct)
        confidence = Confidence.fit(np.asarray(features), np.asarray(correct), length) if enough else None
        alone = mean(evaluate_run(portable, self.qrels, (metric,))[metric])
        return DevResult(table[0.0], table[omega], alone, omega, float(np.mean(spread)), confidence)


SEPARABLE = ("bert", "electra", "roberta", "xlm-roberta")  # the families of train.separable_start


def check_model(config: RerankerConfig, model_type: str, head: str) -> None:
    """UserError where the recipe asks of the loaded model what its family or its own head has not."""
    if config.train.separable_start and model_type not in SEPARABLE:
        raise UserError(
            f"train.separable_start is {config.train.separable_start}, and {model_type} is not one of the "
            f"families that it works with: {', '.join(SEPARABLE)}. Set it to 0, or choose another model.base."
        )
    wrong = [
        f"{field} is {value!r}; allowed: {allowed}"
        for field, value, good, allowed in config.head_checks(head)
        if not good
    ]
    if wrong:
        raise UserError(f"{config.model.base} has another head than the recipe's: {'; '.join(wrong)}")


def planned_steps(config: RerankerConfig | LanguageRecipe, steps_per_epoch: int) -> int:
    """Optimizer steps of a run: `epochs` of the lists, at least `min_steps`, at most `max_steps`."""
    train = config.train
    wanted = round(train.epochs * steps_per_epoch) if train.epochs else train.max_steps or 0
    wanted = max(1, wanted, train.min_steps)
    return min(wanted, train.max_steps or wanted)


def verdict(config: RerankerConfig, summary: Mapping[str, Any]) -> str:
    """What dev says of the best checkpoint, in plain words, also where training did not help."""
    metric, step = config.evaluation.metric, summary["best_step"]
    alone, fused, first = (summary[key] for key in ("best_dev", "best_dev_fused", "dev_first_stage"))
    lines = [
        f"best on dev: step {step}, {metric} {alone:.4f} alone, {fused:.4f} fused, first stage {first:.4f}"
    ]
    if step == 0:
        lines.append(
            "warning: no step of training was better on dev than the start: best/ is the untrained base"
        )
    if fused <= first:
        lines.append(
            "warning: on dev it is no better than the first stage, which is what you should keep using"
        )
    elif alone <= first:
        lines.append("warning: on dev it is better than the first stage only when fused with it, not alone")
    return "\n".join(lines)


def model_card(config: RerankerConfig, settings: Mapping[str, Any], training: dict[str, Any]) -> str:
    """README.md of a checkpoint directory: what it is, how to load it, what was measured."""
    dev, data = training["dev"], training["data"]
    metric = config.evaluation.metric
    base = DEFAULT_MODEL if config.model.base == "default" else config.model.base
    on_hub = base.count("/") == 1 and base[0] not in "./~" and not Path(base).exists()
    origin = f"base_model: {base}\n" if on_hub else ""
    return f"""---
library_name: sentence-transformers
pipeline_tag: text-ranking
{origin}---
# {config.name}

A quantum-resonance reranker (cross-encoder), fine-tuned from `{base}` (start:
{settings["start"]}) on `{data["name"]}` (fingerprint {data["fingerprint"]}), step {training["step"]}.

| dev, {dev["queries"]} queries, top {dev["depth"]} of {dev["first_stage_name"]} | {metric} |
|---|---|
| first stage | {dev["first_stage"]:.4f} |
| reranked | {dev[metric]:.4f} |
| reranked and fused, weight {settings["fusion_weight"]} | {dev["fused"]:.4f} |

These queries chose the checkpoint and the weight; measure a test split with `scripts/evaluate.py`.

`scripts/rerank.py --model DIR` uses the full score. `sentence_transformers.CrossEncoder(DIR)` and others
load the portable score, the linear classifier distilled from it; it is ours for pairs that no limit cuts
(query {settings["max_query_tokens"]}, passage {settings["max_passage_tokens"]} tokens).
"""


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


def finite(step: int, logged: Mapping[str, Any]) -> dict[str, float]:
    """A step's values as floats; UserError names those that are not finite."""
    values = {name: float(np.asarray(value).flat[0]) for name, value in logged.items()}
    if not all(map(math.isfinite, values.values())):
        broken = ", ".join(name for name, value in values.items() if not math.isfinite(value))
        raise UserError(
            f"step {step}: {broken} is not a finite number; what was learned since the last state "
            "is lost. Lower --train.learning-rate or --train.max-grad-norm, then start --fresh."
        )
    return values


def explained(config: RerankerConfig) -> contextlib.AbstractContextManager[None]:
    """Turn running out of memory into the settings that lower it."""
    train, data = config.train, config.data
    return memory_explained(
        f"raise --train.micro-batches (now {train.micro_batches}), which keeps the "
        f"result, or lower --train.batch-size ({train.batch_size}), --data.list-size ({data.list_size}), "
        f"or --data.max-passage-tokens ({data.max_passage_tokens}); or set --model.use-lora"
    )


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
            f"out of memory: {advice}. Then start --fresh or with another --name. "
            f"({text.splitlines()[0] if text else 'host memory'})"
        ) from error
