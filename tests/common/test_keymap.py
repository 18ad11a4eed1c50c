"""The key table, held to the keys that transformers writes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from common.checkpoint import read_tensors
from common.errors import UserError
from common.keymap import FAMILIES, apply, family_of, from_checkpoint, to_checkpoint, with_prefix
from tests.families import OTHER_HEADS, write_checkpoint


@pytest.mark.parametrize(
    ("key", "path", "transform"),
    [
        (
            "encoder.layer.0.attention.self.query.weight",
            ("encoder", "layer", 0, "attention", "self", "query", "kernel"),
            "transpose",
        ),
        ("bert.encoder.layer.11.output.dense.bias",
         ("bert", "encoder", "layer", 11, "output", "dense", "bias"), "identity"),
        ("embeddings.LayerNorm.weight", ("embeddings", "LayerNorm", "scale"), "identity"),
        ("embeddings.word_embeddings.weight", ("embeddings", "word_embeddings", "embedding"), "identity"),
        ("classifier.weight", ("classifier", "kernel"), "transpose"),
        ("gamma", ("gamma",), "identity"),
    ],
)  # fmt: skip
def test_a_key_and_its_path_map_onto_each_other(
    key: str, path: tuple[str | int, ...], transform: str
) -> None:
    assert from_checkpoint(key) == (path, transform)
    assert to_checkpoint(path) == (key, transform)


def test_linear_weights_are_stored_out_in() -> None:
    weight = np.arange(6).reshape(2, 3)  # [out, in]
    assert apply("transpose", weight).shape == (3, 2)
    np.testing.assert_array_equal(apply("transpose", apply("transpose", weight)), weight)
    assert apply("identity", weight) is weight


def _tensors(*keys: str) -> dict[str, np.ndarray]:
    return {key: np.full((2, 4), number) for number, key in enumerate(keys)}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_bare_and_prefixed_encoders_read_the_same(family: str) -> None:
    rules = FAMILIES[family]
    bare = [f"{name}.0.dense.weight" for name in rules.encoder]
    whole = [rules.prefix + key for key in bare]
    for stored in (bare, whole):
        found = with_prefix(rules, _tensors(*stored, "stranger.weight"), where="here")
        assert list(found) == [*whole, "stranger.weight"]


def test_old_layer_norm_names_are_understood() -> None:
    tensors = _tensors("bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.beta")
    found = with_prefix(FAMILIES["bert"], tensors, where="here")
    assert list(found) == ["bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.bias"]


def test_two_names_for_one_tensor_are_refused() -> None:
    tensors = _tensors("bert.embeddings.LayerNorm.gamma", "embeddings.LayerNorm.weight")
    with pytest.raises(UserError, match="there twice"):
        with_prefix(FAMILIES["bert"], tensors, where="here")


def test_an_unknown_family_names_the_ones_allowed() -> None:
    with pytest.raises(UserError, match=r"here: model_type is 'gpt2'.*bert, deberta-v2"):
        family_of({"model_type": "gpt2"}, "here")


@pytest.mark.parametrize(
    ("family", "head"), [(family, head) for family, heads in OTHER_HEADS.items() for head in heads]
)
def test_every_tensor_of_a_transformers_checkpoint_has_its_place(
    family: str, head: str, tmp_path: Path
) -> None:
    pytest.importorskip("torch", reason="the oracle needs torch: install the extra `peers`")
    rules = FAMILIES[family]
    whole = set(read_tensors(write_checkpoint(tmp_path / "whole", family)))
    for key in whole:
        assert to_checkpoint(from_checkpoint(key)[0])[0] == key
    stored = read_tensors(write_checkpoint(tmp_path / "stored", family, head))
    found = {key for key in with_prefix(rules, stored, where="here") if not _matches(key, rules.foreign)}
    assert found <= whole
    assert all(_matches(key, rules.new) for key in whole - found)


def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(re.fullmatch(pattern, key) for pattern in patterns)
