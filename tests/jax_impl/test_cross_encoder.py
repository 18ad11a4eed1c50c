"""What a pair's score depends on: the pair, and nothing else."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.config import ModelConfig
from common.text import PASSAGE, QUERY, PairTokenizer
from jax_impl.loading import load_cross_encoder
from jax_impl.models.cross_encoder import CrossEncoder, PairOutput, mean_of
from jax_impl.models.dropout import dropout, row_keys
from tests.tiny import FILLER, write_base

GAMMA = 20.0


def make_model(directory: Path, seed: int, segment: int = 0, rate: float = 0.0) -> CrossEncoder:
    """A trained-looking cross-encoder: every part of the score counts."""
    base = write_base(directory / "base", seed=seed, num_hidden_layers=2)
    (base / "modules.json").write_text("[]")
    settings = ModelConfig(passage_segment=segment)
    model = load_cross_encoder(base, settings, seed=seed, dropout=(rate, rate)).model
    rng = np.random.default_rng(seed)
    model.resonance.u[...] = jnp.asarray(rng.normal(0, 0.5, 32), jnp.float32)
    return model


def random_pairs(seed: int, count: int = 6) -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(seed)
    draw = lambda low, high: " ".join(rng.choice(FILLER, rng.integers(low, high)))  # noqa: E731
    return [draw(1, 5) for _ in range(count)], [draw(1, 25) for _ in range(count)]


def encode(directory: Path, queries: list[str], passages: list[str], length: int) -> tuple[jax.Array, ...]:
    tokenizer = PairTokenizer(directory / "base")
    ids, sides = tokenizer.pad(tokenizer.encode_pairs(queries, passages), length)
    return jnp.asarray(ids), jnp.asarray(sides)


def call(model: CrossEncoder, *inputs: jax.Array | None) -> PairOutput:
    graphdef, state = nnx.split(model)
    return jax.jit(lambda *x: nnx.merge(graphdef, state)(*x))(*inputs)


def test_a_score_does_not_depend_on_batch_padding_candidates_or_order(seed: int, tmp_path: Path) -> None:
    model, (queries, passages) = make_model(tmp_path, seed), random_pairs(seed)
    together = np.asarray(call(model, *encode(tmp_path, queries, passages, 64)).score)
    order = np.random.default_rng(seed).permutation(len(queries))
    shuffled = call(model, *encode(tmp_path, [queries[i] for i in order], [passages[i] for i in order], 48))
    among_others = call(model, *encode(tmp_path, [queries[0]] * 4, [passages[0], "bano", "luro", "kino"], 48))
    tolerance = 1e-5 * np.maximum(1, np.maximum(np.abs(together), GAMMA))
    assert (np.abs(np.asarray(shuffled.score) - together[order]) <= tolerance[order]).all()
    assert abs(among_others.score[0] - together[0]) <= tolerance[0]
    tokens = PairTokenizer(tmp_path / "base").encode_pairs(queries[:1], passages[:1])[0]
    alone = call(model, jnp.asarray(tokens.ids)[None], jnp.asarray(tokens.sides)[None])
    assert abs(alone.score[0] - together[0]) <= tolerance[0]
    assert np.std(together) > 0.01  # the scores do differ between pairs


def test_at_the_warm_start_r_is_the_cosine_of_the_two_pooled_sides(seed: int, tmp_path: Path) -> None:
    model, (queries, passages) = make_model(tmp_path, seed), random_pairs(seed)
    ids, sides = encode(tmp_path, queries, passages, 48)
    hidden = np.asarray(model.bert(ids, sides > 0), np.float64)
    out = call(model, ids, sides)
    for row in range(len(queries)):
        query = hidden[row][np.asarray(sides[row]) == QUERY].mean(axis=0)
        passage = hidden[row][np.asarray(sides[row]) == PASSAGE].mean(axis=0)
        cosine = query @ passage / np.linalg.norm(query) / np.linalg.norm(passage)
        assert abs(float(out.resonance[row]) - cosine) <= 1e-5


def test_special_tokens_count_with_their_side(tmp_path: Path) -> None:
    make_model(tmp_path, 0)
    ids, sides = encode(tmp_path, ["bano luro"], ["kino"], 8)
    cls, sep, pad = 2, 3, 0
    assert ids[0, 0] == cls and ids[0, 3] == ids[0, 5] == sep and (ids[0, 6:] == pad).all()
    assert sides[0].tolist() == [1, 1, 1, 1, 2, 2, 0, 0]


@pytest.mark.parametrize("segment", [0, 1])
def test_passage_tokens_get_the_segment_of_the_recipe(seed: int, segment: int, tmp_path: Path) -> None:
    model = make_model(tmp_path, seed, segment)
    ids, sides = encode(tmp_path, *random_pairs(seed), 48)
    hidden = model.bert(ids, sides > 0, segment * (sides == 2).astype(jnp.int32))
    expected = model.classifier(model.bert.pooler(hidden))[:, 0]
    np.testing.assert_allclose(call(model, ids, sides).portable, expected, atol=1e-5)


def test_the_mean_of_an_empty_side_is_zero() -> None:
    assert (mean_of(jnp.ones((1, 3, 2)), jnp.zeros((1, 3), bool)) == 0).all()


def test_a_row_draws_the_same_dropout_however_the_batch_is_split(seed: int, tmp_path: Path) -> None:
    model = make_model(tmp_path, seed, rate=0.2)
    ids, sides = encode(tmp_path, *random_pairs(seed, 8), 32)
    key = jax.random.key(seed)
    whole = call(model, ids, sides, row_keys(key, 8)).score
    parts = [
        call(model, ids[a:b], sides[a:b], row_keys(key, b - a, first_row=a)).score
        for a, b in ((0, 4), (4, 8))
    ]
    np.testing.assert_allclose(whole, jnp.concatenate(parts), atol=1e-5 * GAMMA)
    assert float(jnp.max(jnp.abs(whole - call(model, ids, sides).score))) > 1e-2


def test_dropout_keeps_the_mean_and_drops_its_share(seed: int) -> None:
    keys = row_keys(jax.random.key(seed), 4)
    x = dropout(jnp.ones((4, 20_000)), 0.1, keys, site=0)
    dropped = float((x == 0).mean())
    assert abs(dropped - 26 / 256) < 0.01 and abs(float(x.mean()) - 1) < 0.02
    assert not (x[0] == x[1]).all()  # another row
    assert not (x == dropout(jnp.ones((4, 20_000)), 0.1, keys, site=1)).all()  # another place
    assert (dropout(x, 0.1, None, site=0) == x).all()
