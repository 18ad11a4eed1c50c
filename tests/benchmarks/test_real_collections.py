"""The comparison is fair: both libraries read the same tokens, and different runs never share a folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import real_collections
from benchmarks.real_collections import (
    COLLECTIONS,
    VARIANTS,
    Collection,
    Job,
    Ranking,
    base_config,
    by_familiarity,
    check_recipe,
    main,
    mined_data,
)
from common.backends import load_encoder
from common.config import to_dict
from common.data.sources import load_ranking_data
from common.errors import UserError
from common.hub import resolve_model
from common.text import PairTokenizer
from tests.tiny import FILLER, World, command, write_collection

TEXTS = ["Unbelievably long: naïve tokenizers misread 東京, don't they?", "one", "a  b\tc (d) e-f_g"]


def test_a_text_cut_for_the_peer_has_exactly_the_tokens_that_ours_keeps() -> None:
    base = resolve_model("default", say=lambda _: None)
    cut = PairTokenizer(base).cut
    for limit in range(1, 20):
        ours, _ = PairTokenizer(base, 64, limit).passage_ids(TEXTS)
        theirs, _ = PairTokenizer(base, 64, 192).passage_ids(cut(TEXTS, limit))
        for text, a, b in zip(TEXTS, ours, theirs, strict=True):
            # a cut inside a word may leave another piece at the end, before [SEP]
            assert len(a) == len(b) and np.array_equal(a[:-2], b[:-2]), (text, limit)


def test_a_finished_run_of_another_recipe_is_not_taken_for_this_one(tmp_path: Path) -> None:
    recipe = to_dict(Job("conala", "st", 0, 1e-4, None, None, Path("data")).config)
    stored = json.loads(json.dumps(recipe))
    del stored["train"]["portable_rate"]  # a run from before this setting: it had its default
    (tmp_path / "config.json").write_text(json.dumps({"config": stored}))
    check_recipe(tmp_path, recipe)
    stored["data"]["list_size"] = 3
    stored["train"]["learning_rate"] = 2e-5
    (tmp_path / "config.json").write_text(json.dumps({"config": stored}))
    with pytest.raises(UserError, match=r"data\.list_size, train\.learning_rate"):
        check_recipe(tmp_path, recipe)


def test_different_runs_never_share_a_folder() -> None:
    first = Job("conala", "listwise", 0, None, None, None, Path("data"))
    others = [{"variant": name} for name in VARIANTS if name != "listwise"]
    others += [{"seed": 1}, {"rate": 3e-4}, {"steps": 7}, {"queries": 9}]
    names = [first.name, *(dataclasses.replace(first, **other).name for other in others)]
    assert len(set(names)) == len(names)


def test_a_gain_is_told_apart_for_passages_that_training_asked_for() -> None:
    first = Ranking("rrf", "rrf", "first stage", np.full(6, 0.5), {})
    ours = Ranking("rrf", "ours", "alone", np.array([0.9, 0.9, 0.9, 0.9, 0.3, 0.3]), {})
    text = by_familiarity([first, ours], np.array([True] * 4 + [False] * 2))
    seen, unseen = (line for line in text.splitlines() if line.startswith("- rrf, ours, alone: "))
    assert "+0.400" in seen and "-0.200" in unseen
    assert "4 queries" in text and "2 queries" in text
    assert by_familiarity([first, ours], np.zeros(6, bool)) == ""  # there is nothing to tell apart


def test_the_general_recipe_leaves_one_collection_out() -> None:
    general = base_config("general", Path("/data")).data.name
    assert general == "pydocs + /data/conala + /data/wikiqa + /data/scifact@500 + /data/nfcorpus@500"
    for name in ("conala", "wikiqa"):
        config = base_config(f"general-less-{name}", Path("/data")).validate()
        assert config.data.name == general.replace(f" + /data/{name}", "")
        assert config.evaluation.candidates == config.data.negatives == "judged"
        assert not COLLECTIONS[f"general-less-{name}"].tested


class Bench:
    """The benchmark's command on a tiny collection, and on a recipe of it and the tiny triples."""

    def __init__(self, world: World, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root, self.patch = root, patch
        write_collection(root / "data" / "toy", FILLER[:20], queries=40)
        config = world.config(max_steps=2, evaluations=1).changed(
            data={"name": f"{world.data} + $RESONANCE_DATA/toy@20", "encoder": str(world.base)}
        )
        command(config, root)  # writes recipe.py
        recipe = {
            "model": {"base": str(world.base)},
            "data": {"list_size": 4, "negative_pool": 6, "max_passage_tokens": 24, "length_buckets": (64,)},
            "train": {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-3, "evaluations": 1},
        }
        collections = {
            "toy": Collection("Toy", recipe, ("rrf",), 8),
            "all": Collection("all", {}, (), 0, tested=False, config=(str(root / "recipe.py"), None)),
        }
        patch.setattr(real_collections, "COLLECTIONS", collections)
        patch.setattr(
            real_collections, "load_encoder", lambda _: load_encoder(world.base, say=lambda _: None)
        )

    def __call__(self, *words: str) -> None:
        places = ("--data-dir", self.root / "data", "--runs", self.root / "runs")
        self.patch.setattr("sys.argv", ["real_collections.py", *words, *map(str, places)])
        main()


@pytest.fixture
def bench(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(world, tmp_path, monkeypatch)


@pytest.mark.slow
def test_negatives_adapters_and_wrong_labels_stand_in_one_table(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = ["random", "mined", "lora", "listwise-noisy", "resonance-noisy"]
    training = ("train", "--collection", "toy", "--seed", "0", "--variant")
    bench(*training, *variants[:-1])
    assert "mined: " in capsys.readouterr().out
    bench(*training, *variants)  # only what is missing is trained
    assert capsys.readouterr().out.count("finished before") == len(variants) - 1
    bench("table", "--collection", "toy", "--results", str(bench.root / "results"))
    said = capsys.readouterr().out
    lines = {
        line.split(" | ")[1].removesuffix(", alone"): line
        for line in said.splitlines()
        if ", alone |" in line
    }
    assert set(lines) == set(variants)
    assert "| 1 |" in lines["mined"] and "random: " in lines["mined"]  # seeds; what it is compared with
    assert "listwise-noisy: " in lines["resonance-noisy"] and "listwise: " not in lines["lora"]  # not trained
    assert list((bench.root / "results").glob("real_collections.*.json"))


@pytest.mark.slow
def test_a_collection_is_measured_with_what_was_trained_on_others(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench("train", "--collection", "all", "--variant", "listwise")
    results = ("--results", str(bench.root / "results"))
    bench("table", "--collection", "toy", "--trained-on", "all", *results)
    assert "listwise, trained on all, fused" in capsys.readouterr().out
    with pytest.raises(UserError, match="all is for training only: measure it on a collection"):
        bench("table", "--collection", "all", *results)


def test_mined_negatives_keep_the_margin_and_are_what_training_reads(bench: Bench, world: World) -> None:
    config = Job("toy", "mined", 0, None, None, None, bench.root / "data").config
    assert config.data.negatives == "given"
    data = mined_data(config, load_encoder(world.base))
    plain = load_ranking_data(config.data.name)
    assert data.qrels == plain.qrels and data.corpus == plain.corpus
    for query, negatives in data.negatives.items():
        best = max(data.teacher[query][p] for p in data.split("train")[query])
        assert all(data.teacher[query][p] <= 0.95 * best for p in negatives)
