"""Ten steps of training in both backends, on the same batches from the same parameters: one trajectory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from common.config import ModelConfig, RerankerConfig, TrainConfig
from common.reference.cases import float32_exact, parity_error
from common.reranker.schedule import phase_at
from tests.parity.backends import (
    LOSS_TOLERANCE,
    MODEL_TOLERANCE,
    Backend,
    Jax,
    Mlx,
    backend_of,
    check,
    check_all,
)
from tests.tiny import VOCABULARY, World

Twins = tuple[Jax, Mlx]
STEPS, B, L, S = 10, 4, 3, 12
# Their gradient is analytically 0 (softmax does not see what all its logits share), so Adam makes full steps
# of its rounding errors: compared through the outputs.
WITHOUT_GRADIENT = ("attention.self.key.bias", "classifier.bias")
RECIPES: dict[str, dict[str, Any]] = {
    "resonance": {"quantum": {"mode": "resonance", "entanglement_weight": 0.2, "alignment_weight": 1.0}},
    "entanglement in two parts": {"quantum": {"mode": "entanglement"}, "train": {"micro_batches": 2}},
    "bce": {"train": {"objective": "bce", "schedule": "cosine"}},
    "lambda": {"train": {"objective": "lambda", "schedule": "constant"}},
    "margin_mse": {"train": {"objective": "margin_mse", "max_grad_norm": 0.3}},
    "retraining": {
        "quantum": {"mode": "adaptation"},
        "retrain": {"preserve_knowledge": 0.5, "resonance_alignment": 0.3},
    },
}


def recipe(world: World, name: str, **train: Any) -> RerankerConfig:
    changes = RECIPES[name]
    config = world.config(
        batch_size=B, learning_rate=1e-4, weight_decay=0.01, **(changes.get("train", {}) | train)
    )
    config = replace(config, quantum=replace(config.quantum, **changes.get("quantum", {})))
    return replace(config, retrain=replace(config.retrain, **changes.get("retrain", {}))).validate()


def random_batch(rng: np.random.Generator, width: int) -> list[np.ndarray]:
    """The fields of a Batch: four lists of three, one with padding, one without a positive."""
    position, split = np.arange(S), rng.integers(2, 5, (B, L, 1))
    lengths = rng.integers(split + 1, S + 1)
    sides = np.where(position < lengths, np.where(position < split, 1, 2), 0).astype(np.int8)
    ids = np.where(sides > 0, rng.integers(5, len(VOCABULARY), (B, L, S)), 0).astype(np.int32)
    mask = np.ones((B, L), bool)
    mask[2, 2] = False
    labels = np.array([[1, 0, 0], [0, 0, 0], [2, 0, 0], [1, 1, 0]], np.float32)
    related = np.zeros((B, B), np.float32)
    related[0, 1] = related[0, 3] = related[2, 3] = 0.8
    vectors = rng.normal(size=(B, 1 + L, width))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    teacher = np.where(rng.random((B, L)) < 0.8, rng.normal(size=(B, L)), np.nan)
    original = np.where(rng.random((B, L)) < 0.8, rng.normal(size=(B, L)), np.nan)
    states = rng.normal(size=(2, B, L, 2, width))
    states /= np.linalg.norm(states, axis=(-2, -1), keepdims=True)
    return [
        ids,
        sides,
        labels,
        mask,
        related + related.T,
        np.array([0, 1, 2, 3], np.int32),
        vectors[:, 0].astype(np.float32),
        vectors[:, 1:].astype(np.float32),
        teacher.astype(np.float32),
        original.astype(np.float32),
        *states.astype(np.float32),
    ]


def moment(step: int) -> tuple[float, float, float]:
    phase = phase_at(step / STEPS, "collapse")
    return phase.temperature, phase.entropy_bonus, phase.ramp


class Run:
    """A model of a backend that makes one step after the other."""

    def __init__(self, backend: Backend, world: World, config: RerankerConfig) -> None:
        rates = config.train.hidden_dropout, config.train.attention_dropout
        loaded = backend.module("loading").load_cross_encoder(world.base, ModelConfig(), dropout=rates)
        self.backend, self.config, self.model = backend, config, loaded.model
        self.module = backend.module("training.step")

    def start(self, seed: int) -> None:
        optimizer = self.backend.module("training.optimizer").make_optimizer(self.config.train, STEPS)
        self._start(optimizer, seed if self.config.train.hidden_dropout else None)

    def _start(self, optimizer: Any, seed: int | None) -> None:
        raise NotImplementedError

    def step(self, fields: list[np.ndarray], now: tuple[float, float, float]) -> dict[str, float]:
        logged = self._step(self.module.Batch(*map(self.backend.array, fields)), self.module.Moment(*now))
        return {name: float(value) for name, value in logged.items()}

    def _step(self, batch: Any, now: Any) -> dict[str, Any]:
        raise NotImplementedError

    def outputs(self, fields: list[np.ndarray]) -> list[np.ndarray]:
        """Score and r of a batch's pairs, and the portable score without the bias that nothing sees."""
        ids, sides = (x.reshape(-1, S) for x in fields[:2])
        score, portable, r = self.backend.values(lambda *x: list(self.model(*x)[:3]))(ids, sides)
        return [score, portable - self.backend.parameters(self.model)["classifier.bias"], r]


class JaxRun(Run):
    def _start(self, optimizer: Any, seed: int | None) -> None:
        import jax
        import jax.numpy as jnp
        from flax import nnx

        learns = self.backend.module("training.loop")._learns(self.config)
        graphdef, learned, fixed = nnx.split(self.model, learns, ...)
        learned, fixed = jax.tree.map(jnp.copy, (learned, fixed))  # a step donates its state
        key = None if seed is None else jax.random.key(seed)
        self._compiled = self.module.make_step(self.config, graphdef, optimizer, key)
        self._state = self.module.TrainState(
            learned, fixed, optimizer.init(learned), jnp.zeros((), jnp.int32)
        )

    def _step(self, batch: Any, now: Any) -> dict[str, Any]:
        from flax import nnx

        self._state, logged = self._compiled(self._state, batch, now)
        nnx.update(self.model, nnx.merge_state(self._state.learned, self._state.fixed))
        return logged


class MlxRun(Run):
    def _start(self, optimizer: Any, seed: int | None) -> None:
        import mlx.core as mx

        loop = self.backend.module("training.loop")
        self.backend.module("models.lora").freeze(self.model, loop._learns(self.config))
        key = None if seed is None else mx.random.key(seed)
        self._compiled = self.module.make_step(
            self.config, self.module.TrainState(self.model, optimizer), key
        )

    def _step(self, batch: Any, now: Any) -> dict[str, Any]:
        return self._compiled(batch, now)


@pytest.fixture
def runs() -> Any:
    """Runs of a recipe in both backends, from the same parameters of which none is where it began."""
    twins = backend_of("jax"), backend_of("mlx")

    def start(world: World, config: RerankerConfig, seed: int) -> list[Run]:
        made = [kind(backend, world, config) for kind, backend in zip((JaxRun, MlxRun), twins, strict=True)]
        rng = np.random.default_rng(seed)
        begin = sorted(made[0].backend.parameters(made[0].model).items())
        moved = {name: float32_exact(x + rng.normal(0, 0.1, x.shape)) for name, x in begin}
        for run in made:
            run.backend.set_parameters(run.model, moved)
            run.start(seed)
        return made

    return start


def compare_trajectories(what: str, made: list[Run], rng: np.random.Generator) -> None:
    before = made[0].backend.parameters(made[0].model)
    for step in range(STEPS):
        fields, now = random_batch(rng, 32), moment(step)
        logged = [run.step(fields, now) for run in made]
        assert logged[0].keys() == logged[1].keys()
        values = [np.array([log[name] for name in logged[0]]) for log in logged]
        check(
            f"{what}, terms of step {step}", "jax with mlx", *values, MODEL_TOLERANCE
        )  # through the encoder
    after = [
        {
            name: x
            for name, x in run.backend.parameters(run.model).items()
            if not name.endswith(WITHOUT_GRADIENT)
        }
        for run in made
    ]
    check_all(f"{what}, parameters", "jax with mlx", *after, LOSS_TOLERANCE)
    fields = random_batch(rng, 32)
    for number, values in enumerate(zip(*(run.outputs(fields) for run in made), strict=True)):
        check(f"{what}, output {number} after", "jax with mlx", *values, LOSS_TOLERANCE)
    moved = {name: parity_error(x, before[name]) for name, x in after[0].items()}
    assert sum(change > 1e-4 for change in moved.values()) > len(moved) / 2


SLOW = [name for name in RECIPES if name not in ("resonance", "entanglement in two parts", "retraining")]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in RECIPES]
)
def test_ten_steps_end_in_the_same_parameters_and_outputs(
    world: World, runs: Any, name: str, seed: int
) -> None:
    made = runs(world, recipe(world, name), seed)
    compare_trajectories(f"ten AdamW steps of {name}", made, np.random.default_rng(seed))


@pytest.mark.slow
def test_ten_steps_under_dropout_are_the_same_too(world: World, runs: Any, seed: int) -> None:
    config = recipe(world, "resonance", hidden_dropout=0.1, attention_dropout=0.1)
    made = runs(world, config, seed)
    compare_trajectories("ten AdamW steps under dropout", made, np.random.default_rng(seed))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(10, 0.2), (5, 0.0), (1, 0.9)])
def test_rates_are_the_same_at_every_step(twins: Twins, schedule: Any, steps: int, warmup: float) -> None:
    config = TrainConfig(learning_rate=0.5, schedule=schedule, warmup=warmup)
    rates = []
    for backend in twins:
        rate = backend.module("training.optimizer").learning_rate(config, steps)
        rates.append([float(rate(step)) for step in range(steps + 2)])
    check(f"learning rates, {schedule}", "jax with mlx", *rates, 1e-6)
    assert max(rates[0]) == pytest.approx(0.5)


def test_the_same_parameters_decay_and_belong_to_the_portable_score(twins: Twins, world: World) -> None:
    chosen = []
    for backend in twins:
        model = backend.module("loading").load_cross_encoder(world.base, ModelConfig()).model
        backend.module("models.lora").add_lora(model.encoder, 2, 4.0, ("query",), rngs=backend.rngs(0))
        optimizer = backend.module("training.optimizer")
        trees = [choose(backend.tree(model)) for choose in (optimizer.decayed, optimizer.portable)]
        chosen.append([{key for key, value in backend.named(tree).items() if value} for tree in trees])
    assert chosen[0] == chosen[1]
    decayed, portable = chosen[0]
    assert "bert.encoder.layer.0.attention.self.query.lora_a" in decayed and "resonance.u" not in decayed
    assert portable == {
        f"{name}.{x}" for name in ("bert.pooler.dense", "classifier") for x in ("weight", "bias")
    }
