"""Several sources as one: ids, splits, caps, and that a query meets the passages of its own source alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.backends import load_encoder
from common.config import RerankerConfig, RunOptions, load_recipe
from common.data.combined import source_of
from common.data.lists import random_negatives
from common.data.sources import load_ranking_data
from common.errors import UserError
from common.metrics.ranking import evaluate_run, mean
from common.reranker.evaluation import evaluate_recipe
from common.reranker.prepare import candidates, dev_candidates, plan_batches, prepare
from common.reranker.workflow import train_recipe
from common.text import PairTokenizer
from tests.retrieval_fakes import WordScorer
from tests.tiny import FILLER, World, write_collection

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def sources(world: World, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny triples, and two BEIR folders of other words; `judged` brings candidates of its own."""
    root = tmp_path_factory.mktemp("sources")
    write_collection(root / "plain", FILLER[:20], queries=40)
    write_collection(root / "judged", FILLER[20:40], queries=40, judged=4)
    return f"{world.data} + {root}/plain@12 + {root}/judged"


def config(world: World, sources: str) -> RerankerConfig:
    return world.config().changed(
        data={"name": sources, "encoder": str(world.base), "negatives": "judged"},
        evaluation={"candidates": "judged", "first_stage": "rrf", "dev_queries": 6},
    )


def test_ids_are_of_their_source_and_splits_have_every_source(sources: str) -> None:
    data = load_ranking_data(sources)
    assert list(data.parts) == ["data", "plain", "judged"] and data.name == "data + plain@12 + judged"
    for split in ("train", "dev", "test"):
        assert {source_of(query) for query in data.split(split)} == set(data.parts)
        for query, grades in data.split(split).items():
            assert {source_of(passage) for passage in grades} == {source_of(query)}
    part = data.parts["plain"]
    assert sum(source_of(query) == "plain" for query in data.split("train")) == 12 < len(part.split("train"))
    assert data.split("test").keys() >= {f"plain/{query}" for query in part.split("test")}
    assert load_ranking_data(sources).fingerprint == data.fingerprint
    assert load_ranking_data(sources.replace("@12", "@13")).fingerprint != data.fingerprint
    data.validate()


def test_one_source_may_be_capped_and_equal_names_stay_apart(sources: str) -> None:
    plain = sources.split(" + ")[1]
    assert len(load_ranking_data(plain).split("train")) == 12
    twice = load_ranking_data(f"{plain} + {plain.removesuffix('@12')}")
    assert list(twice.parts) == ["plain", "plain-2"]
    assert len(twice.split("train")) == 12 + len(twice.parts["plain"].split("train"))


def test_every_source_that_is_missing_is_named(world: World, tmp_path: Path) -> None:
    expected = r"2 of the 3 sources cannot be loaded:(?s:.*)/nowhere(?s:.*)lost'"
    with pytest.raises(UserError, match=expected) as e:
        load_ranking_data(f"{tmp_path}/nowhere + {world.data} + $RESONANCE_LOST/lost")
    assert "environment variable $RESONANCE_LOST is not set" in str(e.value)
    with pytest.raises(UserError, match="a source is missing beside a `\\+`"):
        load_ranking_data(f"{world.data} +")
    with pytest.raises(UserError, match="keeps 0 training queries; allowed: @1 or more"):
        load_ranking_data(f"{world.data}@0")


def test_variables_are_filled_in(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESONANCE_TINY", str(world.root))
    plain = load_ranking_data(str(world.data))
    assert load_ranking_data("$RESONANCE_TINY/data.jsonl").fingerprint == plain.fingerprint
    assert load_ranking_data("${RESONANCE_TINY}/data.jsonl+$RESONANCE_TINY/data.jsonl").parts


def test_negatives_and_candidates_are_of_the_query_s_own_source(world: World, sources: str) -> None:
    recipe = config(world, sources)
    ready = prepare(recipe, load_encoder(world.base, say=lambda _: None), say=lambda _: None)
    data = ready.data
    texts = {name: set(part.corpus.values()) for name, part in data.parts.items()}
    assert {source_of(item.query_id) for item in ready.training} == set(texts)
    for item in ready.training:
        name = source_of(item.query_id)
        assert {*item.positives, *item.negatives} <= texts[name]
        # judged where the source judges irrelevant passages, else retrieved
        assert len(item.negatives) == (3 if name == "judged" else recipe.data.negative_pool)
    for run in ready.dev.values():
        assert set(run) == set(data.split("dev"))
        assert all(source_of(p) == source_of(query) for query, found in run.items() for p in found)
        own = {q: set(found) for q, found in run.items() if source_of(q) == "judged"}
        assert own == {q: set(g) for q, g in data.split("dev").items() if source_of(q) == "judged"}
    anywhere = random_negatives(data, "train", 5, seed=1)
    assert all(source_of(p) == source_of(query) for query, found in anywhere.items() for p in found)


def test_candidates_of_a_source_are_those_it_has_alone(world: World, sources: str) -> None:
    data, encoder = load_ranking_data(sources), load_encoder(world.base, say=lambda _: None)
    together = candidates(data, "test", encoder)
    for name, part in data.parts.items():
        for stage, run in candidates(part, "test", encoder).items():
            found = {q: scores for q, scores in together[stage].items() if source_of(q) == name}
            assert found == {f"{name}/{q}": {f"{name}/{p}": s for p, s in r.items()} for q, r in run.items()}


def test_dev_is_pooled_and_takes_equally_many_of_each_source(world: World, sources: str) -> None:
    recipe = config(world, sources)
    ready = prepare(recipe, load_encoder(world.base, say=lambda _: None), say=lambda _: None)
    qrels, run = dev_candidates(recipe, ready)
    counts = [sum(source_of(query) == name for query in qrels) for name in ready.data.parts]
    assert counts == [2, 2, 2]
    assert max(map(len, run.values())) <= recipe.evaluation.dev_depth


def test_each_source_is_reranked_over_the_first_stage_that_ranks_its_own_dev_best(
    world: World, sources: str
) -> None:
    recipe, encoder = config(world, sources), load_encoder(world.base, say=lambda _: None)
    recipe = replace(recipe, evaluation=replace(recipe.evaluation, first_stage="auto"))
    ready = prepare(recipe, encoder, say=lambda _: None)
    qrels = ready.data.split("dev")
    for name in ready.data.parts:
        own = {query: grades for query, grades in qrels.items() if source_of(query) == name}
        values = {
            stage: mean(evaluate_run(run, own, ("nDCG@10",))["nDCG@10"]) for stage, run in ready.dev.items()
        }
        assert values[ready.stages[name]] == max(values.values())
    ready = replace(ready, first_stage="bm25", stages=dict.fromkeys(ready.data.parts, "dense"))
    _, run = dev_candidates(recipe, ready)
    assert all(scores[p] == ready.dev["dense"][query][p] for query, scores in run.items() for p in scores)
    tables = evaluate_recipe(recipe, replace(ready, stages={"plain": "rrf"}), [WordScorer()], encoder)
    assert [{row.pool for row in table.rows if row.model} for table in tables] == [
        {"bm25"},
        {"rrf"},
        {"bm25"},
    ]


def test_a_batch_of_several_sources_carries_the_base_s_vectors(world: World, sources: str) -> None:
    recipe, base = config(world, sources), load_encoder(world.base, say=lambda _: None)
    ready = prepare(recipe, base, say=lambda _: None)
    plan = plan_batches(recipe, ready, PairTokenizer(world.base, 64, 24), base)
    for number, item in enumerate(ready.training):
        place = plan.lists.positives[number][0]
        expected = base.encode([item.positives[0]], kind="passage")[0]
        np.testing.assert_allclose(plan.lists.passage_vectors[place], expected, atol=1e-5)


def test_every_source_s_test_split_is_evaluated_apart(world: World, sources: str) -> None:
    recipe, encoder = config(world, sources), load_encoder(world.base, say=lambda _: None)
    ready = prepare(recipe, encoder, say=lambda _: None)
    tables = evaluate_recipe(recipe, ready, [], encoder)
    assert [table.data for table in tables] == ["data", "plain", "judged"]
    assert [table.queries for table in tables] == [len(p.split("test")) for p in ready.data.parts.values()]
    assert tables[2].depth == 4 != tables[0].depth  # the judged candidates, all of them
    wider = load_ranking_data(f"{sources} + {world.data}")
    del wider.parts["plain"].qrels["test"]  # a source without the split has no table
    tables = evaluate_recipe(recipe, replace(ready, data=wider), [], encoder)
    assert [table.data for table in tables] == ["data", "judged", "data"]


def test_the_evaluate_command_prints_a_table_for_each_source(
    world: World, sources: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from scripts.evaluate import main

    argv: list[Any] = ["--data", sources, "--encoder", world.base, "--judged", "--json", tmp_path / "t.json"]
    main([str(word) for word in (*argv, "--per-query", tmp_path / "q.tsv")])
    said = capsys.readouterr().out
    for part in ("data test: ", "plain test: ", "judged test: "):
        assert part in said
    stored = json.loads((tmp_path / "t.json").read_text())
    assert [table["data"] for table in stored["sources"]] == ["data", "plain", "judged"]
    header, *rows = (tmp_path / "q.tsv").read_text().splitlines()
    assert header.split("\t")[:2] == ["source", "query"] and {row.split("\t")[0] for row in rows} == {
        *("data", "plain", "judged")
    }
    with pytest.raises(UserError, match="--run and --qrels belong to one source"):
        main([str(word) for word in ("--data", sources, "--qrels", "x.tsv")])


def test_the_general_recipe_names_each_collection_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESONANCE_DATA", str(tmp_path))
    name = load_recipe(str(ROOT / "configs" / "general_reranker.py")).data.name
    assert name.startswith("pydocs + ")
    with pytest.raises(UserError, match="4 of the 4 sources cannot be loaded") as error:
        load_ranking_data(name.removeprefix("pydocs + "))
    for collection in ("conala", "wikiqa", "scifact", "nfcorpus"):
        assert f"{tmp_path}/{collection}" in str(error.value)


@pytest.mark.slow
def test_a_run_on_several_sources_ends_with_a_table_of_each(
    world: World, sources: str, tmp_path: Path
) -> None:
    recipe = config(world, sources).changed(train={"max_steps": 4, "evaluations": 1})
    said: list[str] = []
    run = train_recipe(recipe, RunOptions(runs=tmp_path), say=said.append)
    titles = [table["title"].split(":")[0] for table in run.tables if "queries, top" in table["title"]]
    assert titles == ["data test", "plain test", "judged test"]
    assert any("rrf → fused" in text for text in said)
    again = train_recipe(recipe, RunOptions(runs=tmp_path), say=said.append)
    assert again.finished_before and again.tables == run.tables
