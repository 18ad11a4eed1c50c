"""Our encoder is transformers' encoder, for the same weights."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.checkpoint import read_config, read_tensors
from common.config import ModelConfig
from common.errors import UserError
from common.hub import resolve_model
from jax_impl.loading import load_cross_encoder
from jax_impl.models.bert import BertConfig
from tests.tiny import VOCABULARY, write_base

TOLERANCE = 1e-4  # float32


def difference_from_torch(directory: Path, rows: int, length: int, seed: int) -> float:
    """Largest difference of a hidden state at a real token, for random ids, lengths and segments."""
    torch = pytest.importorskip("torch", reason="the oracle needs torch: install the extra `peers`")
    from transformers import BertModel

    rng = np.random.default_rng(seed)
    vocabulary = read_config(directory)["vocab_size"]
    ids = rng.integers(0, vocabulary, (rows, length))
    lengths = np.append(rng.integers(1, length + 1, rows - 1), length)
    mask = np.arange(length) < lengths[:, None]
    segments = (np.arange(length) >= rng.integers(0, length, (rows, 1))).astype(np.int64)

    graphdef, state = nnx.split(load_cross_encoder(directory, ModelConfig()).model.bert)
    ours = jax.jit(lambda *inputs: nnx.merge(graphdef, state)(*inputs))(
        jnp.asarray(ids), jnp.asarray(mask), jnp.asarray(segments)
    )
    theirs = BertModel.from_pretrained(directory).eval()
    with torch.no_grad():
        expected = theirs(*(torch.tensor(x) for x in (ids, mask.astype(np.int64), segments)))[0].numpy()
    return float(np.abs(np.asarray(ours) - expected)[mask].max())


@pytest.mark.parametrize("case", range(4))
def test_random_configurations_agree_with_transformers(seed: int, case: int, tmp_path: Path) -> None:
    rng = np.random.default_rng((seed, case))
    heads, per_head = int(rng.integers(1, 5)), int(rng.integers(2, 13))
    settings = {
        "hidden_size": heads * per_head,
        "num_attention_heads": heads,
        "num_hidden_layers": int(rng.integers(1, 4)),
        "intermediate_size": int(rng.integers(8, 80)),
        "type_vocab_size": 2,
        "layer_norm_eps": float(10 ** rng.uniform(-12, -3)),
        "hidden_act": ["gelu", "gelu_new", "relu", "gelu_pytorch_tanh"][case],
    }
    print(settings)
    base = write_base(tmp_path / "base", seed=seed, **settings)
    length = int(rng.integers(2, 64))
    assert difference_from_torch(base, rows=int(rng.integers(2, 6)), length=length, seed=seed) <= TOLERANCE


def test_the_packaged_minilm_agrees_with_transformers(seed: int) -> None:
    assert difference_from_torch(resolve_model("default"), rows=3, length=48, seed=seed) <= TOLERANCE


def test_padding_tokens_change_nothing(seed: int, tmp_path: Path) -> None:
    model = load_cross_encoder(write_base(tmp_path / "base", seed=seed), ModelConfig()).model.bert
    ids = np.random.default_rng(seed).integers(5, len(VOCABULARY), (2, 20))
    mask = np.arange(20) < np.asarray([[7], [20]])
    other = np.where(mask, ids, 0)
    graphdef, state = nnx.split(model)
    call = jax.jit(lambda *inputs: nnx.merge(graphdef, state)(*inputs))
    a, b = (call(jnp.asarray(x), jnp.asarray(mask)) for x in (ids, other))
    assert float(jnp.max(jnp.abs(a - b)[mask])) == 0
    alone = call(jnp.asarray(ids[:1, :7]), jnp.ones((1, 7), bool))
    assert float(jnp.max(jnp.abs(a[0, :7] - alone[0]))) <= 1e-5


def test_more_tokens_than_positions_are_refused(tmp_path: Path) -> None:
    model = load_cross_encoder(write_base(tmp_path / "base"), ModelConfig()).model.bert
    with pytest.raises(UserError, match=r"padded to 65 tokens, but this model has positions for 64: lower"):
        model(jnp.zeros((1, 65), int), jnp.ones((1, 65), bool))


def test_an_activation_we_do_not_have_is_refused_by_name(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", hidden_act="swish9")
    with pytest.raises(UserError, match=r"config\.json: hidden_act is 'swish9'; allowed: gelu"):
        load_cross_encoder(base, ModelConfig())


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="hidden_size 30 is not a multiple of 4 heads"):
        BertConfig.from_dict({"hidden_size": 30, "num_attention_heads": 4})


def test_the_fixture_holds_exactly_transformers_tensors(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the oracle needs torch: install the extra `peers`")
    from transformers import BertForSequenceClassification

    base = write_base(tmp_path / "base", head=True)
    theirs = BertForSequenceClassification.from_pretrained(base).state_dict()
    names = {name for name in theirs if not name.endswith(("position_ids", "token_type_ids"))}
    assert names == read_tensors(base).keys()
