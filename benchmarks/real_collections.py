"""Our reranker and sentence-transformers' CrossEncoder, trained on the same pairs of real collections.

    python benchmarks/real_collections.py train --collection conala --variant listwise st --seed 0 1 2
    python benchmarks/real_collections.py table --collection conala

One collection left out: train --collection general-less-conala --variant resonance, then
table --collection conala --trained-on general-less-conala.

`train` leaves runs below runs/bench/<collection>/; finished ones are not trained again, ours resume where
they stopped. `table` evaluates every finished run, prints the Markdown table and records its rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import RESULTS, Record, Row
from common.backends import Encoder, Scorer, Scores, checkpoint_identity, load_encoder, load_scorer
from common.checkpoint import read_json
from common.config import RerankerConfig, load_recipe, to_dict
from common.data.negatives import MiningRules
from common.data.records import RankingData, Run
from common.data.sources import read_trec_run, read_tsv_qrels
from common.errors import UserError, run_command
from common.hub import resolve_model
from common.metrics.ranking import evaluate_run, mean
from common.metrics.significance import bootstrap_interval, paired_randomisation
from common.reranker.ablation import TERM_VARIANTS
from common.reranker.evaluation import Table, evaluate
from common.reranker.mining import mine_negatives, with_negatives
from common.reranker.prepare import Prepared, cache_root, candidates, dev_candidates, load_data, prepare
from common.retrieval.fusion import choose_omega
from common.runs import RunFolder
from common.text import PASSAGE, QUERY, PairTokenizer

ROOT = Path(__file__).resolve().parents[1]
PEER = "st"
PEER_RATE, PEER_BATCH, PEER_WARMUP = 2e-5, 16, 0.1  # what sentence-transformers recommends
RESULT = "result.json"  # written last: a run that has it is finished


# --- collections, recipes and variants ---


@dataclasses.dataclass(frozen=True)
class Collection:
    """How one collection is trained on and measured; `recipe` holds changes to RerankerConfig by part.

    The recipe's first stage ranks dev best of all: its candidates choose checkpoint and fusion weight.
    """

    title: str
    recipe: Mapping[str, Mapping[str, Any]]
    pools: tuple[str, ...]  # whose candidates are reranked
    depth: int
    metrics: tuple[str, ...] = ("nDCG@10", "RR@10", "AP")
    trained: bool = True
    tested: bool = True
    folder: str = ""  # of the data, when it is not the collection's own name
    config: tuple[str, str | None] | None = None  # a recipe of configs/ and its preset, in place of `recipe`


_SHORT = {"list_size": 6, "max_query_tokens": 48, "max_passage_tokens": 48}
_LONG = {"list_size": 6, "max_query_tokens": 64, "max_passage_tokens": 192}
COLLECTIONS = {
    "conala": Collection(
        "CoNaLa",
        {
            "data": {**_SHORT, "max_samples": 1200},
            "train": {"max_steps": 150, "batch_size": 8, "learning_rate": 1e-4},
            "evaluation": {"dev_queries": 80, "dev_depth": 15, "first_stage": "dense"},
        },
        ("dense",),
        30,
    ),
    "conala-small": Collection(  # for the variants: many runs
        "CoNaLa, a third of its training",
        {
            "data": {**_SHORT, "list_size": 4, "max_samples": 480},
            "train": {"max_steps": 60, "batch_size": 8, "learning_rate": 1e-4, "evaluations": 1},
            "evaluation": {"dev_queries": 80, "dev_depth": 15, "first_stage": "dense"},
        },
        ("dense",),
        15,
        folder="conala",
    ),
    "scifact": Collection(
        "SciFact",
        {
            "data": _LONG,
            "quantum": {"portable_weight": 0.1},
            "train": {"max_steps": 500, "batch_size": 3, "learning_rate": 1e-4, "evaluations": 1},
        },
        ("rrf",),
        20,
    ),
    "nfcorpus": Collection(
        "NFCorpus",
        {  # 43 labels a query, two thirds of them beyond any first stage's best 100
            "data": {
                **_LONG,
                **{"list_size": 8, "max_positives": 3, "max_passage_tokens": 128, "max_samples": 600},
                **{"positives": "retrieved", "negative_pool": 100},
            },
            "train": {"max_steps": 300, "batch_size": 3, "learning_rate": 1e-4, "evaluations": 2},
            "evaluation": {"dev_queries": 80, "dev_depth": 20},
        },
        ("bm25", "rrf"),
        50,
    ),
    "wikiqa": Collection(
        "WikiQA",
        {
            "data": {**_SHORT, "max_passage_tokens": 64, "negatives": "judged"},
            "train": {"max_steps": 200, "batch_size": 8},
            "evaluation": {"dev_queries": 126, "dev_depth": 12, "candidates": "judged"},
        },
        ("rrf",),
        100,
    ),
    "trec-dl19": Collection(
        "TREC DL 2019, zero-shot",
        {"data": _LONG},
        ("bm25",),
        100,
        ("nDCG@10", "RR(rel=2)@10", "AP(rel=2)"),
        trained=False,
    ),
    "pydocs": Collection("pydocs", {}, ("rrf",), 50, config=("quantum_resonance.py", None)),
    **{
        name: Collection(title, {}, (), 0, tested=False, config=("general_reranker.py", preset))
        for name, title, preset in (
            ("general", "all collections", None),
            ("general-less-conala", "all but CoNaLa", "less_conala"),
            ("general-less-wikiqa", "all but WikiQA", "less_wikiqa"),
        )
    },
}

Changes = Mapping[str, Mapping[str, Any]]
_LISTWISE: Changes = TERM_VARIANTS["listwise"]
_NOISE: Changes = {"data": {"flipped_labels": 0.2}}
MINED = "mined"
VARIANTS: dict[str, Changes] = {
    **{
        name: TERM_VARIANTS[name]
        for name in ("bce", "listwise", "superposition", "entanglement", "resonance", "unaligned")
    },
    "random": {**_LISTWISE, "data": {"negatives": "random"}},
    MINED: {**_LISTWISE, "data": {"negatives": "given"}},  # which `mined_data` gives
    "lora": {"train": {"objective": "listwise", "learning_rate": 2e-4}, "model": {"use_lora": True}},
    "listwise-noisy": {**_LISTWISE, **_NOISE},
    "resonance-noisy": {**TERM_VARIANTS["resonance"], **_NOISE},
    "cls": {**_LISTWISE, "model": {"start": "masked_lm"}},
    "segment1": {**_LISTWISE, "model": {"passage_segment": 1}},
    PEER: _LISTWISE,  # whose pairs the peer is trained on
}
# The same run less one thing: what each variant's own contribution is measured against.
WITHOUT = {
    "listwise": "unaligned",
    "random": "listwise",
    MINED: "random",
    "lora": "listwise",
    "listwise-noisy": "listwise",
    "resonance-noisy": "listwise-noisy",
    "bce": "listwise",
    "superposition": "listwise",
    "entanglement": "superposition",
    "resonance": "entanglement",
    "cls": "listwise",
    "segment1": "listwise",
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One run: what it is trained on, by which variant, from which seed."""

    collection: str
    variant: str
    seed: int
    rate: float | None  # the recipe's own when absent
    steps: int | None
    queries: int | None
    data: Path

    @property
    def config(self) -> RerankerConfig:
        return self._config().validate()

    @property
    def name(self) -> str:
        """The run's folder; two different runs never share it."""
        config = self.config
        queries = config.data.max_samples or "all"
        length = f"n{config.train.max_steps}" if not config.train.epochs else f"e{config.train.epochs:g}"
        return f"{self.variant}-lr{config.train.learning_rate:g}-q{queries}-{length}-s{self.seed}"

    def _config(self) -> RerankerConfig:
        config = base_config(self.collection, self.data)
        config = config.changed(**VARIANTS[self.variant])
        train: dict[str, Any] = {"seed": self.seed, "checkpoint_every": 100}
        if rate := self.rate or (PEER_RATE if self.variant == PEER else None):
            train["learning_rate"] = rate
        if self.steps:
            train |= {"max_steps": self.steps, "epochs": 0.0}
        config = config.changed(train=train)
        return config.changed(data={"max_samples": self.queries}) if self.queries else config


def base_config(collection: str, data: Path) -> RerankerConfig:
    """A collection's recipe; pydocs and the general ones have a command's own."""
    settings = COLLECTIONS[collection]
    if settings.config is not None:
        file, preset = settings.config
        config = load_recipe(str(ROOT / "configs" / file), preset)
        return config.changed(data={"name": config.data.name.replace("$RESONANCE_DATA", str(data))})
    common: Changes = {
        "data": {"name": str(data / (settings.folder or collection))},
        "train": {"epochs": 0.0, "max_steps": 1, "learning_rate": 5e-5, "evaluations": 3},
        "evaluation": {"depth": settings.depth, "first_stage": "rrf"},
    }
    return RerankerConfig(name=collection).changed(**common).changed(**settings.recipe)


# --- training ---


def train(job: Job, root: Path, encoder: Encoder) -> None:
    """Train one run unless it is finished. Training state is dropped at the end: the runs are many."""
    path = root / job.collection / job.name
    config = job.config
    recipe = to_dict(config)
    if (path / RESULT).exists():
        check_recipe(path, recipe)
        print(f"{path}: finished before")
        return
    print(f"== {job.collection} {job.name}")
    prepared = prepare(config, encoder, mined_data(config, encoder) if job.variant == MINED else None)
    folder = RunFolder.create(
        path.parent, job.name, recipe, data_fingerprint=prepared.data.training_fingerprint
    )
    started = time.monotonic()
    with folder:
        if job.variant == PEER:
            trained = train_peer(config, prepared, folder)
        else:
            from jax_impl.training.loop import Trainer

            trained = Trainer(config, prepared).run(folder)
        about = {
            "collection": job.collection,
            "variant": job.variant,
            "seed": job.seed,
            "learning_rate": config.train.learning_rate,
            "data_fingerprint": prepared.data.fingerprint,
            "seconds": round(time.monotonic() - started, 1),
            "resumed": folder.resumed,
        }
        folder.write_json(RESULT, about | trained)
        shutil.rmtree(folder.state, ignore_errors=True)


def mined_data(config: RerankerConfig, encoder: Encoder) -> RankingData:
    """The collection with what scripts/mine_negatives.py finds by its own rules for the training queries."""
    rules = MiningRules(count=config.data.negative_pool)
    data = load_data(config.data)
    mined, lost = mine_negatives(data, config.data.train_split, rules, encoder=encoder)
    print("mined: " + ", ".join(f"{number:,} {reason} left out" for reason, number in lost.items()))
    return with_negatives(data, mined)


def check_recipe(run: Path, recipe: Mapping[str, Any]) -> None:
    """Refuse a finished run of another recipe; a setting that is newer than the run had its default then."""
    stored = read_json(run / "config.json")["config"]
    defaults = to_dict(RerankerConfig())
    differ = [
        f"{part}.{name}"
        for part, settings in recipe.items()
        if isinstance(settings, Mapping)
        for name, value in settings.items()
        if json.dumps(stored.get(part, {}).get(name, defaults.get(part, {}).get(name))) != json.dumps(value)
    ]
    if differ:
        raise UserError(
            f"{run} was trained with other settings than its collection and variant have now "
            f"({', '.join(differ)}): delete it or move it away."
        )


def training_pairs(config: RerankerConfig, prepared: Prepared) -> Iterator[tuple[str, str, float]]:
    """(query, passage, 1 relevant or 0) of every candidate that our run sees, in its order, cut alike."""
    from common.data.pipeline import ListPlan
    from common.training import planned_steps

    data, training = config.data, prepared.training
    directory = resolve_model(config.model.base, say=lambda _: None)
    tokenizer = PairTokenizer(directory, data.max_query_tokens, data.max_passage_tokens)
    plan = ListPlan(training, tokenizer, data, config.train.batch_size, config.train.seed, False)
    texts = sorted({text for item in training for text in (*item.positives, *item.negatives)})
    ids, _ = tokenizer.passage_ids(texts)
    passages = dict(zip(map(tuple, ids), tokenizer.cut(texts, data.max_passage_tokens), strict=True))
    queries = tokenizer.cut([item.query for item in training], data.max_query_tokens)
    query_ids, _ = tokenizer.query_ids([item.query for item in training])
    for step in range(planned_steps(config.train, len(plan))):
        batch = plan.batch(step)
        for row, column in np.argwhere(batch.mask):
            tokens, sides = batch.input_ids[row, column], batch.sides[row, column]
            query = int(batch.query_index[row])
            assert np.array_equal(tokens[sides == QUERY], query_ids[query])
            label = float(batch.labels[row, column] > 0)
            yield queries[query], passages[tuple(tokens[sides == PASSAGE])], label


def train_peer(config: RerankerConfig, prepared: Prepared, folder: RunFolder) -> dict[str, Any]:
    """CrossEncoderTrainer with BCE and our dropout, one pass over `training_pairs`; best/ holds the best of
    as many dev evaluations as ours has. Positives weigh as much as negatives, as its examples recommend."""
    import torch
    from datasets import Dataset
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
    from transformers import set_seed

    use_all_cores()
    seed, limits = config.train.seed, (config.data.max_query_tokens, config.data.max_passage_tokens)
    pairs = list(training_pairs(config, prepared))
    queries, passages, labels = (list(column) for column in zip(*pairs, strict=True))
    positives = sum(labels)
    set_seed(seed)
    base = resolve_model(config.model.base, say=lambda _: None)
    dropout = {
        "hidden_dropout_prob": config.train.hidden_dropout,
        "attention_probs_dropout_prob": config.train.attention_dropout,
    }
    model = CrossEncoder(str(base), num_labels=1, max_length=sum(limits) + 3, config_kwargs=dropout)
    settings = CrossEncoderTrainingArguments(
        output_dir=str(folder.path / "trainer"),
        num_train_epochs=1,
        per_device_train_batch_size=PEER_BATCH,
        learning_rate=config.train.learning_rate,
        warmup_steps=PEER_WARMUP,  # below 1: a share of the steps
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        seed=seed,
        data_seed=seed,
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
        logging_steps=50,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    steps = -(-len(pairs) // PEER_BATCH)
    dev = PeerDev(config, prepared, model, folder, steps)
    trainer = CrossEncoderTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_dict({"query": queries, "passage": passages, "label": labels}),
        loss=BinaryCrossEntropyLoss(
            model, pos_weight=torch.tensor((len(pairs) - positives) / positives, device=model.device)
        ),
        callbacks=[dev.callback()],
    )
    trainer.train()
    shutil.rmtree(folder.path / "trainer", ignore_errors=True)
    return {"steps": steps, "pairs": len(pairs), "limits": limits, **dev.best}


class PeerDev:
    """Dev during the peer's training: keeps the best checkpoint and its fusion weight, as our loop does."""

    def __init__(
        self, config: RerankerConfig, prepared: Prepared, model: Any, folder: RunFolder, steps: int
    ) -> None:
        self.settings, self.model, self.folder, self.data = config.evaluation, model, folder, prepared.data
        count = config.train.evaluations
        self.steps = {max(1, round(steps * (i + 1) / count)) for i in range(count)}
        self.limits = (config.data.max_query_tokens, config.data.max_passage_tokens)
        self.qrels, self.first = dev_candidates(config, prepared)
        self.tokenizer = PairTokenizer(resolve_model(config.model.base, say=lambda _: None), *self.limits)
        self.best: dict[str, Any] = {}

    def evaluate(self, step: int) -> None:
        pairs = [(query, passage) for query, run in self.first.items() for passage in run]
        scorer = PeerScorer(self.model, self.tokenizer)
        scores = scorer.score(
            [self.data.queries[q] for q, _ in pairs], [self.data.corpus[p] for _, p in pairs]
        )
        run: Run = {query: {} for query in self.first}
        for (query, passage), score in zip(pairs, scores.score, strict=True):
            run[query][passage] = float(score)
        metric = self.settings.metric
        omega, table = choose_omega(self.first, run, self.qrels, self.settings.fusion_grid, metric)
        self.folder.log(step, "dev", {metric: table[0.0], f"{metric} fused": table[omega]})
        baseline = mean(evaluate_run(self.first, self.qrels, (metric,))[metric])
        print(
            f"dev at step {step}: {metric} {table[0.0]:.4f} alone, {table[omega]:.4f} fused "
            f"(first stage {baseline:.4f})"
        )
        if not self.best or table[0.0] > self.best["best_dev"]:
            self.best = {"best_step": step, "best_dev": table[0.0], "fusion_weight": omega}
            self.model.save_pretrained(str(self.folder.best), create_model_card=False)

    def callback(self) -> Any:
        from transformers import TrainerCallback

        dev = self

        class OnStep(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step in dev.steps:
                    dev.evaluate(state.global_step)
                    dev.model.train()

        return OnStep()


# --- the peer as a scorer ---


class PeerScorer:
    """A CrossEncoder as a common.backends.Scorer: its logit as the full and as the portable score; texts are
    cut before, so that both libraries read the same words."""

    name = "sentence-transformers"

    def __init__(
        self,
        model: Any,
        tokenizer: PairTokenizer,
        *,
        identity: str = "",
        fusion_weight: float = 0.0,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.identity, self.fusion_weight = identity, fusion_weight

    def score(
        self,
        queries: Sequence[str],
        passages: Sequence[str],
        on_batch: Callable[[int], None] | None = None,
    ) -> Scores:
        import torch

        cut, tokenizer = self.tokenizer.cut, self.tokenizer
        pairs = list(
            zip(
                cut(queries, tokenizer.max_query_tokens),
                cut(passages, tokenizer.max_passage_tokens),
                strict=True,
            )
        )
        found = [np.zeros(0, np.float32)]
        for start in range(0, len(pairs), 512):
            chunk = pairs[start : start + 512]
            found.append(
                self.model.predict(chunk, activation_fn=torch.nn.Identity(), show_progress_bar=False)
            )
            if on_batch is not None:
                on_batch(len(chunk))
        scores = np.concatenate(found).astype(np.float32)
        nothing = np.full(len(scores), np.nan, np.float32)
        return Scores(scores, scores, nothing, nothing, nothing)


def load_ours(run: Path, limits: tuple[int, int] | None) -> Scorer:
    """Our best checkpoint of a run; `limits` (query, passage tokens) replace those it was trained with."""
    scorer: Any = load_scorer(run / "best", say=lambda _: None)
    if limits is not None:
        scorer.tokenizer = PairTokenizer(run / "best", *limits)
        scorer.identity = checkpoint_identity(run / "best", "limits", limits)
    return scorer


def load_peer(run: Path, limits: tuple[int, int] | None) -> PeerScorer:
    """The peer's best checkpoint of a run, `limits` as above."""
    from sentence_transformers import CrossEncoder

    use_all_cores()
    result = read_json(run / RESULT)
    limits = limits or (int(result["limits"][0]), int(result["limits"][1]))
    directory = run / "best"
    return PeerScorer(
        CrossEncoder(str(directory), max_length=sum(limits) + 3),
        PairTokenizer(directory, *limits),
        identity=checkpoint_identity(directory, PEER, limits),
        fusion_weight=result["fusion_weight"],
    )


def use_all_cores() -> None:
    """Give torch every core that JAX has; its own default is half of them on hyper-threads."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)


# --- the table ---


@dataclasses.dataclass(frozen=True)
class Ranking:
    """One line of the table: nDCG@10 by query, mean over seeds, and what it is compared with."""

    pool: str
    label: str
    kind: str  # first stage, alone, fused, portable
    values: np.ndarray  # [Q], the first metric
    means: dict[str, float]  # metric -> mean over queries and seeds
    seeds: tuple[float, ...] = ()  # the first metric of each seed
    omegas: tuple[float, ...] = ()
    trained_on: str = ""
    variant: str = ""
    rate: float = 0.0


@dataclasses.dataclass(frozen=True)
class Versus:
    """A paired comparison of two rankings: mean difference, its interval, p."""

    name: str
    other: Ranking
    difference: float
    interval: tuple[float, float]
    p: float


Group = tuple[str, str, float]  # trained on, variant, learning rate


def finished(root: Path, collection: str, options: argparse.Namespace) -> dict[Group, list[Path]]:
    """The finished runs to measure on a collection: those of --trained-on, or its own, or every other's where
    it has none."""
    own = [collection] if COLLECTIONS[collection].trained else ["conala", "scifact", "nfcorpus", "wikiqa"]
    names = options.trained_on or own
    groups: dict[Group, list[Path]] = {}
    for name in names:
        for file in sorted((root / name).glob(f"*/{RESULT}")):
            result = read_json(file)
            variant, rate, seed = result["variant"], float(result["learning_rate"]), int(result["seed"])
            job = Job(name, variant, seed, rate, options.steps, options.train_queries, options.data_dir)
            wanted = options.variant is None or variant in options.variant
            if wanted and variant in VARIANTS and job.name == file.parent.name:
                check_recipe(file.parent, to_dict(job.config))
                groups.setdefault((name, variant, rate), []).append(file.parent)
    order = [*VARIANTS]
    return dict(sorted(groups.items(), key=lambda item: (item[0][0], order.index(item[0][1]), item[0][2])))


def measured(collection: str, options: argparse.Namespace) -> Collection:
    """The collection's settings with the depth that was asked for."""
    settings = COLLECTIONS[collection]
    return dataclasses.replace(settings, depth=options.depth or settings.depth)


def measure(
    collection: str, groups: Mapping[Group, Sequence[Path]], options: argparse.Namespace
) -> tuple[list[Ranking], np.ndarray, str]:
    """First stages and every group's rankings over each pool; which queries ask for a passage that a training
    query asks for too, bool [Q]; the data's fingerprint."""
    settings = measured(collection, options)
    config = base_config(collection, options.data_dir)
    data = load_data(config.data)
    qrels, stages = data.split(config.data.test_split), {}
    if settings.trained:
        judged = config.evaluation.candidates == "judged"
        stages = candidates(data, config.data.test_split, load_encoder("default"), judged)
    else:
        folder = options.data_dir / (settings.folder or collection)
        stages = {"bm25": read_trec_run(folder / "runs" / "bm25.top100.trec.gz")}
        qrels = read_tsv_qrels(folder / "qrels_full.tsv")
    qrels = {query: qrels[query] for query in sorted(qrels)[: options.max_test_queries]}
    pools = options.pools or settings.pools
    # other collections' checkpoints were trained on other lengths
    limits = None if settings.trained else (config.data.max_query_tokens, config.data.max_passage_tokens)

    def table(scorers: Sequence[Scorer]) -> Table:
        return evaluate(
            data,
            config.data.test_split,
            stages,
            scorers,
            depth=settings.depth,
            pools=pools,
            cache_dir=cache_root(),
            metrics=settings.metrics,
            qrels=qrels,
        )

    rankings = list(_averaged("", ("", "", 0.0), [table(())], list(qrels)))
    for (trained_on, variant, rate), runs in groups.items():
        name = "sentence-transformers" if variant == PEER else variant
        known = Job(trained_on, variant, 0, None, None, None, options.data_dir).config.train.learning_rate
        label = name + (f" {rate:.0e}".replace("e-0", "e-") if variant == PEER or rate != known else "")
        if trained_on != collection:
            label += f", trained on {COLLECTIONS[trained_on].title}"
        tables = []
        for run in runs:
            print(f"{collection}: {run.parent.name}/{run.name}")
            tables.append(table([(load_peer if variant == PEER else load_ours)(run, limits)]))
        rankings += _averaged(label, (trained_on, variant, rate), tables, list(qrels))
    alone = settings.trained and options.trained_on in (None, [collection])
    trained = data.split(config.data.train_split) if alone else {}
    known = {passage for grades in trained.values() for passage, grade in grades.items() if grade > 0}
    familiar = [any(grade > 0 and p in known for p, grade in grades.items()) for grades in qrels.values()]
    return rankings, np.asarray(familiar), data.fingerprint


def _averaged(label: str, group: Group, tables: Sequence[Table], queries: Sequence[str]) -> Iterator[Ranking]:
    """The rankings of one group, its seeds averaged query by query; the first stages' without a label."""
    for rows in zip(*(table.rows for table in tables), strict=True):
        first = rows[0]
        if bool(first.model) != bool(label) or (group[1] == PEER and first.kind == "portable"):
            continue
        metric = next(iter(first.means))
        yield Ranking(
            pool=first.pool,
            label=label or first.pool,
            kind=first.kind,
            values=np.mean([[row.values[metric][query] for query in queries] for row in rows], axis=0),
            means={name: float(np.mean([row.means[name] for row in rows])) for name in first.means},
            seeds=tuple(row.means[metric] for row in rows),
            omegas=tuple(row.omega for row in rows if row.omega is not None),
            trained_on=group[0],
            variant=group[1],
            rate=group[2],
        )


def peers_of(groups: Mapping[Group, Sequence[Path]], trained_on: str) -> dict[str, float]:
    """The peer's recommended learning rate, and another where its mean dev metric is the best."""
    rates = {
        rate: float(np.mean([read_json(run / RESULT)["best_dev"] for run in runs]))
        for (name, variant, rate), runs in groups.items()
        if (name, variant) == (trained_on, PEER)
    }
    best = max(rates, key=lambda rate: rates[rate], default=PEER_RATE)
    found = {"recommended": PEER_RATE, "best on dev": best} if best != PEER_RATE else {"recommended": best}
    return {what: rate for what, rate in found.items() if rate in rates}


def comparisons(
    ranking: Ranking, rankings: Sequence[Ranking], groups: Mapping[Group, Sequence[Path]]
) -> list[Versus]:
    """Against the pool's first stage, the best first stage, both peers, and the same run less one thing."""
    firsts = [other for other in rankings if other.kind == "first stage"]
    best = max(firsts, key=lambda other: other.values.mean())
    found = {"pool": next(other for other in firsts if other.pool == ranking.pool)}
    if best is not found["pool"]:
        found["best first stage"] = best
    rivals = {
        (other.variant, other.rate): other
        for other in rankings
        if (other.pool, other.trained_on) == (ranking.pool, ranking.trained_on)
        and other.kind
        in (ranking.kind, "alone" if other.variant == PEER and ranking.kind == "portable" else "")
    }
    if ranking.variant != PEER:
        for what, rate in peers_of(groups, ranking.trained_on).items():
            found[what] = rivals[PEER, rate]
        base = WITHOUT.get(ranking.variant, "")
        rates = sorted((rate for variant, rate in rivals if variant == base), key=lambda r: r != ranking.rate)
        if rates:  # at the same rate where there is such a run
            found[base] = rivals[base, rates[0]]
    return [_versus(name, ranking, other) for name, other in found.items()]


def _versus(name: str, a: Ranking, b: Ranking) -> Versus:
    interval = bootstrap_interval(a.values, b.values)
    difference = float(np.mean(a.values - b.values))
    return Versus(name, b, difference, interval, paired_randomisation(a.values, b.values))


def markdown(
    heading: str, settings: Collection, rankings: Sequence[Ranking], versus: Mapping[int, Sequence[Versus]]
) -> str:
    """The table for a README: one line per ranking, with its paired comparisons."""
    first, *others = settings.metrics
    columns = ["candidates", "ranking", f"{first} [95%]", *others, "seeds"]
    names = list(dict.fromkeys(item.name for items in versus.values() for item in items))
    shown = [name for name in ("pool", "best first stage", "recommended", "best on dev") if name in names]
    without = any(name not in shown for name in names)
    titles = {
        "pool": "Δ candidates' own order",
        "best first stage": "Δ best first stage",
        "recommended": "Δ peer, recommended rate",
        "best on dev": "Δ peer, its best rate",
    }
    columns += [titles[name] for name in shown] + (["Δ without it"] if without else [])
    lines = [heading, "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for number, ranking in enumerate(rankings):
        if ranking.kind == "portable":
            continue
        low, high = bootstrap_interval(ranking.values)
        cells = [
            ranking.pool,
            ranking.kind if ranking.kind == "first stage" else f"{ranking.label}, {ranking.kind}",
            f"{ranking.values.mean():.3f} [{low:.3f}, {high:.3f}]",
            *(f"{ranking.means[metric]:.3f}" for metric in others),
            "" if ranking.kind == "first stage" else str(len(ranking.seeds)),
        ]
        found = {item.name: item for item in versus.get(number, ())}
        cells += [_shown(found.get(name)) for name in shown]
        if without:
            rest = next((item for name, item in found.items() if name not in shown), None)
            cells.append(f"{rest.name}: {_shown(rest)}" if rest else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _shown(item: Versus | None) -> str:
    if item is None:
        return ""
    p = "p < 0.001" if item.p < 0.001 else f"p = {item.p:.3f}"
    return f"{item.difference:+.3f} [{item.interval[0]:+.3f}, {item.interval[1]:+.3f}], {p}"


def by_familiarity(rankings: Sequence[Ranking], familiar: np.ndarray) -> str:
    """What each reranking changes where training asked for the passage too, and where it did not."""
    if not 0 < familiar.sum() < len(familiar):
        return ""
    lines = []
    for mask, where in ((familiar, "is relevant to a training query too"), (~familiar, "is not")):
        lines.append(f"\n{mask.sum()} queries whose relevant passage {where}:")
        for ranking in rankings:
            if ranking.kind in ("alone", "fused"):
                first = next(r for r in rankings if r.kind == "first stage" and r.pool == ranking.pool)
                pair = (dataclasses.replace(r, values=r.values[mask]) for r in (ranking, first))
                lines.append(
                    f"- {ranking.pool}, {ranking.label}, {ranking.kind}: {_shown(_versus('', *pair))}"
                )
    return "\n".join(lines) + "\n"


def result_rows(
    where: str, settings: Collection, rankings: Sequence[Ranking], versus: Mapping[int, Sequence[Versus]]
) -> Iterator[Row]:
    """Rows for benchmarks/record.py: each of our rankings against each thing it is compared with."""
    for number, items in versus.items():
        ranking = rankings[number]
        if ranking.variant == PEER:
            continue
        ours = float(ranking.values.mean())
        for item in items:
            other = item.other
            peer = float(other.values.mean())
            kind = "first stage" if other.kind == "first stage" else f"{other.label}, {other.kind}"
            yield {
                "what": f"{where}, {ranking.pool} top {settings.depth}: {ranking.label}, {ranking.kind}",
                "ours": ours,
                "peer": peer,
                "peer_name": f"{other.pool}: {kind}" + (f" ({item.name})" if other.variant == PEER else ""),
                "unit": settings.metrics[0],
                "ratio": ours / peer if peer else None,
                "runs": {"ours": list(ranking.seeds), "peer": list(other.seeds)},
                "difference": item.difference,
                "interval": list(item.interval),
                "p": item.p,
                "means": ranking.means,
                "fusion_weights": list(ranking.omegas),
            }


def make_table(collection: str, options: argparse.Namespace) -> None:
    """Evaluate a collection's finished runs, print the Markdown table, record the rows."""
    settings = measured(collection, options)
    groups = finished(options.runs, collection, options)
    rankings, familiar, fingerprint = measure(collection, groups, options)
    queries = len(familiar)
    versus = {
        number: comparisons(ranking, rankings, groups)
        for number, ranking in enumerate(rankings)
        if ranking.kind != "first stage"
    }
    part = "first " if options.max_test_queries else ""
    training = "".join(
        f", {count} training {what}"
        for what, count in (("steps", options.steps), ("queries", options.train_queries))
        if count
    )
    where = f"{settings.title} test, {part}{queries} queries{training}"
    heading = f"**{where}**, top {settings.depth} reranked (data {fingerprint})"
    text = markdown(heading, settings, rankings, versus)
    print("\n" + text + by_familiarity(rankings, familiar))
    if rows := list(result_rows(where, settings, rankings, versus)):
        workload = {
            "task": "rerank a first stage's candidates; the mean over seeds, paired tests over queries",
            "base": "all-MiniLM-L6-v2",
            "recipes": "COLLECTIONS and VARIANTS in benchmarks/real_collections.py",
        }
        record = Record("real_collections", workload, folder=options.results)
        record.add(*rows, replace=True)
        print(f"{len(rows)} rows recorded in {record.path}")


# --- the command ---


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    both = argparse.ArgumentParser(add_help=False)
    data = Path(os.environ.get("RESONANCE_DATA", ROOT.parent / "shared" / "data"))
    both.add_argument("--collection", nargs="+", required=True, choices=[*COLLECTIONS])
    both.add_argument("--data-dir", type=Path, default=data, help="BEIR folders; default $RESONANCE_DATA")
    both.add_argument("--runs", type=Path, default=ROOT / "runs" / "bench")
    both.add_argument("--steps", type=int, help="instead of the recipe's")
    both.add_argument("--train-queries", type=int, help="instead of the recipe's")
    training = commands.add_parser("train", parents=[both], help="train what is not finished")
    training.add_argument("--variant", nargs="+", required=True, choices=[*VARIANTS])
    training.add_argument("--seed", nargs="+", type=int, default=[0])
    training.add_argument("--learning-rate", nargs="+", type=float, default=[None])
    table = commands.add_parser("table", parents=[both], help="evaluate what is finished")
    table.add_argument("--variant", nargs="+", choices=[*VARIANTS], help="only these")
    table.add_argument("--pools", nargs="+", help="first stages to rerank, instead of the collection's")
    table.add_argument("--max-test-queries", type=int)
    table.add_argument("--depth", type=int, help="candidates reranked, instead of the collection's")
    table.add_argument(
        "--trained-on",
        nargs="+",
        choices=[name for name, settings in COLLECTIONS.items() if settings.trained],
        help="whose checkpoints are measured, instead of the collection's own",
    )
    table.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def main() -> None:
    options = parse()
    for name in options.collection:
        settings = COLLECTIONS[name]
        folder = options.data_dir / (settings.folder or name)
        if settings.config is None and not folder.is_dir():
            raise UserError(f"no folder {folder}; give --data-dir or set RESONANCE_DATA")
        if options.command == "train" and not settings.trained:
            raise UserError(f"{name} is for evaluation only: nothing is trained on it")
        if options.command == "table" and not settings.tested:
            raise UserError(
                f"{name} is for training only: measure it on a collection, --collection conala "
                f"--trained-on {name}"
            )
    if options.command == "table":
        for name in options.collection:
            make_table(name, options)
        return
    encoder = load_encoder("default")
    for seed in options.seed:
        for collection in options.collection:
            for variant in options.variant:
                for rate in options.learning_rate:
                    job = Job(
                        collection,
                        variant,
                        seed,
                        rate,
                        options.steps,
                        options.train_queries,
                        options.data_dir,
                    )
                    train(job, options.runs, encoder)


if __name__ == "__main__":
    run_command(main)
