"""What a run trains on: where negatives come from, which first stage, whose vectors a batch carries."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.backends import load_encoder
from common.config import RerankerConfig
from common.data.lists import NOT_RETRIEVED
from common.data.sources import write_trec_run
from common.errors import UserError
from common.metrics.ranking import evaluate_run, mean, ranked
from common.reranker.prepare import (
    Prepared,
    candidates,
    dev_queries,
    load_data,
    load_old_data,
    plan_batches,
    prepare,
    resolve_base,
    run_fingerprint,
)
from common.text import PASSAGE, QUERY, PairTokenizer
from tests.tiny import World


def prepared(world: World, **data: Any) -> tuple[RerankerConfig, Prepared]:
    config = world.config()
    config = replace(config, data=replace(config.data, **data))
    return config, prepare(config, load_encoder(world.base), say=lambda _: None)


@pytest.mark.parametrize("stage", ["bm25", "dense", "rrf"])
def test_negatives_are_the_irrelevant_top_of_the_named_first_stage(world: World, stage: str) -> None:
    config, ready = prepared(world, negatives=stage)
    runs = candidates(ready.data, "train", load_encoder(world.base))
    assert len(ready.training) > 40
    for item in ready.training:
        best = [ready.data.corpus[passage] for passage in ranked(runs[stage][item.query_id])]
        expected = [text for text in best if text not in item.positives]
        assert list(item.negatives) == expected[: config.data.negative_pool]


def test_retrieved_positives_are_those_of_the_first_stage_that_brings_the_negatives(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = candidates(load_data(world.config().data), "train", load_encoder(world.base))
    some = {query: dict(list(run.items())[::2]) for query, run in runs["bm25"].items()}
    monkeypatch.setattr("common.reranker.prepare.candidates", lambda *_, **__: {**runs, "bm25": some})
    _, ready = prepared(world, negatives="bm25", positives="retrieved")
    qrels, corpus = ready.data.split("train"), ready.data.corpus
    expected = {q: {corpus[p] for p in grades if p in some.get(q, {})} for q, grades in qrels.items()}
    assert {item.query_id: set(item.positives) for item in ready.training} == {
        query: texts for query, texts in expected.items() if texts
    }
    assert 0 < len(ready.training) < len(qrels)
    assert ready.dropped == {NOT_RETRIEVED: len(qrels) - len(ready.training)}


def test_random_negatives_come_from_anywhere_and_follow_the_seed(world: World) -> None:
    config, ready = prepared(world, negatives="random")
    pools = [item.negatives for item in ready.training]
    assert len({text for pool in pools for text in pool}) > 50  # of 60 passages
    for item in ready.training:
        assert not set(item.positives) & set(item.negatives)
    other = replace(config, train=replace(config.train, seed=7))
    again = prepare(other, load_encoder(world.base), say=lambda _: None)
    assert pools != [item.negatives for item in again.training]


def test_given_negatives_are_the_rows_own_and_rows_without_are_dropped(world: World, tmp_path: Path) -> None:
    rows = world.data.read_text().splitlines()
    file = tmp_path / "given.jsonl"
    with_negative = [row[:-1] + f', "negative": ["given {n}"]}}' for n, row in enumerate(rows[:50])]
    file.write_text("\n".join([*with_negative, *rows[50:]]))
    _, ready = prepared(world, name=str(file), negatives="given")
    assert all(len(item.negatives) == 1 and "given" in item.negatives[0] for item in ready.training)
    lost = len(ready.data.split("train")) - len(ready.training)
    assert lost == sum(ready.dropped.values()) > 0


def test_by_default_given_negatives_stand_where_there_are_some(world: World, tmp_path: Path) -> None:
    rows = world.data.read_text().splitlines()
    file = tmp_path / "some.jsonl"
    with_negative = [row[:-1] + f', "negative": ["given {n}"]}}' for n, row in enumerate(rows[:50])]
    file.write_text("\n".join([*with_negative, *rows[50:]]))
    _, ready = prepared(world, name=str(file), negatives="auto")
    given = [len(item.negatives) == 1 and "given" in item.negatives[0] for item in ready.training]
    assert len(given) == len(ready.data.split("train")) and 0 < sum(given) < len(given)


def test_mined_negatives_join_their_data_and_no_other(world: World, tmp_path: Path) -> None:
    data = load_data(world.config().data)
    query = sorted(data.split("train"))[0]
    other = next(p for p in data.corpus if p not in data.split("train")[query])
    mined = tmp_path / "mined.jsonl"
    row = {
        "query": data.queries[query].upper(),
        "positive": data.corpus[next(iter(data.split("train")[query]))],
        "negative": data.corpus[other],
    }
    for text, fits in ((data.corpus[other], True), ("from elsewhere", False)):
        mined.write_text(json.dumps({**row, "negative": text, "negative_scores": [0.5]}))
        settings = replace(world.config().data, mined=str(mined))
        if not fits:
            with pytest.raises(UserError, match=r"mined\.jsonl: was mined from other data.*from elsewhere"):
                load_data(settings)
            continue
        found = load_data(settings)
        assert found.negatives == {query: (other,)} and found.teacher == {query: {other: 0.5}}
        assert found.qrels == data.qrels
        with mined.open("a") as file:
            file.write("\nnot a row\n")
        with pytest.raises(UserError, match=r"(?s)mined\.jsonl:2: not JSON.*--data\.on-bad-row skip"):
            load_data(settings)
        assert load_data(replace(settings, on_bad_row="skip")).negatives == found.negatives
    with pytest.raises(UserError, match="is a folder; name a file"):
        load_data(replace(world.config().data, mined=str(tmp_path)))
    config = replace(world.config(), data=replace(world.config().data, mined="x", negatives="rrf"))
    with pytest.raises(
        UserError, match=r"data\.negatives is 'rrf'; allowed: 'auto' or 'given' with data\.mi"
    ):
        config.validate()


def test_judged_negatives_are_the_passages_judged_irrelevant(world: World, tmp_path: Path) -> None:
    (tmp_path / "qrels").mkdir()
    data = load_data(world.config().data)
    ids = {passage: f"p{n}" for n, passage in enumerate(data.corpus)}
    names = {query: f"q{n}" for n, query in enumerate(data.queries)}
    line = '{{"_id": "{}", "text": "{}"}}\n'.format
    (tmp_path / "corpus.jsonl").write_text("".join(line(ids[p], text) for p, text in data.corpus.items()))
    (tmp_path / "queries.jsonl").write_text("".join(line(names[q], text) for q, text in data.queries.items()))
    for split, qrels in data.qrels.items():
        rows = [
            f"{names[query]}\t{ids[passage]}\t1\n{names[query]}\tp{(int(ids[passage][1:]) + 1) % 60}\t0\n"
            for query, grades in qrels.items()
            for passage in grades
        ]
        (tmp_path / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows))
    _, ready = prepared(world, name=str(tmp_path), negatives="judged")
    assert all(len(item.negatives) == 1 for item in ready.training)


def test_auto_takes_the_first_stage_that_ranks_dev_best(world: World) -> None:
    config, ready = prepared(world)
    qrels = ready.data.split("dev")
    values = {
        name: mean(evaluate_run(run, qrels, ("nDCG@10",))["nDCG@10"]) for name, run in ready.dev.items()
    }
    assert set(values) == {"bm25", "dense", "rrf"} and values[ready.first_stage] == max(values.values())
    assert len(set(values.values())) > 1
    worst = min(values, key=lambda name: values[name])
    named = replace(config, evaluation=replace(config.evaluation, first_stage=worst))
    assert prepare(named, load_encoder(world.base), say=lambda _: None).first_stage == worst


def test_dev_queries_are_a_fixed_sample() -> None:
    judged = {f"q{n}": {"p": 1} for n in range(50)}
    some = dev_queries(judged, 10)
    assert len(set(some)) == 10 and some == dev_queries(dict(reversed(judged.items())), 10)
    assert sorted(dev_queries(judged, None)) == sorted(judged) and some != sorted(judged)[:10]


@pytest.mark.parametrize("cached", [True, False])
def test_a_batch_carries_the_base_s_vector_of_each_of_its_texts(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cached: bool
) -> None:
    if not cached:  # negatives without a dense stage, in a cache of their own: no vectors lie there
        monkeypatch.setenv("RESONANCE_CACHE", str(tmp_path))
    config, ready = prepared(world, negatives="dense" if cached else "random")
    if not cached:
        for file in tmp_path.glob("passages-*"):
            file.unlink()
    base, tokenizer = load_encoder(world.base), PairTokenizer(world.base, 64, 24)
    plan = plan_batches(config, ready, tokenizer, base)
    batch = plan.batch(1)
    data = ready.data
    by_ids = {
        side: {tuple(ids): text for ids, text in zip(encode(texts)[0], texts, strict=True)}
        for side, encode, texts in (
            (QUERY, tokenizer.query_ids, sorted(data.queries.values())),
            (PASSAGE, tokenizer.passage_ids, sorted(data.corpus.values())),
        )
    }
    seen = 0
    for row, column in np.argwhere(batch.mask):
        tokens, sides = batch.input_ids[row, column], batch.sides[row, column]
        query = by_ids[QUERY][tuple(tokens[sides == QUERY])]
        passage = by_ids[PASSAGE][tuple(tokens[sides == PASSAGE])]
        np.testing.assert_allclose(batch.query_vectors[row], base.encode([query])[0], atol=1e-5)
        np.testing.assert_allclose(batch.passage_vectors[row, column], base.encode([passage])[0], atol=1e-5)
        seen += 1
    assert seen > 10 and not batch.passage_vectors[~batch.mask].any()
    without = plan_batches(config, ready, tokenizer).batch(1)
    assert without.query_vectors.shape[-1] == 0


def test_a_split_that_is_not_there_is_named(world: World) -> None:
    with pytest.raises(UserError, match="nowhere"):
        prepared(world, train_split="nowhere")


def test_a_teacher_s_scores_come_from_a_run_file_or_from_the_rows(world: World, tmp_path: Path) -> None:
    config = world.config(objective="margin_mse")
    plain = load_data(config.data)
    run = {
        query: {passage: float(int(passage[1:5] + query[1:3], 16) % 97) for passage in plain.corpus}
        for query in plain.queries
    }
    write_trec_run(run, tmp_path / "teacher.trec", "teacher")
    with pytest.raises(
        UserError, match="margin_mse learns from a teacher, and no training pair has its score"
    ):
        plan_batches(config, *_ready(world, config))
    taught = replace(config, data=replace(config.data, teacher=str(tmp_path / "teacher.trec")))
    data = load_data(taught.data)
    assert data.fingerprint == plain.fingerprint != data.training_fingerprint
    ready, tokenizer = _ready(world, taught)
    ids = {text: passage for passage, text in plain.corpus.items()}
    for item in ready.training:
        expected = [run[item.query_id][ids[text]] for text in (*item.positives, *item.negatives)]
        assert list(item.teacher) == expected
    batch = plan_batches(taught, ready, tokenizer).batch(0)
    assert np.isfinite(batch.teacher[batch.mask]).all()
    (tmp_path / "other.trec").write_text("q Q0 p 1 0.5 t\n")
    with pytest.raises(UserError, match="scores no pair of data"):
        load_data(replace(config.data, teacher=str(tmp_path / "other.trec")))
    rows = [json.loads(row) | {"negative": ["x y", "z"]} for row in world.data.read_text().splitlines()]
    rows = [row | {"positive_scores": 0.75, "negative_scores": [0.5, -1]} for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = replace(config, data=replace(config.data, name=str(tmp_path / "rows.jsonl"), negatives="given"))
    assert {item.teacher for item in _ready(world, own)[0].training} == {(0.75, 0.5, -1.0)}


def test_the_old_domain_s_lists_need_no_labels_and_are_its_train_queries_where_it_has_splits(
    world: World, tmp_path: Path
) -> None:
    labelled = replace(world.config().retrain, preserve_knowledge=0.3, old_data=str(world.data))
    config = replace(world.config(), retrain=labelled)
    _, plain = prepared(world)
    data = plain.data
    ready = prepare(config, load_encoder(world.base), say=lambda _: None)
    assert ready.old is not None and plain.old is None
    assert {item.query_id for item in ready.old} == set(data.split("train"))
    assert all(not item.positives and len(item.negatives) == 6 for item in ready.old)
    folder = tmp_path / "old"
    folder.mkdir()
    for name, texts in (("corpus", data.corpus), ("queries", data.queries)):
        rows = [json.dumps({"_id": key, "text": text}) for key, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    bare = replace(config, retrain=replace(labelled, old_data=str(folder), old_queries=20))
    assert load_old_data(bare).qrels == {}
    few = prepare(bare, load_encoder(world.base), say=lambda _: None).old
    assert few is not None and len(few) == 20
    old = load_old_data(config)
    assert run_fingerprint(data, old) != run_fingerprint(data, load_old_data(bare))
    assert run_fingerprint(data, None) == data.training_fingerprint
    (folder / "queries.jsonl").write_text("")
    with pytest.raises(UserError, match=r"retrain\.old_data .*there are no queries at all"):
        load_old_data(bare)
    with pytest.raises(UserError, match="no split 'nowhere'"):
        load_old_data(replace(config, retrain=replace(labelled, old_split="nowhere")))


def test_a_retraining_begins_with_a_checkpoint_of_ours(world: World) -> None:
    plain = world.config()
    assert resolve_base(plain, say=lambda _: None) == world.base
    for changed in (
        replace(plain, quantum=replace(plain.quantum, mode="adaptation")),
        replace(plain, retrain=replace(plain.retrain, preserve_knowledge=0.1)),
        replace(plain, retrain=replace(plain.retrain, analyze_existing=True)),
    ):
        with pytest.raises(
            UserError, match=r"model\.base .* has no resonance\.safetensors(?s:.*)Train one first"
        ):
            resolve_base(changed, say=lambda _: None)


def _ready(world: World, config: RerankerConfig) -> tuple[Prepared, PairTokenizer]:
    return prepare(config, load_encoder(world.base), say=lambda _: None), PairTokenizer(world.base, 64, 24)


def test_test_queries_that_training_asks_too_are_counted_once(world: World, tmp_path: Path) -> None:
    config = world.config()
    data = load_data(config.data)
    (asked, *_), (other, *_) = data.qrels["train"], data.qrels["test"]
    shared = replace(data, queries={**data.queries, other: data.queries[asked].upper()})
    for given, count in ((data, 0), (shared, 1)):
        said: list[str] = []
        prepare(config, load_encoder(world.base), given, say=said.append)
        warnings = [line for line in said if "same words" in line]
        assert len(warnings) == count
    assert f"1 of {len(data.qrels['test'])} test queries" in warnings[0]
