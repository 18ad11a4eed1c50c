"""Everything that only a GPU can measure, in one call of at most ten minutes, written down after every step.

    python benchmarks/gpu_suite.py                                       # all parts, 9.5 minutes
    python benchmarks/gpu_suite.py --parts lm,samples --minutes 9 samples=1.5
    python benchmarks/gpu_suite.py --parts ablations --seeds 1 2 --results $OUT  # more seeds in another call
    python benchmarks/gpu_suite.py --minutes 0                           # only looks for what is missing
    JAX_PLATFORMS=cpu python benchmarks/gpu_suite.py --toy               # does it run? on any machine

part        what                                                               needs, beside a GPU
lm          configs/infinito.py: dev perplexity by epoch, test perplexity      wikitext-2, tokenizers/gpt2
            static and cached, tokens/s, MFU, memory
samples     what that checkpoint writes, in the results, beside human text     lm, in this call or before
ablations   Infinito's and Indra's switches at a shorter length, dev only      wikitext-2, alpaca
speed       training and greedy generation beside PyTorch on the same GPU      the extra `peers`
reranker    the default recipe, the general one uncapped                       conala, wikiqa, scifact,
                                                                               nfcorpus
heads       the grid of scripts/ablate.py on the default recipe

Data lie in $RESONANCE_DATA. What is missing is told before anything is trained. A part's time that an earlier
one leaves is its own; a training that runs out of time ends at its next dev evaluation, and what there is no
time for is named. A failure is noted and the rest goes on; the command then exits with 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import importlib.util
import itertools
import json
import math
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np

from benchmarks import lm_generation, lm_training
from benchmarks.record import RESULTS, Record, Row, compared
from common.backends import language_module
from common.checkpoint import json_numbers, read_config, read_json, write_file
from common.config import RerankerConfig, RunOptions, load_recipe
from common.data.combined import source_name
from common.data.corpora import Form, load_corpus
from common.data.sources import load_ranking_data
from common.errors import UserError, listed, run_command
from common.hub import resolve_model
from common.language.architectures import language_config, parameter_count
from common.language.config import InfinitoConfig, LanguageRecipe
from common.language.evaluation import LanguageResult
from common.language.generation import SamplingConfig
from common.language.prepare import prepare_language
from common.language.samples import (
    DEMO_PROMPTS,
    human_metrics,
    load_generator,
    measured_samples,
    split_prompts,
)
from common.language.text import load_tokenizer
from common.language.workflow import TrainedLanguageRun, perplexities, train_language
from common.reranker.ablation import HEAD_VARIANTS, grid, read_outcomes, results
from common.reranker.prepare import resolve_base
from common.reranker.workflow import cut_short, train_recipe
from common.runs import RESULTS_FILE, git_commit, read_metrics
from scripts import ablate

ROOT = Path(__file__).resolve().parents[1]
BACKEND: Final = "jax"
# part -> its share of the time when nothing else is said
PARTS = {"lm": 4.0, "samples": 0.75, "ablations": 2.0, "speed": 0.75, "reranker": 1.0, "heads": 1.0}
TRAINING_SHARE = 0.75  # of the minutes that are left; the rest is for evaluation
# dense bfloat16 FLOP/s by JAX's device_kind, from the makers' data sheets
PEAK_BF16 = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}
FLOPS = (
    "6 x parameters + 12 x layers x width x context + 12 x width x (memory slots + 1) a token, forward and "
    "backward: every parameter in one multiply-add (the tied table in the logits), attention not halved"
)
MFU_TARGET = 0.4
DEV_TARGET = ("the source hopes for 50 to 80", 50.0)  # validation perplexity a token
LITERATURE = {  # word-level test perplexity of WikiText-2
    "static": ("AWD-LSTM (Merity et al. 2018)", 65.8),
    "cache": ("AWD-LSTM + cache (Merity et al. 2018)", 52.0),
}


# --- what is trained ---


@dataclasses.dataclass(frozen=True)
class Plan:
    """The recipes and sizes of one call; the first of the switches is what the others are compared with."""

    lm: LanguageRecipe
    infinito: Mapping[str, LanguageRecipe]
    teacher: LanguageRecipe
    indra: Mapping[str, LanguageRecipe]
    rerankers: tuple[RerankerConfig, ...]
    heads: RerankerConfig
    variants: tuple[str, ...]
    samples: int
    prompt_tokens: int
    new_tokens: int
    training: tuple[str, ...]  # flags of lm_training.py and lm_generation.py
    generation: tuple[str, ...]
    real: bool = True  # whether numbers of the literature may stand beside


SWITCHES = ("architecture", "memory_slots", "exploration")
INFINITO = {"infinito": "wikitext", **{n: n for n in ("no_memory", "no_exploration", "transformer", "lstm")}}
INDRA = {"unified": None, **{name: name for name in ("pure", "aggressive", "gentle")}}  # pure: without KD


def full(runs: Path) -> Plan:
    """What a GPU measures."""
    rare = {"checkpoint_every": 1000}  # a state of 71 M is above a gigabyte, and nothing here is resumed
    small = {"epochs": 3.0, "max_steps": None, "batch_size": 32, **rare}
    general: RerankerConfig = recipe("general_reranker")
    sources = general.data.name.replace("@500", "")
    reference: RerankerConfig = recipe("quantum_resonance")
    longer = {"train": {"batch_size": 64, **rare}}
    return Plan(
        lm=recipe("infinito").changed(train=rare),
        infinito={
            name: recipe("infinito_small", preset).changed(train=small) for name, preset in INFINITO.items()
        },
        teacher=recipe("indra", "teacher").changed(**longer),
        indra=indra_switches(recipe("indra", "small").changed(**longer), runs),
        rerankers=(
            reference,
            general.changed(
                data={"name": sources, "max_passage_tokens": 256}, train={"epochs": 1.0, "batch_size": 16}
            ),
        ),
        heads=reference,
        variants=tuple(HEAD_VARIANTS),
        samples=16,
        prompt_tokens=32,
        new_tokens=128,
        training=("--recipe", "infinito", "--data", "wikitext-2"),
        generation=("--vocab-size", "50257", "--hidden-size", "640", "--layers", "8", "--heads", "10"),
    )


def toy(runs: Path) -> Plan:
    """The same parts at a size that a CPU runs in a minute or two, on the paragraphs of the documentation."""
    text, pairs = toy_data(runs)
    width = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    data = {"name": str(text), "vocab_size": 512}
    steps = {"epochs": 0.0, "max_steps": 6, "batch_size": 2, "evaluations": 2, "checkpoint_every": 6}
    lm = recipe("infinito_small", "smoke").changed(
        name="infinito", model={**width, "context": 32, "memory_slots": 8, "memory_writes": 4}, data=data
    )
    lm = lm.changed(train=steps)
    student = recipe("indra", "smoke").changed(
        model={**width, "context": 32, "complex_width": 8}, data=data, train=steps
    )
    teacher = recipe("indra", "teacher").changed(
        model={**width, "max_position_embeddings": 32}, data=student.data, train=student.train
    )
    reranker = cut_short(recipe("quantum_resonance")).changed(
        data={"name": str(pairs)}, train={"max_steps": 2}
    )
    return Plan(
        lm=lm,
        infinito={
            name: lm.changed(
                name=f"toy_{name}",
                model={field: getattr(recipe("infinito_small", preset).model, field) for field in SWITCHES}
                | ({"memory_slots": 8} if name != "no_memory" else {}),
            )
            for name, preset in INFINITO.items()
        },
        teacher=teacher,
        indra=indra_switches(student, runs),
        rerankers=(reranker,),
        heads=reranker,
        variants=("cartesian", "cls_only"),
        samples=2,
        prompt_tokens=4,
        new_tokens=6,
        training=("--quick", "--models", "infinito", "--data", str(text)),
        generation=("--quick", "--batch", "2"),
        real=False,
    )


def recipe(file: str, preset: str | None = None) -> Any:
    """A recipe of configs/."""
    return load_recipe(str(ROOT / "configs" / f"{file}.py"), preset)


def indra_switches(student: LanguageRecipe, runs: Path) -> dict[str, LanguageRecipe]:
    """The presets of configs/indra.py at the student's size, taught by `teacher` as this call trains it."""
    taught = str(runs / recipe("indra", "teacher").name / "best")
    found = {}
    for name, preset in INDRA.items():
        own: LanguageRecipe = recipe("indra", preset)
        settings = dataclasses.asdict(own.distillation)
        changed = student.changed(
            name=f"indra_{name}",
            distillation=settings | {"teacher": taught if settings["teacher"] else None},
        )
        if own.base:  # it goes on from the switch of that name
            base = str(runs / f"{Path(own.base).name}-s{{seed}}" / "best")
            changed = changed.changed(base=base, train={"learning_rate": own.train.learning_rate})
        found[name] = changed
    return found


def toy_data(runs: Path) -> tuple[Path, Path]:
    """A text and pairs (the beginning of a paragraph, the rest) made of this project's documentation."""
    paragraphs = [
        part.replace("\n", " ")
        for file in sorted((ROOT / "docs").glob("*.md"))
        for part in file.read_text(encoding="utf-8").split("\n\n")
        if len(part.split()) > 12 and part[0].isalpha()
    ]
    runs.mkdir(parents=True, exist_ok=True)
    text, pairs = runs / "toy.txt", runs / "toy.jsonl"
    write_file(text, "\n\n".join(paragraphs).encode())
    split = (part.split(" ", 6) for part in paragraphs)
    rows = (json.dumps({"query": " ".join(words[:6]), "positive": words[6]}) + "\n" for words in split)
    write_file(pairs, "".join(rows).encode())
    return text, pairs


# --- what is missing ---


def missing(plan: Plan, parts: Sequence[str], runs: Path) -> list[str]:
    """What the parts lack, in words, found in seconds: each loader is asked for what it will be asked for."""
    found = []
    for part in parts:
        for check in checks(part, plan, runs, with_lm="lm" in parts):
            try:
                check()
            except UserError as error:
                found.append(f"{part}: {error}")
    return list(dict.fromkeys(found))


def checks(part: str, plan: Plan, runs: Path, *, with_lm: bool) -> Iterator[Callable[[], Any]]:
    """What raises a UserError for everything that a part needs and is not at hand."""
    languages = {"lm": [plan.lm], "samples": [plan.lm], "ablations": [*plan.infinito.values(), plan.teacher]}
    for item in languages.get(part, ()):
        names = ("wikitext-2", "alpaca") if item.data.name == "mixed" else (item.data.name,)
        yield from (functools.partial(corpus_there, name, item.data.form) for name in names)
        if item.data.tokenizer != "bpe":
            yield functools.partial(load_tokenizer, item.data.tokenizer)
    if part == "samples" and not with_lm:
        yield functools.partial(checkpoint_there, runs / plan.lm.name)
    if part == "speed":
        yield functools.partial(peers_there, plan.real)
    for config in {"reranker": plan.rerankers, "heads": (plan.heads,)}.get(part, ()):
        yield functools.partial(resolve_base, config, say=_quiet)
        yield functools.partial(resolve_model, config.data.encoder, say=_quiet)
        # pydocs is on every machine, and takes a while to read
        sources = (source for source in config.data.name.split(" + ") if source != "pydocs")
        yield from (functools.partial(load_ranking_data, source) for source in sources)


def gpu_there() -> None:
    """UserError where JAX does not compute on a GPU."""
    import jax

    try:
        platform = jax.devices()[0].platform
    except RuntimeError as error:
        platform = str(error).splitlines()[0]
    if platform != "gpu":
        raise UserError(
            f"there is no GPU: JAX says {platform!r}. On a machine with one: pip install -e '.[cuda]'. "
            "Whether the suite runs at all: --toy"
        )


@functools.cache
def corpus_there(name: str, form: Form) -> None:
    """UserError where a language model's corpus is not at hand or broken."""
    load_corpus(name, form)


def checkpoint_there(run: Path) -> None:
    """UserError without the checkpoint that samples are drawn from."""
    if not (run / "best").is_dir():
        raise UserError(f"{run}/best is not there: add the part lm, or name the --runs of its call")


def peers_there(on_gpu: bool) -> None:
    """UserError without the libraries that speed is compared with, or when torch sees no GPU."""
    lacking = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(f"{' and '.join(lacking)} not installed: pip install -e '.[peers]'")
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    if on_gpu and subprocess.run([sys.executable, "-c", code], check=False).returncode:
        raise UserError("torch sees no GPU: the peer would compute on the CPU. Install its CUDA build")


# --- the parts, as jobs ---


class NotRun(Exception):
    """There was no time for it, or not enough: says why."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One measurement: minutes that are left -> rows. Those of one kind take about as long as each other."""

    name: str
    run: Callable[[float], list[Row]]
    kind: str


@dataclasses.dataclass(frozen=True)
class Suite:
    """What every part is made from; `tools` are the data and encoders that rerankers share."""

    plan: Plan
    runs: Path
    seeds: tuple[int, ...]
    record: Record
    tools: ablate.Tools

    def jobs(self, part: str) -> Iterator[Job]:
        made: Iterator[Job] = getattr(self, part)()
        return made

    def lm(self) -> Iterator[Job]:
        yield Job("train and test", self._lm, "lm")

    def samples(self) -> Iterator[Job]:
        yield Job("generate", self._samples, "samples")

    def ablations(self) -> Iterator[Job]:
        """Seeds come first, so that a part that ends early compares all switches."""
        found = {title: self._measured(title) for title in ("infinito", "indra")}
        for seed in self.seeds:
            for title, switches in (("infinito", self.plan.infinito), ("indra", self.plan.indra)):
                if title == "indra" and seed == self.seeds[0]:
                    yield Job("indra, teacher", self._teacher, "teacher")
                for name, item in switches.items():
                    run = functools.partial(self._switch, title, name, item, seed, found[title])
                    yield Job(f"{title}, {name}, seed {seed}", run, title)

    def speed(self) -> Iterator[Job]:
        training = lm_training.parsed(self.plan.training)
        for model in training.models:
            if training.recipe == "infinito" and model == "indra":
                continue  # which has no recipe of that size
            yield Job(
                f"training, {model}",
                lambda _, model=model: [lm_training.measure(model, training)],
                "training",
            )
        generation = lm_generation.parsed(self.plan.generation)
        yield Job("generation", lambda _: list(lm_generation.measured(generation)), "generation")

    def reranker(self) -> Iterator[Job]:
        for config in self.plan.rerankers:
            yield Job(config.name, functools.partial(self._reranker, config), config.name)

    def heads(self) -> Iterator[Job]:
        jobs = grid([self.plan.heads], (), self.plan.variants, self.seeds)
        options = ablate.Options(runs=self.runs / "heads", backend=BACKEND)
        for job in jobs:
            yield Job(
                f"{job.variant}, seed {job.seed}",
                lambda _, job=job: head_rows(job, jobs, options, self.tools),
                "head",
            )

    def _trained(self, item: LanguageRecipe, minutes: float, *, test: bool) -> TrainedLanguageRun:
        options = RunOptions(
            self.runs, backend=BACKEND, evaluate_test=test, max_minutes=minutes * TRAINING_SHARE
        )
        return train_language(item, options)

    def _lm(self, minutes: float) -> list[Row]:
        item = self.plan.lm
        trained = self._trained(item, minutes, test=True)
        return language_rows(item, trained, self.plan.real)

    def _samples(self, _: float) -> list[Row]:
        return [sample_row(self.plan, self.runs)]

    def _teacher(self, minutes: float) -> list[Row]:
        trained = self._trained(self.plan.teacher, minutes, test=False)
        said = whole(trained)
        return [row("indra: teacher", said["best_dev"], "dev perplexity a token", training=said)]

    def _switch(
        self,
        title: str,
        name: str,
        item: LanguageRecipe,
        seed: int,
        found: dict[str, dict[int, Row]],
        minutes: float,
    ) -> list[Row]:
        base = item.base and item.base.replace("{seed}", str(seed))
        seeded = item.changed(name=f"{item.name}-s{seed}", base=base, train={"seed": seed})
        trained = self._trained(seeded, minutes, test=False)
        said = whole(trained)
        prepared = prepare_language(seeded, say=_quiet)
        scorer = language_module(BACKEND, "language_scoring").load_segment_scorer(trained.best)
        modes = perplexities(scorer, prepared, "dev", item.evaluation.batch_size, item.evaluation.stride)
        found.setdefault(name, {})[seed] = switch_values(modes) | {"training": said, "commit": git_commit()}
        return switch_rows(title, found, reference=next(iter(getattr(self.plan, title))))

    def _measured(self, title: str) -> dict[str, dict[int, Row]]:
        """Switch -> seed -> what earlier calls measured of it, with the same length and data."""
        names = {f"{title}: {name}": name for name in getattr(self.plan, title)}
        return {
            names[made["what"]]: {int(seed): value for seed, value in made["measured"].items()}
            for made in self.record.rows
            if made["what"] in names
        }

    def _reranker(self, config: RerankerConfig, minutes: float) -> list[Row]:
        options = RunOptions(self.runs, backend=BACKEND, max_minutes=minutes * TRAINING_SHARE)
        trained = train_recipe(config, options, self.tools.data(config.data))
        return list(ranking_rows(config, read_json(trained.folder / RESULTS_FILE)))


def whole(trained: TrainedLanguageRun) -> dict[str, Any]:
    """What is said of a training that ran to its end; NotRun for one that time cut."""
    said = trained.training
    if said["stopped"] == "time":
        raise NotRun(f"cut at step {said['steps']} of {said['planned_steps']}: give the part more minutes")
    return said


# --- rows ---


def row(
    what: str, ours: float | None, unit: str, peer: float | None = None, peer_name: str = "", **more: Any
) -> Row:
    """A row of one number; `ratio` is for those who know which way is better."""
    made = {"what": what, "ours": ours, "peer": peer, "peer_name": peer_name, "unit": unit, "ratio": None}
    return {**made, "runs": {"ours": [] if ours is None else [ours]}, **more}


def against(made: Row, target: tuple[str, float] | None, *, lower: bool) -> Row:
    """The row with a number that was measured elsewhere beside it, where there is one to compare with."""
    if target is None or made["ours"] is None:
        return made
    name, peer = target
    ratio = peer / made["ours"] if lower else made["ours"] / peer
    return {**made, "peer": peer, "peer_name": name, "ratio": ratio}


def language_rows(item: LanguageRecipe, trained: TrainedLanguageRun, real: bool) -> list[Row]:
    """Perplexity by evaluation, of the test split, speed and memory of one training."""
    log, said = read_metrics(trained.folder), trained.training
    stored = read_json(trained.folder / RESULTS_FILE)
    by_step = [[line["step"], line["perplexity"]] for line in log if line["kind"] == "dev"]
    dev = row(
        f"{item.name}: dev perplexity a token, best",
        said["best_dev"],
        "perplexity",
        by_step=by_step,
        training=said,
        seconds=log[-1]["seconds"],
        note="by_step: one an epoch; of the memory's cached mode, the averaged weights",
    )
    rows = [against(dev, DEV_TARGET if real else None, lower=True)]
    for found in stored["test"]:
        made = row(
            f"{item.name}: test perplexity a word, {found['mode']}", found["word"], "perplexity", result=found
        )
        rows.append(against(made, LITERATURE[found["mode"]] if real else None, lower=True))
    model: Any = language_config(read_config(trained.best), trained.best)
    return [*rows, *speed_rows(item, model, log)]


def speed_rows(item: LanguageRecipe, model: InfinitoConfig, log: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Counted tokens a second between lines of the log without an evaluation; the share of the GPU's peak."""
    import jax

    rates = token_rates(item, log)
    device, count = jax.devices()[0], jax.device_count()
    per_token = flops_per_token(model)
    peak = PEAK_BF16.get(device.device_kind) if item.train.precision != "float32" else None
    rate = median(rates) if rates else None
    known = {"device": device.device_kind, "devices": count, "flops_a_token": per_token, "flops": FLOPS}
    speed = row(f"{item.name}: training", rate, "tokens/s", **known)
    mfu = row(
        f"{item.name}: training, share of the peak (MFU)",
        rate * per_token / (peak * count) if rate and peak else None,
        "of dense bfloat16 FLOP/s",
        **known,
        peak_flops=peak or "not known for this device or precision",
    )
    memory = device.memory_stats() or {}
    used = memory.get("peak_bytes_in_use")
    held = row(f"{item.name}: device memory of the process at its peak", used and used / 2**30, "GiB")
    return [{**speed, "runs": {"ours": rates}}, against(mfu, ("the target", MFU_TARGET), lower=False), held]


def token_rates(item: LanguageRecipe, log: Sequence[Mapping[str, Any]]) -> list[float]:
    """Tokens a second of each stretch between two lines of training, padding and evaluations left out."""
    tokens = item.train.batch_size * item.train.unroll * item.model.context
    return [
        tokens
        * after["counted_share"]
        * (after["step"] - before["step"])
        / (after["seconds"] - before["seconds"])
        for before, after in itertools.pairwise(log)
        if before["kind"] == after["kind"] == "train" and after["seconds"] > before["seconds"]
    ]


def flops_per_token(model: InfinitoConfig) -> float:
    """Of a training step, by the formula FLOPS."""
    width, slots = model.hidden_size, model.memory_slots + 1 if model.remembers else 0
    attention = model.num_hidden_layers * model.context + slots
    return float(6 * parameter_count(model) + 12 * width * attention)


def sample_row(plan: Plan, runs: Path) -> Row:
    """Texts and their metrics, beside human text from the same places of dev."""
    prepared = prepare_language(plan.lm, say=_quiet)
    tokenizer, unknown = prepared.tokenizer, prepared.tokenizer.unknown_ids
    generator = load_generator(runs / plan.lm.name, BACKEND)
    sizes: dict[str, Any] = {"prompt_tokens": plan.prompt_tokens, "new_tokens": plan.new_tokens}
    prompts = split_prompts(prepared.split("dev"), count=plan.samples, seed=0, **sizes)
    sampling = SamplingConfig(max_new_tokens=plan.new_tokens, temperature=1.0, banned=unknown)
    metrics = {"human text": human_metrics(prompts, tokenizer)}
    free = dataclasses.replace(sampling, banned=())
    metrics["<unk> allowed"], _ = measured_samples(generator, prompts, free)
    metrics["<unk> banned"], made = measured_samples(generator, prompts, sampling)
    cooler = dataclasses.replace(sampling, temperature=0.8)
    demo = generator.generate(DEMO_PROMPTS, cooler)
    texts = [
        {"prompt": prompt, "text": item.text, "temperature": 0.8}
        for prompt, item in zip(DEMO_PROMPTS, demo, strict=True)
    ]
    texts += [
        {
            "prompt": tokenizer.decode(ids),
            "text": item.text,
            "temperature": 1.0,
            "human": tokenizer.decode(own),
        }
        for ids, item, own in zip(prompts.prompts, made, prompts.human, strict=True)
    ]
    for text in texts[: len(demo)]:
        print(f"--- {text['prompt']}\n{text['text']}")
    finite = {who: json_numbers(found) for who, found in metrics.items()}
    return row(f"{plan.lm.name}: generated text", len(texts), "texts", metrics=finite, texts=texts, **sizes)


def switch_values(modes: Sequence[LanguageResult]) -> Row:
    """A run's dev perplexity a word in its own way (cached with a memory, else static), and all modes."""
    return {
        "word": modes[-1].perplexity.word,
        "static": modes[0].perplexity.word,
        "modes": [m.json() for m in modes],
    }


def switch_rows(title: str, found: Mapping[str, Mapping[int, Row]], reference: str) -> list[Row]:
    """Every switch against the reference over the seeds of both; ratio above 1: the switch is the better."""
    rows = []
    for name, seeds in found.items():
        what, unit = f"{title}: {name}", "dev perplexity a word"
        more = {"seeds": sorted(seeds), "measured": {str(seed): value for seed, value in seeds.items()}}
        both = sorted(seeds.keys() & found.get(reference, {}).keys())
        if name == reference or not both:
            values = [seeds[seed]["word"] for seed in sorted(seeds)]
            rows.append({**row(what, median(values), unit, **more), "runs": {"ours": values}})
            continue
        own, other = ([found[which][seed]["word"] for seed in both] for which in (name, reference))
        static = [found[name][seed]["static"] - found[reference][seed]["static"] for seed in both]
        rows.append(
            compared(
                what,
                own,
                other,
                reference,
                unit,
                higher_is_better=False,
                difference=float(np.mean(np.subtract(own, other))),
                static_difference=float(np.mean(static)),
                **more,
            )
        )
    return rows


def ranking_rows(config: RerankerConfig, stored: Mapping[str, Any]) -> Iterator[Row]:
    """Every ranking of a reranker's test splits against the best first stage there."""
    for table in stored["evaluation"]:
        metric, best = table["metrics"][0], table["best_first_stage"]
        firsts = {line["pool"]: line["means"][metric] for line in table["rows"] if not line["model"]}
        where = f"{source_name(table['data'], {})} {table['split']}, {table['queries']} queries"
        for line in table["rows"]:
            if not line["model"]:
                continue
            versus = line["versus_stage"].get(best, {})
            made = row(
                f"{config.name}: {where}, {line['pool']} top {table['depth']}, {line['kind']}",
                line["means"][metric],
                metric,
                **{name: versus.get(name) for name in ("difference", "interval", "p")},
                training=stored["training"],
            )
            yield against(made, (f"best first stage, {best}", firsts[best]), lower=False)


def head_rows(job: Any, jobs: Sequence[Any], options: ablate.Options, tools: ablate.Tools) -> list[Row]:
    """Train one run of the grid; the rows of all that are finished, against the cartesian head."""
    ablate.train(job, options, tools)
    rows = []
    for collection, outcomes in read_outcomes(options.runs, jobs).items():
        found = {result.variant: result for result in results(outcomes, options.reference)}
        reference = found.get(options.reference)
        for name, result in found.items():
            made = row(f"head {name}: {collection}", result.mean, "metric of the recipe, alone")
            made |= {
                field: value for field, value in dataclasses.asdict(result).items() if field != "variant"
            }
            made["runs"] = {"ours": list(result.seeds.values())}
            if reference is not None and name != options.reference and reference.mean:
                made = against(made, (options.reference, reference.mean), lower=False)
            rows.append(made)
    return rows


# --- running ---


def run_part(part: str, jobs: Sequence[Job], ends_at: float, record: Record) -> dict[str, Any]:
    """Run a part's jobs while there is time, writing rows and the part's own state after each."""
    state: dict[str, Any] = {"done": [], "failed": {}, "not_run": {job.name: "no time left" for job in jobs}}
    longest: dict[str, float] = {}
    started = time.monotonic()
    for job in jobs:
        begun = time.monotonic()
        left = ends_at - begun
        if left <= longest.get(job.kind, 0.0):
            continue
        print(f"== {part}: {job.name}, {left / 60:.1f} minutes left", flush=True)
        state["not_run"][job.name] = "interrupted"  # what stands in the file should this be the end
        write_state(part, state, started, record)
        try:
            rows = job.run(left / 60)
            record.add(*rows, replace=True)
            del state["not_run"][job.name]
            state["done"].append(job.name)
            tell(rows)
        except NotRun as error:
            state["not_run"][job.name] = str(error)
        except Exception as error:  # whatever it is, it must not cost the other parts
            del state["not_run"][job.name]
            if not isinstance(error, UserError):
                traceback.print_exc()
            state["failed"][job.name] = f"{type(error).__name__}: {error}"
            print(f"failed: {error}", flush=True)
        gc.collect()  # a model's arrays leave the device
        longest[job.kind] = max(longest.get(job.kind, 0.0), time.monotonic() - begun)
        write_state(part, state, started, record)
    write_state(part, state, started, record)
    return state


def write_state(part: str, state: Mapping[str, Any], started: float, record: Record) -> None:
    """A part's own row: what was done, what failed, what was not run."""
    seconds = round(time.monotonic() - started, 1)
    record.add(row(f"part {part}", None, "", **state, seconds=seconds), replace=True)


def workload(plan: Plan) -> dict[str, Any]:
    """What the rows are of; the length of the switches too, whose seeds may come from several calls."""
    switches = {"infinito": plan.infinito["infinito"].train, "indra": plan.indra["unified"].train}
    length = ("epochs", "max_steps", "batch_size", "unroll")
    return {
        "recipes": "configs/" if plan.real else "toy",
        **{title: {name: getattr(train, name) for name in length} for title, train in switches.items()},
    }


def tell(rows: Sequence[Row]) -> None:
    for made in rows:
        ours = "not known" if made["ours"] is None else f"{made['ours']:,.4g} {made['unit']}"
        beside = f"; {made['peer_name']}: {made['peer']:,.4g}" if made["peer"] is not None else ""
        print(f"{made['what']}: {ours}{beside}", flush=True)


def budgets(words: Sequence[str], parts: Sequence[str]) -> dict[str, float]:
    """Minutes of each part: PART=N as said; a bare number is the whole call's, which the others share."""
    total, named = 9.5, dict[str, float]()
    for word in words:
        part, named_one, number = word.rpartition("=")
        try:
            minutes = float(number)
        except ValueError:
            minutes = math.nan
        if not 0 <= minutes < math.inf or (named_one and part not in parts):
            raise UserError(
                f"--minutes {word}: give a number >= 0 for the whole call, or PART=NUMBER with a part of "
                f"--parts ({', '.join(parts)})"
            )
        if named_one:
            named[part] = minutes
        else:
            total = minutes
    rest = max(0.0, total - sum(named.values()))
    shares = sum(PARTS[part] for part in parts if part not in named)
    return {part: named[part] if part in named else rest * PARTS[part] / shares for part in parts}


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="names by commas; all when absent")
    parser.add_argument(
        "--minutes", nargs="+", default=["9.5"], metavar="N|PART=N", help="of the call, of a part"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of switches and heads")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "gpu_suite", help="where trainings lie")
    parser.add_argument("--results", type=Path, help=f"{RESULTS.relative_to(ROOT)}; of --toy the --runs")
    parser.add_argument("--toy", action="store_true", help="tiny models on any machine: does it run?")
    options = parser.parse_args(argv)
    options.parts = list(dict.fromkeys(part for part in options.parts.split(",") if part))
    if unknown := [part for part in options.parts if part not in PARTS] or not options.parts:
        raise UserError(f"--parts {unknown}: allowed: {', '.join(PARTS)}, by commas")
    if len(set(options.seeds)) < len(options.seeds) or min(options.seeds) < 0:
        raise UserError("--seeds: numbers >= 0, each once")
    options.results = options.results or (options.runs if options.toy else RESULTS)
    return options


def main(argv: Sequence[str] | None = None) -> None:
    started = time.monotonic()
    options = parsed(argv)
    minutes = budgets(options.minutes, options.parts)
    if not options.toy:
        gpu_there()
    plan = toy(options.runs) if options.toy else full(options.runs)
    record = Record("gpu_suite", workload(plan), folder=options.results)
    if lacking := missing(plan, options.parts, options.runs):
        raise UserError(f"missing; mend it, or leave the part out with --parts:\n{listed(lacking)}")
    suite = Suite(plan, options.runs, tuple(options.seeds), record, ablate.Tools(BACKEND))
    states, ends_at = {}, started
    for part in options.parts:
        ends_at += 60 * minutes[part]
        states[part] = run_part(part, list(suite.jobs(part)), ends_at, record)
    for part, state in states.items():
        for name, why in state["not_run"].items():
            print(f"not run: {part}: {name}: {why}")
    print(f"{(time.monotonic() - started) / 60:.1f} minutes; results: {record.path}")
    failed = [f"{part}: {name}: {why}" for part, s in states.items() for name, why in s["failed"].items()]
    if failed:
        raise UserError(f"failed; the rest is in {record.path}:\n{listed(failed)}")


def _quiet(_: str) -> None:
    """What was said before."""


if __name__ == "__main__":
    run_command(main)
