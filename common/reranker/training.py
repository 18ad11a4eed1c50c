"""The training loop of a reranker, for both backends: phases, dev evaluation, best by its metric, its card.

A backend's trainer derives from RerankerLoop and brings model, step and state:
{jax_impl,mlx_impl}/training/loop.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from common.backends import Scores
from common.config import RerankerConfig, to_dict
from common.data.combined import source_of
from common.data.pipeline import ListBatch, ListPlan
from common.data.records import Run
from common.errors import UserError
from common.hub import DEFAULT_MODEL
from common.metrics.calibration import Confidence, confidence_features
from common.metrics.ranking import evaluate_run, mean, ranked
from common.reranker.prepare import FEW_DEV_QUERIES, Prepared, dev_candidates, resolve_base
from common.reranker.schedule import Phase, openness_at, phase_at
from common.retrieval.fusion import choose_omega
from common.runs import environment
from common.text import Encoded, PairTokenizer
from common.training import Notes, TrainingLoop, finite, planned_steps

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
        self._source = source_of if data.parts else lambda _: ""
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
        omega, table = choose_omega(
            self.first, run, self.qrels, self.settings.fusion_grid, metric, self._source
        )
        enough = len(correct) >= FEW_DEV_QUERIES and 0 < sum(correct) < len(correct)
        confidence = Confidence.fit(np.asarray(features), np.asarray(correct), length) if enough else None
        alone = mean(evaluate_run(portable, self.qrels, (metric,))[metric])
        return DevResult(table[0.0], table[omega], alone, omega, float(np.mean(spread)), confidence)


class RerankerLoop(TrainingLoop[DevResult, ListBatch]):
    """One run of a recipe; see TrainingLoop.

    A backend sets `loaded`, `plan` and `dev` too; `scorer` gives an EncodedScorer. Raises UserError for a
    recipe that does not fit base, data or devices, before anything is written.
    """

    evaluates_start = True
    loaded: Any  # a backend's LoadedReranker
    plan: ListPlan
    dev: DevSet

    def __init__(
        self, config: RerankerConfig, prepared: Prepared, *, say: Callable[[str], None] = print
    ) -> None:
        super().__init__(config.train, say=say)
        self.config, self.prepared = config, prepared
        self.base = resolve_base(config, say=say)
        data = config.data
        self.tokenizer = PairTokenizer(self.base, data.max_query_tokens, data.max_passage_tokens)
        self._original: str | None = None  # what identifies the frozen original, where the run preserves it

    def _planned(self, plan: ListPlan, where: str) -> None:
        """Take the plan of all batches; say how the run begins, and `where` it computes."""
        self.plan = plan
        self.steps = planned_steps(self.config.train, len(plan))
        began = self.loaded.settings["start"]
        start = f"a run's checkpoint that began as {began}" if self.loaded.start == "resumed" else began
        size, config = self.config.train.batch_size, self.config
        beside = f" + {config.retrain.old_batch_size} old" if config.retrain.old_data else ""
        self.say(
            f"start: {start}; {self.steps} steps of {size}{beside} lists of {config.data.list_size}; {where}"
        )
        self.say(self.tokenizer.truncated)

    def _aligns(self, width: int) -> bool:
        """Whether the recipe holds the states to what the base, of this width, says of each text alone."""
        if self.loaded.start != "sentence_encoder" or not self.config.quantum.alignment_weight:
            return False
        if self.loaded.settings["state_size"] == width:
            return True
        self.say(f"no alignment: model.complex_width is not the encoder's {width}")
        return False

    def _begin(self) -> Notes:
        return {"best_fused": None, "collapsed": 0, "original": self._original}

    def _check_resumed(self, notes: Notes) -> None:
        if notes.get("original") != self._original:
            raise UserError(
                f"model.base {self.config.model.base}: has changed since this run began, and the run "
                "preserves what it was. Put it back to go on, or start over with --fresh."
            )

    def _phase(self, step: int) -> Phase:
        quantum = self.config.quantum
        return phase_at(
            (step - 1) / self.steps,
            quantum.phase,
            tau0=quantum.temperature_start,
            tau1=quantum.temperature_end,
            beta=quantum.entropy_bonus,
        )

    def _moment(self, step: int) -> tuple[float, float, float, float]:
        """The fields of a backend's Moment: temperature, entropy bonus, ramp and openness."""
        phase = self._phase(step)
        return phase.temperature, phase.entropy_bonus, phase.ramp, self._openness(step)

    def _openness(self, step: int) -> float:
        return openness_at((step - 1) / self.steps, self.config.train.separable_start)

    def _log(self, step: int, logged: Mapping[str, Any], batch: ListBatch) -> str:
        pairs = {"related_pairs": batch.related_pairs} if self.config.entangles else {}
        values = finite(step, {**logged, "real_tokens": batch.token_share, **pairs})
        phase = self._phase(step)
        settings = {
            "temperature": phase.temperature,
            "ramp": phase.ramp,
            "learning_rate": self._learning_rate(step),
        }
        if self.config.train.separable_start:
            settings["openness"] = self._openness(step)
        self.folder.log(step, "train", values | settings)
        return f"loss {values['loss']:.4f}"

    def _measure(self) -> DevResult:
        """Dev as the first process scores it; the others wait and are told the numbers."""
        result = DevResult(0.0, 0.0, 0.0, 0.0, 0.0, None)
        with self.processes.together():
            if self.processes.first:
                result = self.dev.evaluate(self.scorer())
        names = [field.name for field in dataclasses.fields(result) if field.name != "confidence"]
        told = self.processes.told([getattr(result, name) for name in names])
        numbers: dict[str, Any] = dict(zip(names, told, strict=True))
        return dataclasses.replace(result, **numbers)

    def _tell(self, step: int, result: DevResult, notes: Notes) -> None:
        metric = self.config.evaluation.metric
        self.folder.log(
            step,
            "dev",
            {
                metric: result.metric,
                f"{metric} fused": result.fused,
                f"{metric} portable": result.portable,
                "fusion_weight": result.fusion_weight,
                "score_spread": result.spread,
            },
        )
        self.say(
            f"dev at step {step}: {metric} {result.metric:.4f} alone, {result.fused:.4f} fused, "
            f"{result.portable:.4f} portable (first stage {self.dev.baseline:.4f})"
        )
        self._guard_collapse(step, result, notes)

    def _guard_collapse(self, step: int, result: DevResult, notes: Notes) -> None:
        if step <= self.config.train.warmup * self.steps:
            return
        notes["collapsed"] = notes["collapsed"] + 1 if result.spread < COLLAPSED_SPREAD else 0
        if notes["collapsed"] >= 2:
            raise UserError(
                f"step {step}: the scores have collapsed: within a query they differ by {result.spread:.1e}, "
                "twice in a row. Lower --train.learning-rate, or check that positives and negatives differ."
            )

    def _better(self, result: DevResult, notes: Notes) -> Notes | None:
        collapsed = result.spread < COLLAPSED_SPREAD  # a chance order may rank dev well
        if notes["best"] is None or (result.metric > notes["best"] and not collapsed):
            return {"best": result.metric, "best_fused": result.fused}
        return None

    def _summary(self, notes: Notes) -> dict[str, Any]:
        return {"best_dev_fused": notes["best_fused"], "dev_first_stage": self.dev.baseline}

    def _write(self, directory: Path, step: int, result: DevResult) -> None:
        data, evaluation = self.config.data, self.config.evaluation
        self.loaded.settings.update(
            {
                "fusion_weight": result.fusion_weight,
                "first_stage": self.prepared.first_stage,
                "depth": evaluation.depth,
                "precision": self.config.train.precision,
                "max_query_tokens": data.max_query_tokens,
                "max_passage_tokens": data.max_passage_tokens,
                "confidence": None if result.confidence is None else result.confidence.to_json(),
            }
        )
        training = {
            "config": to_dict(self.config),
            "data": {"name": self.prepared.data.name, "fingerprint": self.prepared.data.fingerprint},
            "step": step,
            "dev": {
                evaluation.metric: result.metric,
                "fused": result.fused,
                "first_stage": self.dev.baseline,
                "queries": len(self.dev.qrels),
                "depth": evaluation.dev_depth,
                "first_stage_name": self.prepared.first_stage,
            },
            **environment(self.device),
        }
        self.write(directory, training, model_card(self.config, self.loaded.settings, training))

    def _memory_advice(self) -> str:
        train, data = self.config.train, self.config.data
        return (
            f"raise --train.micro-batches (now {train.micro_batches}), which keeps the "
            f"result, or lower --train.batch-size ({train.batch_size}), --data.list-size ({data.list_size}), "
            f"or --data.max-passage-tokens ({data.max_passage_tokens}); or set --model.use-lora"
        )


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
