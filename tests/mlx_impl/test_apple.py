"""What only a Mac can run (`make test-apple`): Metal computes what MLX's CPU does; memory; the command."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="needs MLX: install the extra `mlx`")

import mlx.core as mx

from common import backends
from common.config import ModelConfig
from common.keymap import FAMILIES
from common.runs import read_metrics
from mlx_impl import train as mac
from mlx_impl.loading import load_cross_encoder
from mlx_impl.training.optimizer import make_optimizer
from mlx_impl.training.step import Batch, Moment, TrainState, make_step
from tests.families import write_checkpoint
from tests.parity.backends import Mlx, check, check_all
from tests.parity.test_models import pair_outputs
from tests.parity.test_training import random_batch
from tests.tiny import VOCABULARY, World, command, write_base

pytestmark = pytest.mark.apple
TOLERANCE = 1e-4


def on(device: Any, function: Any) -> Any:
    """`function()` on a device."""
    before = mx.default_device()
    mx.set_default_device(device)
    try:
        return function()
    finally:
        mx.set_default_device(before)


def test_mlx_on_metal_is_what_a_command_takes() -> None:
    assert backends._preferred() == "mlx" and mx.default_device().type == mx.gpu


@pytest.mark.parametrize("family", list(FAMILIES))
def test_metal_agrees_with_the_cpu(family: str, seed: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "base", family, "Model")
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 25, (5, 1))
    sides = np.where(np.arange(24) < lengths, np.where(np.arange(24) < 3, 1, 2), 0).astype(np.int32)
    ids = np.where(sides > 0, rng.integers(5, 30, (5, 24)), 0).astype(np.int32)
    model = load_cross_encoder(tmp_path / "base", ModelConfig()).model
    results = [
        on(device, lambda: Mlx().results(model, lambda *x: pair_outputs(Mlx(), *x), seed, ids, sides))
        for device in (mx.gpu, mx.cpu)
    ]
    for number, (ours, theirs) in enumerate(zip(results[0][0], results[1][0], strict=True)):
        check(f"{family} on Metal, output {number}", "mlx with its CPU", ours, theirs, TOLERANCE)
    check_all(f"{family} on Metal, gradient", "mlx with its CPU", results[0][1], results[1][1], TOLERANCE)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_recipe_trains_on_metal_as_on_the_cpu(world: World, tmp_path: Path, precision: str) -> None:
    config = world.config(max_steps=6, evaluations=1, learning_rate=1e-4, precision=precision)
    config = replace(config, data=replace(config.data, encoder=str(world.base)))
    command(config, tmp_path)
    words = ["rerank", "--config", str(tmp_path / "recipe.py"), "--no-evaluate-test", "--runs"]
    losses = []
    for device, name in ((mx.gpu, "gpu"), (mx.cpu, "cpu")):
        on(device, lambda name=name: mac.main([*words, str(tmp_path / name)]))
        lines = [line for line in read_metrics(tmp_path / name / "tiny") if line["kind"] == "train"]
        losses.append([line["loss"] for line in lines])
    check(f"{precision} on Metal, loss", "mlx with its CPU", *losses, 1e-3 if precision == "float32" else 0.1)


def step_memory(layers: int, width: int, heads: int, tokens: int) -> tuple[int, float]:
    """Peak bytes of a step of 24 pairs, and what docs/apple.md says."""
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "max_position_embeddings": tokens,
    }
    with tempfile.TemporaryDirectory() as folder:
        base = write_base(Path(folder) / "base", **sizes)
        model = load_cross_encoder(base, ModelConfig(), dropout=(0.1, 0.0)).model
        config = World(Path(folder)).config(batch_size=8, hidden_dropout=0.1)
    state = TrainState(model, make_optimizer(config.train, 10))
    step = make_step(config, state, mx.random.key(0))
    fields = dict(zip(Batch._fields, random_batch(np.random.default_rng(0), 0), strict=True))
    fields = {name: np.concatenate([x, x]) for name, x in fields.items()}
    shape = (8, 3, tokens)
    fields |= {
        "related": np.zeros((8, 8), np.float32),
        "input_ids": np.resize(np.arange(5, len(VOCABULARY), dtype=np.int32), shape),
        "sides": np.broadcast_to(np.where(np.arange(tokens) < 9, 1, 2), shape).astype(np.int8),
    }
    batch = Batch(*map(mx.array, fields.values()))
    step(batch, Moment(1.0, 0.0, 0.5))
    mx.reset_peak_memory()
    step(batch, Moment(1.0, 0.0, 0.5))
    parameters = sum(x.size for x in Mlx().parameters(model).values())
    activations = 24 * tokens * (layers * (17.4 * width + 3.6 * heads * tokens) + 42 * width)
    return mx.get_peak_memory(), 16 * parameters + 4 * activations


def test_a_step_of_minilm_needs_no_more_memory_than_the_documentation_says() -> None:
    measured, said = step_memory(layers=6, width=384, heads=12, tokens=128)
    print(f"{measured / 1e9:.2f} GB, said {said / 1e9:.2f}")
    assert measured < 1.1 * said
