"""The comparison is fair: both libraries read the same tokens, and different runs never share a folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.real_collections import VARIANTS, Cutter, Job, Ranking, by_familiarity, check_recipe
from common.config import to_dict
from common.errors import UserError
from common.hub import resolve_model
from common.text import PairTokenizer

TEXTS = ["Unbelievably long: naïve tokenizers misread 東京, don't they?", "one", "a  b\tc (d) e-f_g"]


def test_a_text_cut_for_the_peer_has_exactly_the_tokens_that_ours_keeps() -> None:
    base = resolve_model("default", say=lambda _: None)
    cutter = Cutter(base)
    for limit in range(1, 20):
        ours, _ = PairTokenizer(base, 64, limit).passage_ids(TEXTS)
        theirs, _ = PairTokenizer(base, 64, 192).passage_ids(cutter(TEXTS, limit))
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
