"""From a checkpoint directory to an MLX reranker and back: three starts, strictness, the files of JAX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="needs MLX: install the extra `mlx`")

import mlx.core as mx
from safetensors.numpy import load_file, save_file

from common.config import ModelConfig
from common.errors import UserError
from common.text import PairTokenizer
from mlx_impl.loading import LoadedReranker, load_bi_encoder, load_cross_encoder, model_tensors
from mlx_impl.models.lora import add_lora
from tests.parity.backends import Mlx, backend_of
from tests.tiny import FILLER, write_base

QUERIES = ["bano luro", "kino", "bano"]
PASSAGES = [" ".join(FILLER[:9]), "luro kino", "dorax"]
FILES = ("model.safetensors", "resonance.safetensors", "config.json", "tokenizer.json")


def randomise(model: Any, seed: int) -> None:
    """As after training: no parameter is where it began."""
    rng = np.random.default_rng(seed)
    moved = {name: x + rng.normal(0, 0.1, x.shape) for name, x in Mlx().parameters(model).items()}
    Mlx().set_parameters(model, moved)


def save(name: str, loaded: Any, base: Path, directory: Path) -> Path:
    """Write a reranker with a backend."""
    backend_of(name).module("loading").save_cross_encoder(
        directory, loaded, training={"step": 1}, tokenizer_save=PairTokenizer(base).save, card="# tiny\n"
    )
    return directory


def change_tensors(file: Path, **changes: Any) -> None:
    """Rewrite a safetensors file; None takes a tensor out."""
    tensors = load_file(file) | {key.replace("__", "."): value for key, value in changes.items()}
    save_file({key: value for key, value in tensors.items() if value is not None}, file)


def test_the_three_starts_are_those_of_the_checkpoint(tmp_path: Path, seed: int) -> None:
    seed %= 2**31
    plain = load_cross_encoder(write_base(tmp_path / "plain", seed=seed), ModelConfig(), seed=seed)
    head = plain.model.resonance
    assert plain.start == "masked_lm" and float(head.gamma) == 0 and float(head.b) == 0
    assert 0.005 < float(mx.std(head.u)) < 0.04
    again = load_cross_encoder(tmp_path / "plain", ModelConfig(), seed=seed).model.resonance
    other = load_cross_encoder(tmp_path / "plain", ModelConfig(), seed=seed + 1).model.resonance
    assert bool(mx.all(again.u == head.u)) and not bool(mx.any(other.u == head.u))
    (tmp_path / "plain" / "modules.json").write_text("[]")
    warm = load_cross_encoder(tmp_path / "plain", ModelConfig())
    assert warm.start == "sentence_encoder" and float(warm.model.resonance.gamma) == 20.0
    assert float(warm.model.resonance.b) == -10.0 and not bool(mx.any(warm.model.resonance.u))
    existing = load_cross_encoder(write_base(tmp_path / "head", seed=seed, head=True), ModelConfig())
    ids, sides = mx.array([[2, 7, 8, 3, 9, 3]]), mx.array([[1, 1, 1, 1, 2, 2]])
    out = existing.model(ids, sides)
    assert existing.start == "cross_encoder" and float(out.resonance[0]) != 0
    np.testing.assert_allclose(np.array(out.score), np.array(out.portable), atol=1e-5)


@pytest.mark.parametrize("width", [32, 12])
def test_the_cartesian_start_is_a_cosine_at_full_width(tmp_path: Path, seed: int, width: int) -> None:
    """A^T A + B^T B is 1.01 times the identity at full width, a projection below."""
    model = load_cross_encoder(
        write_base(tmp_path / "base"), ModelConfig(complex_width=width), seed=seed % 2**31
    ).model
    re, im = (
        np.array(layer.weight, np.float64)
        for layer in (model.resonance.projector.proj_re, model.resonance.projector.proj_im)
    )
    assert re.shape == (width, 32)
    np.testing.assert_allclose(re @ re.T, np.eye(width), atol=1e-5)
    np.testing.assert_allclose(im @ im.T, 0.01 * np.eye(width), atol=1e-5)
    assert abs(im).max() < 0.1 and abs(im).max() > 0.02


@pytest.mark.parametrize("projector", ["cartesian", "polar"])
def test_both_backends_write_the_same_files(tmp_path: Path, seed: int, projector: Any) -> None:
    base = write_base(tmp_path / "base", seed=seed)
    settings = ModelConfig(projector=projector, complex_width=12, passage_segment=1)
    loaded = load_cross_encoder(base, settings, seed=seed % 2**31)
    randomise(loaded.model, seed)
    first = save("mlx", loaded, base, tmp_path / "mlx")
    in_jax = backend_of("jax").module("loading").load_cross_encoder(first, ModelConfig())
    second = save("jax", in_jax, base, tmp_path / "jax")
    third = save("mlx", load_cross_encoder(second, ModelConfig()), base, tmp_path / "again")
    for file in FILES:
        written = {(directory / file).read_bytes() for directory in (first, second, third)}
        assert len(written) == 1, file


def test_adapters_are_merged_when_a_reranker_is_saved(tmp_path: Path, seed: int) -> None:
    base = write_base(tmp_path / "base", seed=seed)
    loaded = load_cross_encoder(base, ModelConfig())
    seed_of_adapters = seed % 2**31
    add_lora(loaded.model.encoder, 4, 8.0, ("query", "dense"), rngs=Mlx().rngs(seed_of_adapters))
    randomise(loaded.model, seed)
    ids, sides = mx.array([[2, 7, 8, 3, 9, 3]]), mx.array([[1, 1, 1, 1, 2, 2]])
    adapted = loaded.model(ids, sides)
    saved = load_cross_encoder(save("mlx", loaded, base, tmp_path / "saved"), ModelConfig())
    assert not any("lora" in key for key in load_file(tmp_path / "saved" / "model.safetensors"))
    np.testing.assert_allclose(np.array(saved.model(ids, sides).score), np.array(adapted.score), atol=1e-5)


def test_adapters_start_as_nothing(tmp_path: Path, seed: int) -> None:
    loaded: LoadedReranker = load_cross_encoder(write_base(tmp_path / "base", seed=seed), ModelConfig())
    before = model_tensors(loaded.model)
    ids, sides = mx.array([[2, 7, 8, 3, 9, 3]]), mx.array([[1, 1, 1, 1, 2, 2]])
    score = np.array(loaded.model(ids, sides).score)
    found = add_lora(loaded.model.encoder, 4, 8.0, ("query",), rngs=Mlx().rngs(1))
    assert found == ["encoder.layer.0.attention.self.query"]
    np.testing.assert_allclose(np.array(loaded.model(ids, sides).score), score, atol=1e-5)
    after = model_tensors(loaded.model)
    assert all(np.array_equal(before[key], after[key]) for key in before) and after.keys() == before.keys()
    with pytest.raises(ValueError, match=r"LoRA targets \['q_proj'\] name no linear layer"):
        add_lora(loaded.model.encoder, 4, 8.0, ("key", "q_proj"), rngs=Mlx().rngs(1))


@pytest.mark.parametrize("load", [lambda d: load_cross_encoder(d, ModelConfig()), load_bi_encoder])
def test_a_base_is_strict_on_the_encoder_and_lists_every_tensor(tmp_path: Path, load: Any) -> None:
    base = write_base(tmp_path / "base")
    change_tensors(
        base / "model.safetensors",
        encoder__layer__0__attention__self__query__bias=None,
        encoder__layer__0__output__dense__weight=np.zeros((32, 63), np.float32),
        encoder__layer__1__output__dense__bias=np.zeros(32, np.float32),
        head__weight=np.zeros(2, np.float32),
    )
    with pytest.raises(UserError) as error:
        load(base)
    for line in (
        "missing: bert.encoder.layer.0.attention.self.query.bias [32]",
        "wrong shape: bert.encoder.layer.0.output.dense.weight is [32, 63], the model needs [32, 64]",
        "unexpected: bert.encoder.layer.1.output.dense.bias [32]",
        "unexpected: head.weight [2]",
    ):
        assert line in str(error.value)


@pytest.mark.parametrize("file", ["model.safetensors", "resonance.safetensors"])
def test_a_directory_that_we_wrote_is_strict_both_ways(tmp_path: Path, file: str) -> None:
    base = write_base(tmp_path / "base")
    trained = save("mlx", load_cross_encoder(base, ModelConfig()), base, tmp_path / "trained")
    gone = {"model.safetensors": "bert.pooler.dense.bias", "resonance.safetensors": "gamma"}[file]
    change_tensors(
        trained / file, **{gone.replace(".", "__"): None}, cls__predictions__bias=np.zeros(5, np.float32)
    )
    with pytest.raises(UserError) as error:
        load_cross_encoder(trained, ModelConfig())
    assert "missing: " in str(error.value) and gone in str(error.value)
    assert "unexpected: " in str(error.value) and "cls.predictions.bias [5]" in str(error.value)


def test_an_activation_we_do_not_have_is_refused_by_name(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", hidden_act="swish9")
    with pytest.raises(UserError, match=r"config\.json: hidden_act is 'swish9'; allowed: gelu"):
        load_cross_encoder(base, ModelConfig())
