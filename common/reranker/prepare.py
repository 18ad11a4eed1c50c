"""From a recipe to what a run trains on: data, first-stage candidates, training lists; all cached on disk."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from common.backends import Encoder
from common.checkpoint import HEAD_FILE
from common.config import TEACHER_OBJECTIVES, DataConfig, RerankerConfig
from common.data import lists
from common.data.combined import source_of
from common.data.negatives import joined
from common.data.original import Original, original_outputs
from common.data.pipeline import Embed, ListPlan, Recall
from common.data.records import Qrels, RankingData, Run, parse_triples, stable_id
from common.data.sources import load_ranking_data, read_trec_run
from common.errors import UserError
from common.hub import resolve_model
from common.metrics.ranking import evaluate_run, mean, ranked
from common.retrieval.candidates import FIRST_STAGES, first_stages, judged_stages
from common.retrieval.dense import embed, passage_vectors, vectors_file
from common.text import PairTokenizer

FEW_DEV_QUERIES = 20  # below which no confidence is fitted, and what dev chooses is mostly chance
CANDIDATE_DEPTH = 100  # passages kept for a query by each first stage, at least


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What training and evaluation read."""

    data: RankingData
    training: lists.StoredLists
    dev: dict[str, Run]  # first stage -> run
    dropped: dict[str, int]  # training queries left out, by reason
    first_stage: str  # the one to rerank
    old: lists.StoredLists | None = None  # unlabelled lists of the old domain, which a retraining preserves
    stages: Mapping[str, str] = dataclasses.field(default_factory=dict)  # source of combined data -> its own

    def stage_of(self, query: str) -> str:
        """The first stage to rerank for a query of the data."""
        return self.stages.get(source_of(query), self.first_stage)


def cache_root() -> Path:
    """Where candidates, vectors and lists are kept: $RESONANCE_CACHE, else ~/.cache/resonance."""
    return Path(os.environ.get("RESONANCE_CACHE", "~/.cache/resonance")).expanduser()


def load_data(config: DataConfig) -> RankingData:
    """The recipe's ranking data, validated, with mined negatives and its teacher's scores."""
    data = load_ranking_data(config.name, on_bad_row=config.on_bad_row)
    if config.mined is not None:
        data = joined(data, parse_triples(config.mined, config.on_bad_row)[0], config.mined)
    if config.teacher is None:
        return data
    scores = {
        query: {passage: score for passage, score in run.items() if passage in data.corpus}
        for query, run in read_trec_run(config.teacher).items()
        if query in data.queries
    }
    if not any(scores.values()):
        raise UserError(
            f"data.teacher {config.teacher}: scores no pair of {data.name}; its ids must be those of the "
            "data's queries and passages"
        )
    return dataclasses.replace(data, teacher=scores)


def load_old_data(config: RerankerConfig) -> RankingData | None:
    """Data of the old domain that a retraining preserves, None without; its labels may be missing."""
    name, split = config.retrain.old_data, config.retrain.old_split
    if name is None:
        return None
    data = load_ranking_data(name, on_bad_row=config.data.on_bad_row, labels=False)
    if not (data.split(split) if data.qrels else data.queries):
        where = f"in its split {split!r}" if data.qrels else "at all"
        raise UserError(
            f"retrain.old_data {name}: there are no queries {where}, and without queries there are no lists "
            "to preserve. Give queries of the old domain (they need no labels), or leave the setting out."
        )
    return data


def run_fingerprint(data: RankingData, old: RankingData | None) -> str:
    """What a run's data are known by: that of the training data and, behind it, of the old domain's."""
    return data.training_fingerprint + (f"+{old.fingerprint}" if old is not None else "")


def resolve_base(config: RerankerConfig, *, say: Callable[[str], None] = print) -> Path:
    """The directory of `model.base`. Raises UserError for a retraining from what is no checkpoint of ours."""
    directory = resolve_model(config.model.base, say=say)
    if config.retrains and not (directory / HEAD_FILE).exists():
        raise UserError(
            f"model.base {config.model.base}: a retraining begins with a reranker that a run wrote, and "
            f"{directory} has no {HEAD_FILE}. Train one first (scripts/train.py --config "
            "configs/quantum_resonance.py) and name its folder runs/<name>/best, or train anew from this "
            "base: with another recipe, or --quantum.mode superposition, --no-retrain.analyze-existing and "
            "both --retrain weights 0."
        )
    return directory


def candidates(
    data: RankingData,
    split: str,
    encoder: Encoder | None,
    judged: bool = False,
    *,
    depth: int = CANDIDATE_DEPTH,
    cache: Path | None = None,
) -> dict[str, Run]:
    """Every first stage's candidates for a split's queries: retrieved, or the judged ones scored; in combined
    data judged ones only for the parts that judge irrelevant passages too.

    At least `depth` of them, kept in `cache` (cache_root() when absent). BM25 alone without an encoder.
    """
    qrels, cache = data.split(split), cache or cache_root()
    which = FIRST_STAGES if encoder is not None else ("bm25",)
    own = _with_own_candidates(data, split) if judged else {}
    found = judged_stages(data, own, encoder, cache, which) if own else {stage: {} for stage in which}
    queries = {query: data.queries[query] for query in sorted(qrels) if query not in own}
    if queries:
        retrieved = first_stages(data, queries, encoder, max(depth, CANDIDATE_DEPTH), cache, which)
        found = {stage: run | retrieved[stage] for stage, run in found.items()}
    return found


def _with_own_candidates(data: RankingData, split: str) -> Qrels:
    """The judgements of the queries whose judged passages are ranked: all, or of such parts."""
    qrels = data.split(split)
    if not data.parts:
        return qrels
    parts = {
        name for name, part in data.parts.items() if split in part.qrels and part.judges_irrelevant(split)
    }
    return {query: grades for query, grades in qrels.items() if source_of(query) in parts}


def prepare(
    config: RerankerConfig,
    encoder: Encoder,
    data: RankingData | None = None,
    old: RankingData | None = None,
    *,
    say: Callable[[str], None] = print,
) -> Prepared:
    """Data (unless it is loaded already), dev candidates and training lists; says sizes and what was dropped.

    `old` is the old domain's, which a retraining preserves. Raises UserError for everything wrong with them.
    """
    data, old = data or load_data(config.data), old or load_old_data(config)
    judged = config.evaluation.candidates == "judged"
    directory, dropped = _write_training(config, data, encoder)
    training = lists.read_lists(directory)
    dev = candidates(data, config.data.dev_split, encoder, judged, depth=config.evaluation.dev_depth)
    sizes = ", ".join(f"{split} {len(qrels):,}" for split, qrels in sorted(data.qrels.items()))
    say(f"data: {data.name} {data.fingerprint}: {len(data.corpus):,} passages, queries: {sizes}")
    if shared := _shared(config.data, data):
        say(f"warning: training asks the same words: {shared}; what is measured on these is partly learned")
    if (few := len(data.split(config.data.dev_split))) < FEW_DEV_QUERIES:
        say(
            f"warning: dev has {few} queries: the first stage, checkpoint and fusion weight chosen on it are "
            f"mostly chance, and below {FEW_DEV_QUERIES} no confidence is fitted. Some 200 rows give enough, "
            "or a dev split of your own in a BEIR folder."
        )
    lost = "".join(f", {count:,} {reason} dropped" for reason, count in (data.dropped | dropped).items())
    say(f"training lists: {len(training):,}{lost}")
    preserved = None if old is None else _old_lists(config, old, encoder, say)
    stage, stages = _chosen_stages(config, data, dev)
    return Prepared(data, training, dev, dropped, stage, preserved, stages)


def _shared(settings: DataConfig, data: RankingData) -> str:
    """The queries of dev and test that stand in train too, counted; empty without any."""
    others = [split for split in (settings.dev_split, settings.test_split) if split in data.qrels]
    counts = {split: data.shared_queries(settings.train_split, split) for split in others}
    return ", ".join(f"{n:,} of {len(data.qrels[s]):,} {s} queries" for s, n in counts.items() if n)


def _old_lists(
    config: RerankerConfig, old: RankingData, encoder: Encoder, say: Callable[[str], None]
) -> lists.StoredLists:
    """The old domain's queries with the best passages of a first stage; no label is read."""
    retrain = config.retrain
    asked = old.split(retrain.old_split) if old.qrels else old.queries
    stage = _candidate_stage(config.data)
    queries = {query: old.queries[query] for query in sorted(asked)}
    depth = max(config.data.negative_pool, CANDIDATE_DEPTH)
    run = first_stages(old, queries, encoder, depth, cache_root(), (stage,))[stage]
    made, dropped = lists.unlabelled_lists(
        old, queries, run, config.data.negative_pool, retrain.old_queries, config.train.seed
    )
    lost = "".join(f", {count:,} {reason} dropped" for reason, count in dropped.items())
    say(f"old domain: {old.name} {old.fingerprint}: {len(made):,} unlabelled lists by {stage}{lost}")
    return lists.read_lists(lists.write_lists(made, cache_root() / "lists"))


def _chosen_stages(
    config: RerankerConfig, data: RankingData, dev: Mapping[str, Run]
) -> tuple[str, dict[str, str]]:
    """The first stage to rerank, and of combined data that of each source with dev queries: the recipe's own;
    for `auto` what ranks dev best, every source counted alike, and what ranks that source's dev best."""
    if config.evaluation.first_stage != "auto":
        return config.evaluation.first_stage, {}
    metric, qrels = config.evaluation.metric, data.split(config.data.dev_split)
    values = {stage: evaluate_run(run, qrels, (metric,))[metric] for stage, run in dev.items()}
    sources: dict[str, list[str]] = {}
    for query in qrels:
        sources.setdefault(source_of(query) if data.parts else "", []).append(query)
    means = {
        source: {stage: mean({query: of[query] for query in queries}) for stage, of in values.items()}
        for source, queries in sources.items()
    }
    best = max(dev, key=lambda stage: sum(of[stage] for of in means.values()))
    stages = {source: max(of, key=lambda stage: of[stage]) for source, of in means.items()}
    return best, stages if data.parts else {}


def plan_batches(
    config: RerankerConfig,
    prepared: Prepared,
    tokenizer: PairTokenizer,
    base: Encoder | None = None,
    original: Original | None = None,
) -> ListPlan:
    """Which lists stand in which batch of the run; counts truncation in `tokenizer`. Raises UserError.

    With `base`, batches carry its vectors of each text alone; with `original`, what it says of each pair, and
    each batch of new lists is followed by one of the old domain where there is one.
    """
    train = config.train
    if train.objective in TEACHER_OBJECTIVES and not any(item.teacher for item in prepared.training):
        raise UserError(
            f"train.objective {train.objective} learns from a teacher, and no training pair has its score: "
            "name a file with --data.teacher, or give rows `positive_scores` and `negative_scores`."
        )
    recall = None if original is None else _recall(original)
    beside = None
    if recall is not None and prepared.old is not None:
        size = config.retrain.old_batch_size
        if len(prepared.old) < size:
            raise UserError(
                f"retrain.old_data: {len(prepared.old)} lists cannot fill the {size} of each step; lower "
                f"retrain.old_batch_size to at most {len(prepared.old)}, or give more queries"
            )
        beside = ListPlan(prepared.old, tokenizer, config.data, size, train.seed, False, recall=recall)
    return ListPlan(
        prepared.training,
        tokenizer,
        config.data,
        train.batch_size,
        train.seed,
        pairs_queries(config),
        None if base is None else _known_vectors(prepared.data, base),
        fixed=config.retrains,
        recall=recall,
        beside=beside,
    )


def _recall(original: Original) -> Recall:
    return lambda pairs: original_outputs(original, pairs, cache_root())


def _known_vectors(data: RankingData, encoder: Encoder) -> Embed:
    """The encoder's vectors of texts, those of passages from the cache where the first stage filled it."""
    rows: dict[str, int] = {}
    vectors = np.zeros((0, encoder.dim), np.float32)
    for part in data.parts.values() or (data,):
        if vectors_file(encoder, cache_root(), part.fingerprint).exists():
            start = len(vectors)
            found = passage_vectors(part.corpus, encoder, cache_root(), part.fingerprint)
            rows |= {part.corpus[passage]: start + row for row, passage in enumerate(sorted(part.corpus))}
            vectors = np.concatenate((vectors, found))

    def look_up(texts: Sequence[str]) -> np.ndarray:
        if all(text in rows for text in texts):
            return vectors[[rows[text] for text in texts]]
        return embed(texts, encoder, "query")

    return look_up


def _write_training(
    config: RerankerConfig, data: RankingData, encoder: Encoder
) -> tuple[Path, dict[str, int]]:
    """The folder of the training lists, and how many queries were dropped for what reason."""
    settings = config.data
    run = _negatives(config, data, encoder)
    related = _related(config, data, encoder)
    retrieved = None
    if settings.positives == "retrieved":
        found = candidates(data, settings.train_split, encoder, depth=settings.negative_pool)
        retrieved = found[_candidate_stage(settings)]
    made, dropped = lists.build_lists(
        data,
        settings.train_split,
        run,
        settings.negative_pool,
        related,
        settings.max_samples,
        config.train.seed,
        retrieved,
    )
    if settings.flipped_labels:
        made = lists.flip_labels(made, settings.flipped_labels, config.train.seed)
    return lists.write_lists(made, cache_root() / "lists"), dropped


def _candidate_stage(settings: DataConfig) -> str:
    """The first stage that lists are made of: the one negatives come from, where they come from one."""
    return settings.negatives if settings.negatives in FIRST_STAGES else "rrf"


def _negatives(config: RerankerConfig, data: RankingData, encoder: Encoder) -> Run:
    source, split = config.data.negatives, config.data.train_split
    given = lists.given_negatives(data)
    if source == "given" or (source == "auto" and given.keys() >= data.split(split).keys()):
        return given
    if source == "auto":
        return candidates(data, split, encoder, depth=config.data.negative_pool)["rrf"] | given
    if source == "random":
        return lists.random_negatives(data, split, config.data.negative_pool, config.train.seed)
    if source == "judged":
        return candidates(data, split, encoder, judged=True, depth=config.data.negative_pool)["rrf"]
    assert source in FIRST_STAGES
    return candidates(data, split, encoder, depth=config.data.negative_pool)[source]


def _related(config: RerankerConfig, data: RankingData, encoder: Encoder) -> lists.Related:
    if not pairs_queries(config):
        return {}
    ids = sorted(data.split(config.data.train_split))
    vectors = embed([data.queries[query] for query in ids], encoder, "query")
    return lists.related_queries(vectors, ids, config.data.related_threshold)


def dev_queries(judged: Qrels, limit: int | None, *, by_part: bool = False) -> list[str]:
    """The dev queries scored during training: at most `limit`, a fixed sample.

    `by_part`, for combined data, takes them in turn from each part.
    """
    order = sorted(judged, key=lambda query: stable_id("", query))
    if by_part:
        before: Counter[str] = Counter()  # part -> queries of it so far
        turns = {}
        for query in order:
            turns[query] = before[source_of(query)]
            before[source_of(query)] += 1
        order.sort(key=lambda query: turns[query])
    return order[:limit]


def dev_candidates(config: RerankerConfig, prepared: Prepared) -> tuple[Qrels, Run]:
    """The dev queries scored during training: their judgements, and their candidates by the first stage, of
    combined data by the one of their source."""
    settings, data = config.evaluation, prepared.data
    judged = data.split(config.data.dev_split)
    qrels = {
        query: judged[query] for query in dev_queries(judged, settings.dev_queries, by_part=bool(data.parts))
    }
    stage = {query: prepared.dev[prepared.stage_of(query)].get(query, {}) for query in qrels}
    depth = None if settings.candidates == "judged" and not data.parts else settings.dev_depth
    return qrels, {
        query: {passage: stage[query][passage] for passage in ranked(stage[query], depth)}
        for query in qrels
        if stage.get(query)
    }


def pairs_queries(config: RerankerConfig) -> bool:
    """Whether the recipe has an entanglement term, so that batches bring related queries together."""
    return config.entangles
