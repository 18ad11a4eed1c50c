"""The key table, held to the keys that transformers writes."""

from __future__ import annotations

import numpy as np
import pytest

from common.errors import UserError
from common.keymap import FAMILIES, apply, as_bert, from_checkpoint, to_checkpoint


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


@pytest.mark.parametrize("stored", ["", "bert."])
@pytest.mark.parametrize("wanted", ["", "bert."])
def test_bare_and_prefixed_encoders_read_the_same(stored: str, wanted: str) -> None:
    keys = ("embeddings.word_embeddings.weight", "encoder.layer.0.output.dense.weight", "pooler.dense.bias")
    tensors = _tensors(*(stored + key for key in keys), "classifier.weight")
    _, found = as_bert({"model_type": "bert"}, tensors, prefix=wanted, where="here")
    assert list(found) == [*(wanted + key for key in keys), "classifier.weight"]


def test_old_layer_norm_names_are_understood() -> None:
    tensors = _tensors("bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.beta")
    _, found = as_bert({"model_type": "bert"}, tensors, where="here")
    assert list(found) == ["bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.bias"]


def test_two_names_for_one_tensor_are_refused() -> None:
    tensors = _tensors("bert.embeddings.LayerNorm.gamma", "embeddings.LayerNorm.weight")
    with pytest.raises(UserError, match="there twice"):
        as_bert({"model_type": "bert"}, tensors, where="here")


def test_an_unknown_family_names_the_ones_allowed() -> None:
    with pytest.raises(UserError, match=r"here: model_type is 'gpt2'.*bert, distilbert"):
        as_bert({"model_type": "gpt2"}, {}, where="here")


def _encoder_keys(keys: set[str]) -> set[str]:
    """The keys that the model must not miss and may not have too many of."""
    import re

    rules = FAMILIES["bert"]
    return {key for key in keys if not any(re.fullmatch(p, key) for p in (*rules.foreign, *rules.new))}


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("bert", "Model"),
        ("bert", "ForMaskedLM"),
        ("bert", "ForPreTraining"),
        ("bert", "ForSequenceClassification"),
        ("distilbert", "Model"),
        ("distilbert", "ForMaskedLM"),
    ],
)
def test_every_tensor_of_a_transformers_checkpoint_has_its_place(family: str, head: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config, model = _tiny(transformers, family, head)
    stored = {key: value.numpy() for key, value in model.state_dict().items()}
    bert, found = as_bert(config.to_dict(), stored, where="here")
    reference = transformers.BertModel(transformers.BertConfig(**bert), add_pooling_layer=False)
    expected = {f"bert.{key}" for key in reference.state_dict()}
    assert _encoder_keys(set(found)) == _encoder_keys(expected)
    encoder = {key.removeprefix("bert."): torch.tensor(value) for key, value in found.items()}
    reference.load_state_dict({key: encoder[key] for key in reference.state_dict() if key in encoder})
    ids = torch.arange(10)[None]
    with torch.no_grad():
        ours = reference.eval()(ids).last_hidden_state
        theirs = getattr(model, family, model).eval()(ids)[0]
    assert (ours - theirs).abs().max() < 1e-5


def _tiny(transformers: object, family: str, head: str) -> tuple[object, object]:
    name = {"bert": "Bert", "distilbert": "DistilBert"}[family]
    size = (
        {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
        if family == "bert"
        else {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24}
    )
    config = getattr(transformers, f"{name}Config")(vocab_size=30, max_position_embeddings=12, **size)
    return config, getattr(transformers, f"{name}{head}")(config)
