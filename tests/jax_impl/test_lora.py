"""Adapters: they start as nothing, alone learn, and leave no trace in a merged model."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.config import ModelConfig
from jax_impl.loading import load_cross_encoder, model_tensors
from jax_impl.models.cross_encoder import CrossEncoder
from jax_impl.models.lora import LoRALinear, add_lora, trainable
from tests.tiny import write_base

TARGETS = ("query", "key", "value", "dense")


@pytest.fixture
def model(seed: int, tmp_path: Path) -> CrossEncoder:
    return load_cross_encoder(write_base(tmp_path / "base", seed=seed), ModelConfig()).model


def adapt(model: CrossEncoder, seed: int, targets: tuple[str, ...] = TARGETS) -> list[str]:
    return add_lora(model.encoder, 4, 8.0, targets, rngs=nnx.Rngs(seed))


def pairs(seed: int) -> tuple[jnp.ndarray, jnp.ndarray]:
    ids = np.random.default_rng(seed).integers(5, 100, (3, 12))
    return jnp.asarray(ids), jnp.asarray([[1] * 5 + [2] * 7] * 3)


def randomise(model: CrossEncoder, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, LoRALinear):
            module.lora_b[...] = jnp.asarray(rng.normal(0, 0.2, module.lora_b[...].shape), jnp.float32)


def test_an_adapted_model_starts_as_the_one_it_adapts(model: CrossEncoder, seed: int) -> None:
    before = model(*pairs(seed))
    adapt(model, seed)
    after = model(*pairs(seed))
    np.testing.assert_allclose(after.score, before.score, atol=1e-5)
    np.testing.assert_allclose(after.portable, before.portable, atol=1e-5)


def test_the_merged_weights_give_the_adapted_scores(model: CrossEncoder, seed: int) -> None:
    plain = nnx.clone(model)
    adapt(model, seed)
    randomise(model, seed)
    adapted = model(*pairs(seed))
    for path, module in nnx.iter_modules(model):
        if isinstance(module, LoRALinear):
            owner = plain
            for part in path:
                owner = owner[part] if isinstance(part, int) else getattr(owner, part)
            owner.kernel[...] = module.merged()
    merged = plain(*pairs(seed))
    np.testing.assert_allclose(merged.portable, adapted.portable, atol=1e-5)
    np.testing.assert_allclose(merged.resonance, adapted.resonance, atol=1e-5)
    tensors, expected = model_tensors(model), model_tensors(plain)  # and these are what a checkpoint gets
    assert tensors.keys() == expected.keys()
    for key in expected:
        np.testing.assert_allclose(tensors[key], expected[key], atol=1e-6, err_msg=key)


def test_only_adapters_pooler_and_heads_learn(model: CrossEncoder, seed: int) -> None:
    adapt(model, seed)
    learned, _ = nnx.split_state(nnx.state(model, nnx.Param), trainable, ...)
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(learned)}
    adapters = {name for name in names if name.endswith(("lora_a", "lora_b"))}
    assert len(adapters) == 2 * 6 and all(name.startswith("bert.encoder.layer.") for name in adapters)
    assert names - adapters == {
        "bert.pooler.dense.kernel",
        "bert.pooler.dense.bias",
        "classifier.kernel",
        "classifier.bias",
        "resonance.projector.proj_re.kernel",
        "resonance.projector.proj_im.kernel",
        "resonance.u",
        "resonance.gamma",
        "resonance.b",
    }


def test_targets_choose_the_layers(model: CrossEncoder, seed: int) -> None:
    assert adapt(model, seed, ("query",)) == ["encoder.layer.0.attention.self.query"]


def test_a_target_that_names_no_layer_is_an_error(model: CrossEncoder, seed: int) -> None:
    with pytest.raises(ValueError, match=r"LoRA targets \['q_proj'\] name no linear layer"):
        adapt(model, seed, ("query", "q_proj"))
