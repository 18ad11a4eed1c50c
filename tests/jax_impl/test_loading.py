"""From a checkpoint directory to a reranker and back: three starts, strictness, what other libraries load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from common.config import ModelConfig
from common.errors import UserError
from common.text import PairTokenizer
from jax_impl.loading import (
    LoadedReranker,
    load_bi_encoder,
    load_cross_encoder,
    model_tensors,
    save_cross_encoder,
)
from jax_impl.models.lora import LoRALinear, add_lora
from jax_impl.scoring import load_scorer
from tests.tiny import FILLER, write_base

QUERIES = ["bano luro", "kino", "bano"]
PASSAGES = [" ".join(FILLER[:9]), "luro kino", "dorax"]


def random_head(loaded: LoadedReranker, seed: int) -> LoadedReranker:
    """As after training: no parameter is where it began."""
    rng = np.random.default_rng(seed)
    for _, variable in nnx.to_flat_state(nnx.state(loaded.model, nnx.Param)):
        value = variable[...]
        variable[...] = value + jnp.asarray(rng.normal(0, 0.1, value.shape), value.dtype)
    return loaded


def save(loaded: LoadedReranker, base: Path, directory: Path) -> Path:
    save_cross_encoder(
        directory,
        loaded,
        training={"step": 1},
        tokenizer_save=PairTokenizer(base).save,
        card="# tiny\n",
    )
    return directory


def change_tensors(file: Path, **changes: Any) -> None:
    """Rewrite a safetensors file; None takes a tensor out."""
    tensors = load_file(file) | {key.replace("__", "."): value for key, value in changes.items()}
    save_file({key: value for key, value in tensors.items() if value is not None}, file)


@pytest.fixture
def trained(tmp_path: Path, seed: int) -> Path:
    """A directory that we wrote."""
    base = write_base(tmp_path / "base", seed=seed)
    return save(
        random_head(load_cross_encoder(base, ModelConfig(), seed=seed), seed), base, tmp_path / "trained"
    )


def test_a_sentence_encoder_begins_with_its_resonance(tmp_path: Path, seed: int) -> None:
    base = write_base(tmp_path / "base", seed=seed)
    (base / "modules.json").write_text("[]")
    loaded = load_cross_encoder(base, ModelConfig())
    assert loaded.start == loaded.settings["start"] == "sentence_encoder"
    scores = load_scorer(base).score(QUERIES, PASSAGES)
    np.testing.assert_allclose(scores.score, 20 * (scores.resonance - 0.5), atol=1e-4)


def test_a_masked_language_model_begins_from_a_small_random_reading_of_cls(tmp_path: Path, seed: int) -> None:
    base = write_base(tmp_path / "base", seed=seed)
    change_tensors(base / "model.safetensors", cls__predictions__bias=np.zeros(5, np.float32))
    loaded = load_cross_encoder(base, ModelConfig(), seed=seed)
    head = loaded.model.resonance
    assert loaded.start == "masked_lm" and head.gamma[...] == 0 and head.b[...] == 0
    assert 0.01 < float(jnp.std(head.u[...])) < 0.03
    again = load_cross_encoder(base, ModelConfig(), seed=seed + 1).model.resonance
    assert (again.u[...] != head.u[...]).all()


def test_an_existing_cross_encoder_begins_as_it_was(tmp_path: Path, seed: int) -> None:
    torch = pytest.importorskip("torch", reason="the oracle needs torch: install the extra `peers`")
    from transformers import AutoTokenizer, BertForSequenceClassification

    base = write_base(tmp_path / "base", seed=seed, head=True)
    for segment, inputs in ((1, None), (0, ["input_ids", "attention_mask"])):
        settings = {"tokenizer_class": "BertTokenizer"} | ({"model_input_names": inputs} if inputs else {})
        (base / "tokenizer_config.json").write_text(json.dumps(settings))
        loaded = load_cross_encoder(base, ModelConfig())
        assert (loaded.start, loaded.settings["passage_segment"]) == ("cross_encoder", segment)
        scores = load_scorer(base).score(QUERIES, PASSAGES)
        theirs = BertForSequenceClassification.from_pretrained(base).eval()
        pairs = AutoTokenizer.from_pretrained(base)(
            list(QUERIES), list(PASSAGES), padding=True, return_tensors="pt"
        )
        assert ("token_type_ids" in pairs) == bool(segment)
        with torch.no_grad():
            logits = theirs(**pairs).logits[:, 0]
        np.testing.assert_allclose(scores.score, logits.numpy(), atol=1e-4)
        np.testing.assert_allclose(scores.portable, logits.numpy(), atol=1e-4)


def test_a_run_s_checkpoint_keeps_its_head_and_says_so(trained: Path) -> None:
    load_cross_encoder(trained, ModelConfig(passage_segment=0))
    for asked, message in (
        (ModelConfig(projector="polar"), "projector is 'polar', the checkpoint has 'cartesian'"),
        (ModelConfig(complex_width=7), "complex_width is 7, the checkpoint has 32"),
        (ModelConfig(passage_segment=1), "passage_segment is 1, the checkpoint has 0"),
    ):
        with pytest.raises(UserError, match=message):
            load_cross_encoder(trained, asked)


def test_a_recipe_can_name_another_start(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", head=True)
    loaded = load_cross_encoder(base, ModelConfig(start="sentence_encoder"))
    assert loaded.start == "sentence_encoder" and loaded.model.resonance.gamma[...] == 20
    headless = write_base(tmp_path / "headless")
    with pytest.raises(UserError, match="but there is no classifier to begin with"):
        load_cross_encoder(headless, ModelConfig(start="cross_encoder"))
    change_tensors(
        base / "model.safetensors", bert__pooler__dense__weight=None, bert__pooler__dense__bias=None
    )
    with pytest.raises(UserError, match=r"but there is no bert.pooler.dense to begin with"):
        load_cross_encoder(base, ModelConfig())


def test_a_classifier_of_several_labels_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", head=True)
    change_tensors(base / "model.safetensors", classifier__weight=np.zeros((3, 32), np.float32))
    with pytest.raises(UserError, match="classifier has 3 labels, a reranker has 1"):
        load_cross_encoder(base, ModelConfig())


@pytest.mark.parametrize("load", [lambda d: load_cross_encoder(d, ModelConfig()), load_bi_encoder])
def test_a_base_is_strict_on_the_encoder_and_lists_every_tensor(tmp_path: Path, load: Any) -> None:
    base = write_base(tmp_path / "base")
    change_tensors(
        base / "model.safetensors",
        encoder__layer__0__attention__self__query__bias=None,
        embeddings__LayerNorm__weight=None,
        encoder__layer__0__output__dense__weight=np.zeros((32, 63), np.float32),
        encoder__layer__1__output__dense__bias=np.zeros(32, np.float32),
        head__weight=np.zeros(2, np.float32),
    )
    with pytest.raises(UserError) as error:
        load(base)
    for line in (
        "missing: bert.encoder.layer.0.attention.self.query.bias [32]",
        "missing: bert.embeddings.LayerNorm.weight [32]",
        "wrong shape: bert.encoder.layer.0.output.dense.weight is [32, 63], the model needs [32, 64]",
        "unexpected: bert.encoder.layer.1.output.dense.bias [32]",
        "unexpected: head.weight [2]",
    ):
        assert line in str(error.value)
    assert str(base) in str(error.value)


def test_a_base_may_lack_the_pooler_and_carry_a_language_model_head(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    change_tensors(
        base / "model.safetensors",
        pooler__dense__weight=None,
        pooler__dense__bias=None,
        cls__predictions__bias=np.zeros(5, np.float32),
    )
    assert load_cross_encoder(base, ModelConfig()).start == "masked_lm"
    load_bi_encoder(base)


@pytest.mark.parametrize("file", ["model.safetensors", "resonance.safetensors"])
def test_a_directory_that_we_wrote_is_strict_both_ways(trained: Path, file: str) -> None:
    gone = {"model.safetensors": "bert.pooler.dense.bias", "resonance.safetensors": "gamma"}[file]
    change_tensors(
        trained / file, **{gone.replace(".", "__"): None}, cls__predictions__bias=np.zeros(5, np.float32)
    )
    with pytest.raises(UserError) as error:
        load_cross_encoder(trained, ModelConfig())
    assert "missing: " in str(error.value) and gone in str(error.value)
    assert "unexpected: " in str(error.value) and "cls.predictions.bias [5]" in str(error.value)


def test_a_directory_of_ours_without_its_head_is_no_plain_cross_encoder(trained: Path) -> None:
    (trained / "resonance.safetensors").unlink()
    with pytest.raises(UserError, match=r"resonance\.safetensors, the head of its full score, is missing"):
        load_cross_encoder(trained, ModelConfig())


@pytest.mark.parametrize("file", ["model.safetensors", "resonance.safetensors"])
def test_a_truncated_file_is_named(trained: Path, file: str) -> None:
    data = (trained / file).read_bytes()
    (trained / file).write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(UserError, match=f"{file}: truncated or corrupt"):
        load_cross_encoder(trained, ModelConfig())


def test_a_missing_setting_of_the_head_is_named(trained: Path) -> None:
    config = json.loads((trained / "config.json").read_text())
    del config["resonance"]["state_size"]
    (trained / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json: its `resonance` part lacks 'state_size'"):
        load_cross_encoder(trained, ModelConfig())


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("fusion_weight", "x", "a number >= 0"),
        ("fusion_weight", float("nan"), "a number >= 0"),
        ("max_query_tokens", "x", "a whole number >= 1"),
        ("max_passage_tokens", 0, "a whole number >= 1"),
        ("state_size", "x", "a whole number >= 1"),
        ("state_size", True, "a whole number >= 1"),
        ("passage_segment", -1, "a whole number >= 0"),
        ("parameterisation", "foo", "cartesian, polar"),
        ("precision", "foo", "auto, float32, bfloat16"),
        ("head", ["cls"], "resonance, cls, real"),
    ],
)
def test_a_setting_of_the_head_that_is_not_allowed_is_named(
    trained: Path, key: str, value: object, allowed: str
) -> None:
    config = json.loads((trained / "config.json").read_text())
    config["resonance"][key] = value
    (trained / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        load_scorer(trained)
    message = str(caught.value)
    assert message.startswith(f"{trained / 'config.json'}: ")
    assert f"{key} is {value!r}; allowed: {allowed}" in message


def test_states_that_cannot_be_cut_into_blocks_are_named(trained: Path) -> None:
    config = json.loads((trained / "config.json").read_text())
    config["resonance"] |= {"head": "block_fidelity", "state_size": 30}
    (trained / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="state_size is 30; allowed: multiples of 8"):
        load_scorer(trained)


def test_a_size_that_is_no_number_is_named(trained: Path) -> None:
    config = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps(config | {"num_attention_heads": "4"}))
    with pytest.raises(UserError, match=r"config\.json: num_attention_heads is '4'; a whole number"):
        load_cross_encoder(trained, ModelConfig())


@pytest.mark.parametrize("projector", ["cartesian", "polar"])
def test_saving_and_loading_gives_the_same_bits(projector: Any, tmp_path: Path, seed: int) -> None:
    base = write_base(tmp_path / "base", seed=seed)
    settings = ModelConfig(projector=projector, complex_width=12, passage_segment=1)
    loaded = random_head(load_cross_encoder(base, settings, seed=seed), seed)
    again = load_cross_encoder(save(loaded, base, tmp_path / "saved"), ModelConfig())
    assert again.start == "resumed" and again.settings == loaded.settings
    assert again.model.passage_segment == 1
    before, after = model_tensors(loaded.model), model_tensors(again.model)
    assert before.keys() == after.keys()
    for key in before:
        np.testing.assert_array_equal(before[key], after[key], err_msg=key)


def test_adapters_are_merged_when_a_reranker_is_saved(tmp_path: Path, seed: int) -> None:
    base = write_base(tmp_path / "base", seed=seed)
    loaded = load_cross_encoder(base, ModelConfig(), seed=seed)
    add_lora(loaded.model.encoder, 4, 8.0, ("query", "dense"), rngs=nnx.Rngs(seed))
    random_head(loaded, seed)
    for _, module in nnx.iter_modules(loaded.model):
        if isinstance(module, LoRALinear):
            module.lora_b[...] = 0.1 * jnp.ones_like(module.lora_b[...])
    ids, sides = jnp.asarray([[2, 7, 8, 3, 9, 3]]), jnp.asarray([[1, 1, 1, 1, 2, 2]])
    adapted = loaded.model(ids, sides)
    saved = load_cross_encoder(save(loaded, base, tmp_path / "saved"), ModelConfig())
    assert not any("lora" in key for key in load_file(tmp_path / "saved" / "model.safetensors"))
    np.testing.assert_allclose(saved.model(ids, sides).score, adapted.score, atol=1e-5)
    np.testing.assert_allclose(saved.model(ids, sides).portable, adapted.portable, atol=1e-5)


@pytest.mark.parametrize("segment", [0, 1])
def test_sentence_transformers_loads_what_we_saved_and_gives_the_portable_scores(
    tmp_path: Path, seed: int, segment: Literal[0, 1]
) -> None:
    library = pytest.importorskip(
        "sentence_transformers", reason="needs sentence-transformers: install the extra `peers`"
    )
    base = write_base(tmp_path / "base", seed=seed)
    loaded = load_cross_encoder(base, ModelConfig(passage_segment=segment), seed=seed)
    trained = save(random_head(loaded, seed), base, tmp_path / "trained")
    ours = load_scorer(trained).score(QUERIES, PASSAGES)
    theirs = library.CrossEncoder(str(trained), device="cpu").predict(
        list(zip(QUERIES, PASSAGES, strict=True)), show_progress_bar=False
    )
    np.testing.assert_allclose(theirs, ours.portable, atol=1e-4)
    assert np.std(ours.portable) > 1e-3


def test_a_sentence_encoder_that_does_not_pool_by_the_mean_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    pooling = base / "1_Pooling" / "config.json"
    pooling.parent.mkdir(exist_ok=True)
    pooling.write_text(json.dumps({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}))
    load_bi_encoder(base)
    pooling.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    with pytest.raises(UserError, match=r"pools by pooling_mode_cls_token.*--model\.start masked_lm"):
        load_bi_encoder(base)
