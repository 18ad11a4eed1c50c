"""Every family of encoders: transformers' numbers, strict checkpoints, a start, training, saving.

The oracle is transformers itself; each test runs for each family.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from common.config import ModelConfig
from common.errors import UserError
from common.hub import resolve_model
from common.keymap import FAMILIES
from jax_impl.loading import MODELS, load_bi_encoder, load_cross_encoder, model_tensors
from jax_impl.models.deberta import DebertaV2Config, relative_rows
from jax_impl.models.lora import add_lora, trainable
from jax_impl.models.modernbert import ModernBertConfig
from jax_impl.scoring import load_encoder, load_scorer
from tests.families import (
    CLASSES,
    OTHER_HEADS,
    UNSUPPORTED,
    VARIANTS,
    random_pairs,
    random_settings,
    tiny_sizes,
    write_checkpoint,
)
from tests.tiny import FILLER, World, environment, train

torch = pytest.importorskip("torch", reason="the oracle needs torch: install the extra `peers`")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4  # float32
QUERIES = ["bano luro", "kino", "bano"]
PASSAGES = [" ".join(FILLER[:9]), "luro kino", "dorax"]

every_family = pytest.mark.parametrize("family", list(FAMILIES))


def test_every_family_of_the_key_table_has_a_model_and_a_test() -> None:
    assert FAMILIES.keys() == MODELS.keys() == CLASSES.keys() == VARIANTS.keys() == OTHER_HEADS.keys()


def call(model: nnx.Module, *inputs: Any) -> Any:
    graphdef, state = nnx.split(model)
    return jax.jit(lambda s, *x: nnx.merge(graphdef, s)(*x))(state, *map(jnp.asarray, inputs))


@every_family
@pytest.mark.parametrize("case", range(3))
def test_random_configurations_agree_with_transformers(
    seed: int, family: str, case: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng((seed, case))
    settings = random_settings(family, rng)
    print(settings)
    base = write_checkpoint(tmp_path / "base", family, seed=seed, **settings)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(base).eval()
    ids, sides = random_pairs(family, theirs.config, rng)
    segments = getattr(theirs.config, "type_vocab_size", 0) > 1
    model = load_cross_encoder(base, ModelConfig(passage_segment=1 if segments else None)).model
    mask = sides > 0
    inputs = {"input_ids": ids, "attention_mask": mask.astype(np.int64)}
    if segments:
        inputs["token_type_ids"] = (sides == 2).astype(np.int64)
    with torch.no_grad():
        out = theirs(**{key: torch.tensor(x) for key, x in inputs.items()}, output_hidden_states=True)
        hidden = theirs.base_model(**{key: torch.tensor(x) for key, x in inputs.items()})[0].numpy()
    ours = np.asarray(call(model.encoder, ids, mask, (sides == 2).astype(int)))
    errors = {
        "hidden": np.abs(ours - hidden)[mask].max(),
        "portable": np.abs(np.asarray(call(model, ids, sides).portable) - out.logits[:, 0].numpy()).max(),
    }
    print(f"worst error: {family} {errors}")
    assert max(errors.values()) <= TOLERANCE


@every_family
def test_padding_changes_nothing(seed: int, family: str, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", family, "Model", seed=seed, **tiny_sizes(family, layers=2))
    model = load_bi_encoder(base).encoder
    pad = json.loads((base / "config.json").read_text())["pad_token_id"]
    ids = np.random.default_rng(seed).integers(5, 100, (1, 20))
    alone = call(model, ids, np.ones((1, 20), bool))
    for filling in (pad, 7):
        padded = np.concatenate((ids, np.full((1, 30), filling)), axis=1)
        among = call(model, padded, np.arange(50)[None] < 20)[:, :20]
        assert float(jnp.max(jnp.abs(alone - among))) <= 1e-5


@every_family
def test_a_base_is_strict_both_ways_and_may_carry_the_heads_of_its_family(
    family: str, tmp_path: Path
) -> None:
    for head in OTHER_HEADS[family]:
        base = write_checkpoint(tmp_path / head, family, head)
        assert load_cross_encoder(base, ModelConfig()).start == "masked_lm"
        load_bi_encoder(base)
    tensors = load_file(base / "model.safetensors")
    inside = [key for key in tensors if key.startswith(FAMILIES[family].prefix) and "pooler" not in key]
    gone = inside[len(inside) // 2]
    tensors["stranger.weight"] = np.zeros(3, np.float32)
    save_file({key: value for key, value in tensors.items() if key != gone}, base / "model.safetensors")
    for load in (load_bi_encoder, lambda directory: load_cross_encoder(directory, ModelConfig())):
        with pytest.raises(UserError) as error:
            load(base)
        assert f"missing: {gone} " in str(error.value)
        assert "unexpected: stranger.weight [3]" in str(error.value)
        assert len(str(error.value).splitlines()) == 4


@every_family
def test_an_existing_cross_encoder_begins_as_it_was(family: str, seed: int, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", family, seed=seed)
    assert load_cross_encoder(base, ModelConfig()).start == "cross_encoder"
    scores = load_scorer(base).score(QUERIES, PASSAGES)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(base).eval()
    pairs = transformers.AutoTokenizer.from_pretrained(base)(
        QUERIES, PASSAGES, padding=True, return_tensors="pt"
    )
    if family not in ("bert", "electra"):
        pairs.pop("token_type_ids", None)
    with torch.no_grad():
        logits = theirs(**pairs).logits[:, 0].numpy()
    np.testing.assert_allclose(scores.score, logits, atol=TOLERANCE)
    np.testing.assert_allclose(scores.portable, logits, atol=TOLERANCE)
    assert np.std(logits) > 1e-3


@every_family
def test_a_classifier_of_several_labels_is_refused(family: str, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", family, num_labels=3)
    with pytest.raises(UserError, match="classifier has 3 labels, a reranker has 1"):
        load_cross_encoder(base, ModelConfig())


@every_family
def test_a_family_without_segments_refuses_one(family: str, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", family, "Model")
    if family in ("bert", "electra"):
        assert load_cross_encoder(base, ModelConfig(passage_segment=1)).settings["passage_segment"] == 1
        return
    with pytest.raises(UserError, match=r"passage_segment is 1, but the model in .* has no segment above 0"):
        load_cross_encoder(base, ModelConfig(passage_segment=1))


@every_family
def test_sentence_vectors_are_those_of_sentence_transformers(family: str, seed: int, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers", reason="install the extra `peers`")
    base = write_checkpoint(tmp_path / "base", family, "Model", seed=seed)
    model = library.SentenceTransformer(str(base), device="cpu")  # which adds mean pooling
    model.save(str(tmp_path / "sentences"))
    theirs = model.encode(PASSAGES, normalize_embeddings=True)
    encoder = load_encoder(tmp_path / "sentences")
    np.testing.assert_allclose(encoder.encode(PASSAGES), theirs, atol=TOLERANCE)
    loaded = load_cross_encoder(tmp_path / "sentences", ModelConfig())
    assert loaded.start == "sentence_encoder" and loaded.model.resonance.gamma[...] == 20


@every_family
def test_adapters_cover_the_encoder_and_leave_the_heads_to_learn(family: str, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", family, "Model")
    model = load_cross_encoder(base, ModelConfig()).model
    plain = model_tensors(model)
    adapted = add_lora(model.encoder, 2, 4.0, (), rngs=nnx.Rngs(0))
    linears = [key for key in plain if key.startswith(FAMILIES[family].prefix) and "norm" not in key.lower()]
    weights = [key for key in linears if key.endswith(".weight") and "_embeddings." not in key]
    names = {f"{FAMILIES[family].prefix}{path}.weight" for path in adapted}
    assert names == {key for key in weights if "pooler" not in key}
    learned, _ = nnx.split_state(nnx.state(model, nnx.Param), trainable, ...)
    full = {".".join(map(str, path)) for path, value in nnx.to_flat_state(learned)
            if not isinstance(value, nnx.LoRAParam)}  # fmt: skip
    heads = (*FAMILIES[family].head, "resonance")
    assert all(name.startswith(heads) for name in full) and len(full) >= 8
    merged = model_tensors(model)
    assert merged.keys() == plain.keys()
    assert all((merged[key] == plain[key]).all() for key in plain)


@every_family
def test_in_bfloat16_the_hidden_states_are_nearly_the_same(family: str, seed: int, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", family, "Model", seed=seed)
    ids, mask = np.random.default_rng(seed).integers(5, 100, (2, 16)), np.ones((2, 16), bool)
    wide = call(load_bi_encoder(base).encoder, ids, mask)
    narrow = call(load_bi_encoder(base, dtype=jnp.bfloat16).encoder, ids, mask)
    assert narrow.dtype == jnp.bfloat16
    assert float(jnp.mean(jnp.abs(narrow - wide)) / jnp.mean(jnp.abs(wide))) < 0.05


@every_family
@pytest.mark.slow
def test_two_steps_are_trained_and_saved_for_other_libraries(
    family: str, world: World, seed: int, tmp_path: Path
) -> None:
    library = pytest.importorskip("sentence_transformers", reason="install the extra `peers`")
    base = write_checkpoint(tmp_path / "base", family, "Model", seed=seed)
    (base / "modules.json").write_text("[]")
    config = world.config(max_steps=2, evaluations=1, hidden_dropout=0.1, attention_dropout=0.1)
    config = replace(config, model=replace(config.model, base=str(base)))
    train(config, tmp_path / "runs", say=lambda text: None)
    trained = tmp_path / "runs" / "tiny" / "final"
    before = load_cross_encoder(base, ModelConfig(), seed=config.train.seed).model
    after = load_cross_encoder(trained, ModelConfig())
    assert after.start == "resumed" and after.settings["start"] == "sentence_encoder"
    old, new = model_tensors(before), model_tensors(after.model)
    assert [key for key in new if (new[key] == old[key]).all()] == ["resonance.b"]  # all else has learned
    ours = load_scorer(trained).score(QUERIES, PASSAGES)
    assert np.isfinite(ours.score).all() and np.std(ours.portable) > 1e-3
    theirs = library.CrossEncoder(str(trained), device="cpu")
    assert type(theirs.model).__name__ == FAMILIES[family].architecture
    predicted = theirs.predict(list(zip(QUERIES, PASSAGES, strict=True)), show_progress_bar=False)
    np.testing.assert_allclose(predicted, ours.portable, atol=TOLERANCE)
    check_saved_is_strict(trained)


def check_saved_is_strict(trained: Path) -> None:
    tensors = load_file(trained / "model.safetensors")
    gone = sorted(tensors)[0]
    tensors["stranger.weight"] = np.zeros(3, np.float32)
    save_file({key: value for key, value in tensors.items() if key != gone}, trained / "model.safetensors")
    with pytest.raises(UserError) as error:
        load_cross_encoder(trained, ModelConfig())
    assert f"missing: {gone} " in str(error.value)
    assert "unexpected: stranger.weight [3]" in str(error.value)


@pytest.mark.parametrize(("family", "setting", "value", "allowed"), UNSUPPORTED)
def test_a_variant_that_is_not_computed_is_refused_by_name(
    family: str, setting: str, value: Any, allowed: str, tmp_path: Path
) -> None:
    base = write_checkpoint(tmp_path / "base", family, "Model")
    config = json.loads((base / "config.json").read_text()) | {setting: value}
    (base / "config.json").write_text(json.dumps(config))
    for load in (load_bi_encoder, lambda directory: load_cross_encoder(directory, ModelConfig())):
        with pytest.raises(UserError) as error:
            load(base)
        named = "rope_type" if setting == "rope_parameters" else setting
        assert str(error.value).startswith(f"{base / 'config.json'}: {named} is ")
        assert allowed in str(error.value)


@every_family
def test_pickled_weights_are_refused_and_load_once_converted(family: str, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", family)
    expected = load_cross_encoder(base, ModelConfig())
    weights = load_file(base / "model.safetensors")
    torch.save({key: torch.tensor(value) for key, value in weights.items()}, base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(UserError, match=rf"python scripts/convert_pickle\.py {base}"):
        resolve_model(base)
    script = Path(__file__).resolve().parents[2] / "scripts" / "convert_pickle.py"
    subprocess.run([sys.executable, str(script), str(base)], check=True, env=environment())
    found = load_cross_encoder(resolve_model(base), ModelConfig())
    assert found.start == expected.start == "cross_encoder"
    tensors, old = model_tensors(found.model), model_tensors(expected.model)
    assert all((tensors[key] == old[key]).all() for key in old)


def test_buckets_of_deberta_v3_are_those_of_transformers() -> None:
    build = pytest.importorskip("transformers.models.deberta_v2.modeling_deberta_v2").build_relative_position
    for buckets, farthest, tokens in ((256, 512, 600), (32, 128, 150), (48, 500, 700)):
        config = DebertaV2Config(position_buckets=buckets, max_relative_positions=farthest)
        rows = torch.zeros(1, tokens, 1)
        expected = build(rows, rows, buckets, farthest)[0].numpy() + buckets
        ours = relative_rows(tokens, config)
        place = np.arange(tokens)
        pairs = ours[tokens - 1 - place[:, None] + place]
        np.testing.assert_array_equal(pairs, np.clip(expected, 0, 2 * buckets - 1))


def test_modernbert_reads_the_spelling_of_the_hub_and_that_of_transformers() -> None:
    old = {
        "num_hidden_layers": 4,
        "global_attn_every_n_layers": 3,
        "global_rope_theta": 160000.0,
        "local_rope_theta": 9000.0,
    }
    full, sliding = "full_attention", "sliding_attention"
    new = {
        "num_hidden_layers": 4,
        "layer_types": [full, sliding, sliding, full],
        "rope_parameters": {
            full: {"rope_theta": 160000.0, "rope_type": "default"},
            sliding: {"rope_theta": 9000.0, "rope_type": "default"},
        },
    }
    assert ModernBertConfig.from_dict(old) == ModernBertConfig.from_dict(new)
    assert dict(ModernBertConfig.from_dict(old).rope_theta)[sliding] == 9000.0


@pytest.mark.parametrize("family", ["deberta-v2", "modernbert"])
def test_long_texts_agree_with_transformers(family: str, seed: int, tmp_path: Path) -> None:
    sizes = tiny_sizes(family, width=16, heads=2, layers=2) | {"max_position_embeddings": 1024}
    base = write_checkpoint(tmp_path / "base", family, "Model", seed=seed, **sizes)
    ids = np.random.default_rng(seed).integers(5, 100, (1, 1000))
    theirs = transformers.AutoModel.from_pretrained(base).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(ids))[0].numpy()
    ours = call(load_bi_encoder(base).encoder, ids, np.ones_like(ids))
    error = float(np.abs(np.asarray(ours) - expected).max())
    print(f"worst error at 1,000 tokens: {family} {error}")
    assert error <= TOLERANCE
