"""Llama and Qwen3 decoders: both backends against transformers and against each other.

Random tiny configurations, weights and inputs: logits, their gradient by every parameter, step by step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import UserError
from tests.languages import random_decoder, random_tokens, transformers_decoder, write_transformers
from tests.parity.backends import MODEL_TOLERANCE, Backend, check
from tests.parity.test_models import Twins, compare, dropout_keys, torch_results

torch = pytest.importorskip("torch", reason="the oracle needs torch: install the extra `peers`")
pytest.importorskip("transformers")

families = pytest.mark.parametrize("family", ["llama", "qwen3"])
STRETCHED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def draw(family: str, seed: int, directory: Path, **changed: Any) -> tuple[Any, dict[str, Any]]:
    """transformers' decoder of a random configuration, saved in `directory`."""
    settings = random_decoder(family, np.random.default_rng(seed)) | changed
    print(settings)
    oracle = transformers_decoder(family, settings, seed)
    write_transformers(directory, oracle)
    return oracle, settings


def loaded(backend: Backend, directory: Path, **rates: float) -> Any:
    return backend.module("language").load_language_model(directory, **rates)[0]


@pytest.mark.parametrize(("family", "stretched"), [("llama", False), ("llama", True), ("qwen3", False)])
def test_logits_and_gradients_agree_with_transformers_and_with_the_twin(
    twins: Twins, family: str, stretched: bool, seed: int, tmp_path: Path
) -> None:
    changed = {"rope_scaling": STRETCHED, "rope_theta": 1e4} if stretched else {}
    oracle, settings = draw(family, seed, tmp_path / "base", **changed)
    ids, _ = random_tokens(np.random.default_rng(seed), settings["vocab_size"], tokens=23)
    results = [b.results(loaded(b, tmp_path / "base"), lambda m, x: [m(x).logits], seed, ids) for b in twins]
    theirs = torch_results(oracle, [oracle(torch.tensor(ids).long()).logits], seed)
    for backend, ours in zip(twins, results, strict=True):
        compare(f"decoder of {family}", f"{backend.name} with transformers", ours, theirs)
    compare(f"decoder of {family}", "jax with mlx", *results)


@families
def test_decoding_token_by_token_equals_reading_at_once(
    backend: Backend, family: str, seed: int, tmp_path: Path
) -> None:
    oracle, settings = draw(family, seed, tmp_path / "base")
    rng, model = np.random.default_rng(seed), loaded(backend, tmp_path / "base")
    ids = rng.integers(0, settings["vocab_size"], (3, 12)).astype(np.int32)
    lengths = np.array([5, 1, 7], np.int32)  # of the prompts, padded on the right to 7
    real = (np.arange(7) < lengths[:, None]).astype(np.int32)
    full = oracle(torch.tensor(ids).long()).logits.detach().numpy()
    rows = np.arange(3)

    def prefill(ids: Any, real: Any, at: Any) -> Any:
        out = model(ids, real, cache=model.empty_cache(3, 16), at=at)
        return [out.logits, *out.cache.keys, *out.cache.values, out.cache.length]

    def step(ids: Any, *leaves: Any) -> Any:
        layers = (len(leaves) - 1) // 2
        cache = model.empty_cache(3, 16)._replace(
            keys=leaves[:layers], values=leaves[layers:-1], length=leaves[-1]
        )
        out = model(ids, cache=cache)
        return [out.logits, *out.cache.keys, *out.cache.values, out.cache.length]

    logits, *cache = backend.values(prefill)(ids[:, :7], real, lengths - 1)
    pair, label = f"{backend.name} with transformers", f"decoder of {family}, step by step"
    check(label, pair, logits[:, 0], full[rows, lengths - 1], MODEL_TOLERANCE)
    for _ in range(5):
        state = [x.astype(np.float32) for x in cache[:-1]] + [cache[-1].astype(np.int32)]
        assert (state[-1] == lengths).all()
        logits, *cache = backend.values(step)(ids[rows, lengths][:, None], *state)
        check(label, pair, logits[:, 0], full[rows, lengths], MODEL_TOLERANCE)
        lengths = lengths + 1


@families
def test_the_decoder_agrees_with_its_twin_under_dropout_with_packed_texts(
    twins: Twins, family: str, seed: int, tmp_path: Path
) -> None:
    _, settings = draw(family, seed, tmp_path / "base")
    rates = {"embedding_dropout": 0.1, "word_dropout": 0.2, "hidden_dropout": 0.3, "attention_dropout": 0.2}
    ids, segments = random_tokens(np.random.default_rng(seed), settings["vocab_size"])
    keys = dropout_keys(twins, seed, len(ids))

    def outputs(backend: Backend) -> Any:
        return lambda model, *x: [model(*x, keys=keys[backend.name]).logits]

    results = [
        b.results(loaded(b, tmp_path / "base", **rates), outputs(b), seed, ids, segments) for b in twins
    ]
    compare(f"decoder of {family}, under dropout", "jax with mlx", *results)
    still = loaded(twins[0], tmp_path / "base")(ids, segments).logits
    assert np.abs(results[0][0][0] - np.asarray(still)).max() > 1e-3


def test_a_packed_text_sees_nothing_of_the_one_before(backend: Backend, seed: int, tmp_path: Path) -> None:
    _, settings = draw("llama", seed, tmp_path / "base")
    model = loaded(backend, tmp_path / "base")
    ids, segments = random_tokens(np.random.default_rng(seed), settings["vocab_size"])
    (packed,) = backend.values(lambda *x: [model(*x).logits])(ids, segments)
    (alone,) = backend.values(lambda x: [model(x).logits])(ids[1:2, 5:])
    check("packed texts", f"{backend.name} with a text alone", packed[1:2, 5:], alone, MODEL_TOLERANCE)


def test_attention_weights_are_returned_when_asked(twins: Twins, seed: int, tmp_path: Path) -> None:
    oracle, settings = draw("qwen3", seed, tmp_path / "base")
    oracle.set_attn_implementation("eager")
    ids, _ = random_tokens(np.random.default_rng(seed), settings["vocab_size"])
    theirs = oracle(torch.tensor(ids).long(), output_attentions=True).attentions
    for backend in twins:
        model = loaded(backend, tmp_path / "base")
        ours = backend.values(lambda x, m=model: list(m(x, attention=True).attention))(ids)
        assert len(ours) == settings["num_hidden_layers"]
        for one, other in zip(ours, theirs, strict=True):
            check(
                "attention weights",
                f"{backend.name} with transformers",
                one,
                other.detach().numpy(),
                MODEL_TOLERANCE,
            )


def test_more_tokens_than_the_context_are_refused(backend: Backend, tmp_path: Path) -> None:
    draw("llama", 0, tmp_path / "base")
    with pytest.raises(UserError, match="rows of 65 tokens, but this model's context is 64"):
        loaded(backend, tmp_path / "base")(backend.array(np.zeros((1, 65), np.int32)))


@families
def test_what_is_written_is_read_back_by_both_backends_and_by_transformers(
    twins: Twins, family: str, seed: int, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    oracle, settings = draw(family, seed, tmp_path / "base")
    ids, _ = random_tokens(np.random.default_rng(seed), settings["vocab_size"])
    expected = oracle(torch.tensor(ids).long()).logits.detach().numpy()
    for backend in twins:
        language, folder = backend.module("language"), tmp_path / backend.name
        model, config = language.load_language_model(tmp_path / "base")
        language.save_language_model(
            folder, model, config, training={}, tokenizer_save=lambda place: None, card=""
        )
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        theirs = again(torch.tensor(ids).long()).logits.detach().numpy()
        check("saved decoder", f"{backend.name} with transformers", theirs, expected, MODEL_TOLERANCE)
        assert language.load_language_model(folder)[1] == config


def test_loading_is_strict_and_lists_what_does_not_fit(backend: Backend, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    draw("llama", 1, tmp_path / "base", tie_word_embeddings=False, num_hidden_layers=1)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)  # of old checkpoints
    save_file(tensors, file)
    loaded(backend, tmp_path / "base")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, file)
    with pytest.raises(UserError) as told:
        loaded(backend, tmp_path / "base")
    assert "missing: model.layers.0.mlp.up_proj.weight" in str(told.value)
    assert "unexpected: model.layers.1.mlp.up_proj.weight" in str(told.value)
