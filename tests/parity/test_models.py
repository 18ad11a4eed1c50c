"""The models of both backends against each other, and the encoders against transformers.

Random tiny configurations, weights and inputs; every output, and the gradient of a random sum of all outputs
by every parameter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import ModelConfig
from common.errors import UserError
from common.reference.cases import EncoderCase, float32_exact, random_encoder
from tests.parity.backends import MODEL_TOLERANCE, Backend, Jax, Mlx, check, check_all, mix
from tests.tiny import VOCABULARY, write_base

Twins = tuple[Jax, Mlx]
Results = tuple[list[np.ndarray], dict[str, np.ndarray]]
# 25 times the rounding of a bfloat16, 2^-8: the two round at other places, layer after layer
BFLOAT16_TOLERANCE = 1e-1
ACTIVATIONS = ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"]


def draw(seed: int, directory: Path, hidden_act: str = "gelu", **settings: Any) -> EncoderCase:
    """A case, with a checkpoint of its configuration in `directory`."""
    case = random_encoder(seed, len(VOCABULARY), hidden_act)
    print(case.config)
    write_base(directory, seed=seed, **case.config, **settings)
    return case


def cross_encoders(twins: Twins, directory: Path, **settings: Any) -> list[Any]:
    """Each backend's cross-encoder of a directory."""
    dropout = settings.pop("dropout", (0.0, 0.0))
    return [
        b.module("loading").load_cross_encoder(directory, ModelConfig(**settings), dropout=dropout).model
        for b in twins
    ]


def randomise(twins: Twins, models: list[Any], seed: int) -> None:
    """Move every parameter of JAX's model, the heads too, and give both the same."""
    rng = np.random.default_rng(seed)
    start = sorted(twins[0].parameters(models[0]).items())
    moved = {name: float32_exact(value + rng.normal(0, 0.1, value.shape)) for name, value in start}
    for backend, model in zip(twins, models, strict=True):
        assert backend.parameters(model).keys() == moved.keys()
        backend.set_parameters(model, moved)


def torch_results(model: Any, outputs: list[Any], seed: int) -> Results:
    """What `Backend.results` says, of a torch model."""
    import torch

    rng = np.random.default_rng(seed)
    sum((torch.tensor(mix(tuple(x.shape), rng), dtype=x.dtype) * x).sum() for x in outputs).backward()
    named = {name: value.grad for name, value in model.named_parameters()}
    gradients = {name: value.numpy() for name, value in named.items() if value is not None}
    return [x.detach().numpy() for x in outputs], gradients


def compare(what: str, pair: str, ours: Results, theirs: Results, tolerance: float = MODEL_TOLERANCE) -> None:
    """Every output and every gradient, to the tolerance of whole models."""
    for number, (value, expected) in enumerate(zip(ours[0], theirs[0], strict=True)):
        check(f"{what}, output {number}", pair, value, expected, tolerance)
    check_all(f"{what}, gradient", pair, ours[1], theirs[1], tolerance)


def pair_outputs(backend: Backend, model: Any, ids: Any, sides: Any, keys: Any = None) -> list[Any]:
    """All that a cross-encoder says of pairs; `keys` of each backend turn dropout on."""
    out = model(ids, sides, None if keys is None else keys[backend.name])
    return [out.score, out.portable, out.resonance, *out.query, *out.passage]


def compare_cross_encoders(
    what: str, twins: Twins, models: list[Any], case: EncoderCase, seed: int, keys: Any = None
) -> None:
    results = [
        backend.results(
            model, lambda *x, b=backend: pair_outputs(b, *x, keys=keys), seed, case.input_ids, case.sides
        )
        for backend, model in zip(twins, models, strict=True)
    ]
    compare(what, "jax with mlx", *results)
    still = [name for name, gradient in results[0][1].items() if not gradient.any()]
    assert not [name for name in still if not name.endswith("key.bias")]


@pytest.mark.parametrize("hidden_act", ACTIVATIONS)
def test_the_encoder_agrees_with_its_twin_and_with_transformers(
    twins: Twins, hidden_act: str, seed: int, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch", reason="the oracle needs torch: install the extra `peers`")
    from transformers import BertModel

    case = draw(seed, tmp_path / "base", hidden_act)
    mask, segments = case.sides > 0, (case.sides == 2).astype(np.int32)
    keep = mask[..., None].astype(np.float32)  # what padding holds is nobody's business
    inputs = case.input_ids, mask, segments, keep

    def outputs(encoder: Any, ids: Any, mask: Any, segments: Any, keep: Any) -> list[Any]:
        hidden = encoder(ids, mask, segments)
        return [hidden * keep, encoder.pooler(hidden) * keep[:, 0]]

    models = cross_encoders(twins, tmp_path / "base")
    results = [b.results(m.encoder, outputs, seed, *inputs) for b, m in zip(twins, models, strict=True)]
    oracle = BertModel.from_pretrained(tmp_path / "base", dtype=torch.float64).eval()
    ids, attention, types, real = (torch.tensor(np.asarray(x)) for x in inputs)
    out = oracle(ids.long(), attention.long(), types.long())
    theirs = torch_results(oracle, [out.last_hidden_state * real, out.pooler_output * real[:, 0]], seed)
    for backend, ours in zip(twins, results, strict=True):
        compare("encoder of BERT", f"{backend.name} with transformers", ours, theirs)
    compare("encoder of BERT", "jax with mlx", *results)


@pytest.mark.parametrize(("projector", "segment"), [("cartesian", 0), ("polar", 1)])
def test_the_cross_encoder_agrees_with_its_twin(
    twins: Twins, projector: str, segment: int, seed: int, tmp_path: Path
) -> None:
    case = draw(seed, tmp_path / "base")
    width = int(np.random.default_rng(seed).integers(2, 12))
    models = cross_encoders(
        twins, tmp_path / "base", projector=projector, passage_segment=segment, complex_width=width
    )
    randomise(twins, models, seed)
    compare_cross_encoders(f"cross-encoder with a {projector} head", twins, models, case, seed)


def test_the_portable_score_is_transformers_classifier(twins: Twins, seed: int, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="the oracle needs torch: install the extra `peers`")
    from transformers import BertForSequenceClassification

    case = draw(seed, tmp_path / "base", head=True)
    inputs = case.input_ids[:-1], case.sides[:-1]  # without the row of padding
    oracle = BertForSequenceClassification.from_pretrained(tmp_path / "base", dtype=torch.float64).eval()
    ids, attention, segments = (
        torch.tensor(x.astype(np.int64)) for x in (inputs[0], inputs[1] > 0, inputs[1] == 2)
    )
    theirs = torch_results(oracle, [oracle(ids, attention, segments).logits[:, 0]], seed)
    models = cross_encoders(twins, tmp_path / "base", passage_segment=1)
    for backend, model in zip(twins, models, strict=True):
        values, gradients = backend.results(model, lambda m, *x: [m(*x).portable], seed, *inputs)
        gradients = {key: x for key, x in gradients.items() if not key.startswith("resonance.")}
        compare("portable score", f"{backend.name} with transformers", (values, gradients), theirs)


def test_the_bi_encoder_agrees_with_its_twin(twins: Twins, seed: int, tmp_path: Path) -> None:
    case = draw(seed, tmp_path / "base")
    inputs = case.input_ids[:-1], case.sides[:-1] > 0  # without the row of padding
    models = [b.module("loading").load_bi_encoder(tmp_path / "base") for b in twins]
    results = [b.results(m, lambda m, *x: [m(*x)], seed, *inputs) for b, m in zip(twins, models, strict=True)]
    compare("bi-encoder", "jax with mlx", *results)


def test_adapters_agree_with_their_twin_and_merge_alike(twins: Twins, seed: int, tmp_path: Path) -> None:
    case = draw(seed, tmp_path / "base")
    models = cross_encoders(twins, tmp_path / "base")
    found = [
        b.module("models.lora").add_lora(m.encoder, 3, 6.0, ("query", "dense"), rngs=b.rngs(seed % 2**31))
        for b, m in zip(twins, models, strict=True)
    ]
    assert sorted(found[0]) == sorted(found[1]) and len(found[0]) == 4 * case.config["num_hidden_layers"]
    randomise(twins, models, seed)
    compare_cross_encoders("adapters", twins, models, case, seed)
    merged = [b.module("loading").model_tensors(m) for b, m in zip(twins, models, strict=True)]
    assert not any("lora" in key for key in merged[0])
    check_all("merged adapters", "jax with mlx", *merged, 1e-6)


def dropout_keys(twins: Twins, seed: int, rows: int, first_row: int = 0) -> dict[str, Any]:
    """Each backend's keys of the same seed and rows."""
    import jax
    import mlx.core as mx

    roots = jax.random.key(seed), mx.random.key(seed)
    return {
        backend.name: backend.module("models.dropout").row_keys(root, rows, first_row)
        for backend, root in zip(twins, roots, strict=True)
    }


def test_bfloat16_agrees_with_its_twin_to_a_few_roundings(twins: Twins, seed: int, tmp_path: Path) -> None:
    case = draw(seed, tmp_path / "base")
    import jax.numpy as jnp
    import mlx.core as mx

    dtypes = jnp.dtype(jnp.bfloat16), mx.bfloat16
    models = [
        b.module("loading").load_cross_encoder(tmp_path / "base", ModelConfig(), dtype=dtype).model
        for b, dtype in zip(twins, dtypes, strict=True)
    ]
    randomise(twins, models, seed)
    results = [
        b.results(m, lambda *x, b=b: pair_outputs(b, *x), seed, case.input_ids, case.sides)
        for b, m in zip(twins, models, strict=True)
    ]
    compare("cross-encoder in bfloat16", "jax with mlx", *results, BFLOAT16_TOLERANCE)


def test_dropout_masks_are_the_same_bits(twins: Twins, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=(5, 30, 7)).astype(np.float32)
    keys = dropout_keys(twins, seed, 5, first_row=seed % 1000)
    dropped = [
        np.array(b.module("models.dropout").dropout(b.array(values), 0.3, keys[b.name], seed % 7))
        for b in twins
    ]
    assert (dropped[0] == dropped[1]).all() and 0.2 < (dropped[0] == 0).mean() < 0.4


def test_the_cross_encoder_agrees_with_its_twin_under_dropout(
    twins: Twins, seed: int, tmp_path: Path
) -> None:
    case = draw(seed, tmp_path / "base")
    models = cross_encoders(twins, tmp_path / "base", complex_width=4, dropout=(0.2, 0.3))
    randomise(twins, models, seed)
    keys = dropout_keys(twins, seed, len(case.input_ids))
    compare_cross_encoders("cross-encoder under dropout", twins, models, case, seed, keys)


def test_more_tokens_than_positions_are_refused(backend: Backend, tmp_path: Path) -> None:
    model = backend.module("loading").load_bi_encoder(write_base(tmp_path / "base"))
    ids, mask = backend.array(np.zeros((1, 65), np.int32)), backend.array(np.ones((1, 65), bool))
    with pytest.raises(UserError, match="padded to 65 tokens, but this model has positions for 64: lower"):
        model(ids, mask)


def test_a_token_beyond_the_vocabulary_is_nan_and_not_another_row(twins: Twins, tmp_path: Path) -> None:
    models = cross_encoders(twins, write_base(tmp_path / "base"))
    sides = np.array([[1, 1, 2, 0]] * 2, np.int32)
    ids = np.array([[5, 6, 7, 0], [5, 6, len(VOCABULARY), 0]], np.int32)
    for backend, model in zip(twins, models, strict=True):
        (score,) = backend.values(lambda *x, m=model: [m(*x).score])(ids, sides)
        assert np.isfinite(score[0]) and np.isnan(score[1])
