"""SFT's parts: the order of batches, what the loss is taken on, and mlx-lm's own trainer as the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="needs MLX and mlx-lm: install the extra `mlx`")

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner import trainer as peer
from mlx_lm.tuner.callbacks import TrainingCallback

from common.data.expansion import load_expansions
from common.data.language import batch_order
from common.expansion.config import LoraConfig
from common.expansion.prompts import ExpansionPrompts, load_tokenizer
from mlx_impl.models.qwen import Origin, add_lora, load_base, without_adapter
from mlx_impl.training.adapters import make_update
from mlx_impl.training.sft import SftTrainer, TokenBatch, make_gradient, pack_rows
from tests.tiny_expansion import sft_config, write_expander, write_rows

STEPS = 20
RATE = 2e-3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    return write_expander(folder / "base", write_rows(folder / "rows"))


def adapted(base: Path, **lora: Any) -> Any:
    loaded = load_base(Origin(base))
    add_lora(loaded, LoraConfig(rank=4, alpha=8.0, **lora), seed=7)
    return loaded


@pytest.fixture
def trainer(base: Path, tmp_path: Path) -> SftTrainer:
    rows = base.parent / "rows"
    loaded = adapted(base)
    prompts = ExpansionPrompts(load_tokenizer(base), system="none")
    config = sft_config(rows, base, tmp_path / "run")
    return SftTrainer(config, loaded, prompts, load_expansions(str(rows)), say=lambda _: None)


def optimizer() -> optim.Optimizer:
    return optim.AdamW(RATE, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.0, bias_correction=True)


def test_twenty_losses_are_those_of_mlx_lms_trainer(base: Path, trainer: SftTrainer, tmp_path: Path) -> None:
    """The same start, batches and optimizer; no clipping there, so a limit that none reaches here."""
    batches = [trainer.batches(1 + step % trainer.steps)[0] for step in range(STEPS)]

    def iterate(**_: Any) -> Iterator[tuple[mx.array, mx.array]]:
        for batch in batches:
            mask = np.array(batch.mask)
            starts, ends = mask.argmax(axis=1), mask.shape[1] - mask[:, ::-1].argmax(axis=1)
            yield batch.ids, mx.array(np.stack([starts, ends - 1], axis=1))

    expected: list[float] = []

    class Losses(TrainingCallback):
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            expected.append(train_info["train_loss"])

    theirs = adapted(base).model
    arguments = peer.TrainingArgs(
        batch_size=4, iters=STEPS, steps_per_report=1, adapter_file=str(tmp_path / "adapters.safetensors")
    )
    peer.train(
        theirs, optimizer(), None, None, arguments, iterate_batches=iterate, training_callback=Losses()
    )
    ours = adapted(base).model
    ours.train()
    gradient, steps = make_gradient(ours), optimizer()
    steps.init(ours.trainable_parameters())
    update = make_update(ours, steps, 1e9)
    losses = []
    for batch in batches:
        loss, found = gradient(batch, mx.array(1.0 / int(batch.mask.sum())))
        update(found)
        losses.append(float(loss))
    np.testing.assert_allclose(losses, expected, atol=1e-4)
    assert losses[-1] < losses[0] - 0.3


def test_accumulated_batches_weigh_by_their_tokens(base: Path, trainer: SftTrainer) -> None:
    """Two batches of unlike lengths have the gradient of one batch that holds both."""
    pieces = trainer.batches(1)
    tokens = sum(int(piece.mask.sum()) for piece in pieces)
    scale = mx.array(1.0 / tokens)
    model = adapted(base).model
    gradient = make_gradient(model)
    parts = [gradient(piece, scale)[1] for piece in pieces]
    length = max(piece.ids.shape[1] for piece in pieces)

    def widened(x: mx.array) -> mx.array:
        return mx.pad(x, ((0, 0), (0, length - x.shape[1])))

    columns = [[piece.ids for piece in pieces], [piece.mask for piece in pieces]]
    whole = TokenBatch(*(mx.concatenate([widened(x) for x in xs]) for xs in columns))
    expected = gradient(whole, scale)[1]["model"]["layers"][0]["self_attn"]["q_proj"]["lora_b"]
    found = [part["model"]["layers"][0]["self_attn"]["q_proj"]["lora_b"] for part in parts]
    np.testing.assert_allclose(np.array(found[0] + found[1]), np.array(expected), atol=1e-6)


def gradients(
    model: Any, batches: list[TokenBatch], scale: mx.array, checkpoint: bool = False
) -> tuple[float, dict[str, np.ndarray]]:
    gradient = make_gradient(model, checkpoint)
    found = [gradient(batch, scale) for batch in batches]
    total = found[0][1]
    for _, more in found[1:]:
        total = tree_map(mx.add, total, more)
    return sum(float(loss) for loss, _ in found), {k: np.array(v) for k, v in tree_flatten(total)}


@pytest.mark.parametrize("checkpoint", [False, True])
def test_packed_rows_have_the_loss_and_gradient_of_single_ones(
    base: Path, trainer: SftTrainer, checkpoint: bool
) -> None:
    rows = base.parent / "rows"
    config = sft_config(rows, base, base, packing=True)
    packed = SftTrainer(
        config, adapted(base), trainer.prompts, load_expansions(str(rows)), say=lambda _: None
    )
    assert packed.per_epoch == 1 and max(map(len, packed.packs or [])) > 4
    whole = [batch for step in range(1, trainer.per_epoch + 1) for batch in trainer.batches(step)]
    scale = mx.array(0.01)
    expected, theirs = gradients(adapted(base).model, whole, scale)
    found, ours = gradients(adapted(base).model, packed.batches(1), scale, checkpoint)
    assert sum(int(b.mask.sum()) for b in packed.batches(1)) == sum(int(b.mask.sum()) for b in whole)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, atol=1e-5, err_msg=name)
    together = [batch._replace(rows=None) for batch in packed.batches(1)]  # rows that see each other
    assert abs(gradients(adapted(base).model, together, scale)[0] - expected) > 1e-3


def test_packs_hold_every_row_once_in_both_forms(seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = [(int(a), int(a + b)) for a, b in random.integers(1, 200, (300, 2))]
    lengths = [pair if random.random() < 0.5 else pair[::-1] for pair in lengths]
    packs = pack_rows(lengths, 512, 1)
    assert sorted(row for pack in packs for row in pack) == list(range(300))
    assert all(sum(lengths[row][form] for row in pack) <= 512 for pack in packs for form in (0, 1))
    assert packs == pack_rows(lengths, 512, 1) and len(packs) < 300 / 1.5


def test_checkpointing_changes_memory_and_not_the_gradient(base: Path, trainer: SftTrainer) -> None:
    batch, scale = trainer.batches(1)[0], mx.array(0.01)
    plain = make_gradient(adapted(base).model)(batch, scale)
    again = make_gradient(adapted(base).model, checkpoint=True)(batch, scale)
    np.testing.assert_allclose(float(again[0]), float(plain[0]), rtol=1e-6)
    ours, theirs = (x[1]["model"]["layers"][0]["mlp"]["up_proj"]["lora_b"] for x in (plain, again))
    np.testing.assert_allclose(np.array(ours), np.array(theirs), atol=1e-6)


def test_the_loss_is_taken_on_the_completion(trainer: SftTrainer) -> None:
    batch = trainer.batches(1)[0]
    tokenizer = trainer.prompts.tokenizer
    for ids, mask in zip(np.array(batch.ids), np.array(batch.mask), strict=True):
        learned = tokenizer.decode(ids[mask])
        assert learned.startswith("lex: ") and learned.endswith(" now\n<|im_end|>")
        assert "<think>" not in tokenizer.decode(ids)


@pytest.mark.parametrize("buckets", [True, False])
def test_every_row_stands_in_one_batch_of_an_epoch(buckets: bool) -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(10, 300, 203).tolist()
    order = batch_order(lengths, 8, 3, 0, buckets)
    assert sorted(row for rows in order for row in rows) == list(range(203))
    assert order == batch_order(lengths, 8, 3, 0, buckets) != batch_order(lengths, 8, 3, 1, buckets)
    padding = sum(len(rows) * max(lengths[i] for i in rows) for rows in order) / sum(lengths)
    assert (padding < 1.1) is buckets


def test_the_reference_is_the_model_below_its_newest_adapter(base: Path) -> None:
    loaded = adapted(base)
    ids = mx.array([[3, 4, 5, 6]])
    plain = np.array(load_base(Origin(base)).model(ids))
    for module in loaded.model.layers[0].self_attn.children().values():
        if hasattr(module, "lora_b"):
            module.lora_b = mx.ones_like(module.lora_b)
    changed = np.array(loaded.model(ids))
    with without_adapter(loaded.model):
        np.testing.assert_array_equal(np.array(loaded.model(ids)), plain)
    np.testing.assert_array_equal(np.array(loaded.model(ids)), changed)
    assert np.abs(changed - plain).max() > 0.1
