"""Indra, Infinito, its controls and its memory: both backends against each other, and what memory must do.

Random weights and inputs; every output, the memory afterwards, and the gradient by every parameter.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.language.architectures import IndraConfig, InfinitoConfig, LanguageModelConfig, parameter_count
from common.language.inspection import inspect_model
from tests.languages import random_tokens, randomise
from tests.parity.backends import MODEL_TOLERANCE, Backend, check
from tests.parity.test_models import Twins, compare, dropout_keys

SIZES = {
    "vocab_size": 19,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "context": 11,
}
MEMORY = InfinitoConfig(**SIZES, memory_slots=9, memory_writes=4, memory_decay=0.8, exploration=0.3)
MODELS: dict[str, LanguageModelConfig] = {
    "Indra, polar": IndraConfig(**SIZES, complex_width=5),
    "Indra, cartesian": IndraConfig(**SIZES, complex_width=12, projector="cartesian"),
    "Indra, no projector": IndraConfig(**SIZES, projector="none", tie_word_embeddings=False),
    "Infinito": MEMORY,
    "Infinito, no memory": dataclasses.replace(MEMORY, memory_slots=0),
    "Infinito, untied": dataclasses.replace(MEMORY, tie_word_embeddings=False, memory_layer=0),
    "control transformer": dataclasses.replace(MEMORY, architecture="transformer"),
    "control LSTM": dataclasses.replace(MEMORY, architecture="lstm", lstm_layers=2),
}
# The others share their code with these.
SLOW = ("Indra, cartesian", "Indra, no projector", "Infinito, no memory", "Infinito, untied")
every_model = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MODELS]
)
RATES = {"embedding_dropout": 0.1, "word_dropout": 0.2, "hidden_dropout": 0.3, "attention_dropout": 0.2}


def build(backend: Backend, config: LanguageModelConfig, seed: int = 0) -> Any:
    return backend.module("language").build_language_model(config, seed=seed % 2**31)


def leaves(tree: Any) -> list[Any]:
    """The arrays of nested tuples."""
    if tree is None:
        return []
    return [leaf for part in tree for leaf in leaves(part)] if isinstance(tree, tuple) else [tree]


def outputs(model: Any, *inputs: Any, **options: Any) -> list[Any]:
    """All that three segments say, read one after the other, and the memory after them."""
    memory, found = None, []
    for ids, segments in zip(inputs[::2], inputs[1::2], strict=True):
        out = model(ids, segments, memory=memory, **options)
        memory = out.memory
        found += [out.logits, *leaves(out.state), *leaves(out.read)]
    return [*found, *leaves(memory)]


def three_segments(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [part for _ in range(3) for part in random_tokens(rng, SIZES["vocab_size"], tokens=11)]


def on_the_edge(backend: Backend, model: Any, run: Any, *inputs: np.ndarray) -> bool:
    """Whether rounding may decide which positions a memory keeps: parameters that differ by 1e-4 decide
    otherwise. Such inputs are drawn anew (DESIGN section 5)."""
    weights, rng = backend.parameters(model), np.random.default_rng(0)
    before = backend.values(lambda *x: run(model, *x))(*inputs)
    jumps = []
    for _ in range(3):
        near = {key: x * (1 + 1e-4 * rng.normal(size=x.shape)) for key, x in weights.items()}
        backend.set_parameters(model, near)
        after = backend.values(lambda *x: run(model, *x))(*inputs)
        jumps += [np.abs(a - b).max() for a, b in zip(before, after, strict=True)]
    backend.set_parameters(model, weights)
    return max(jumps) > 0.05


@every_model
@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_model_agrees_with_its_twin_over_three_segments(
    twins: Twins, name: str, training: bool, seed: int
) -> None:
    config = dataclasses.replace(MODELS[name], **RATES) if training else MODELS[name]

    def of(backend: Backend) -> Any:
        return lambda *x: outputs(*x, keys=keys[backend.name] if training else None)

    for drawn in range(seed, seed + 20):
        models = [build(backend, config, drawn) for backend in twins]
        randomise(twins, models, drawn)
        keys, segments = dropout_keys(twins, drawn, 3), three_segments(drawn)
        if not on_the_edge(twins[0], models[0], of(twins[0]), *segments):
            break
        print(f"drawn anew: {drawn}")
    results = [b.results(m, of(b), seed, *segments) for b, m in zip(twins, models, strict=True)]
    compare(name, "jax with mlx", *results)
    assert sum(x.size for x in results[0][1].values()) == parameter_count(config)
    assert not [key for key, gradient in results[0][1].items() if not gradient.any()]


@pytest.mark.parametrize("name", ["Indra, polar", "Infinito", "control LSTM"])
def test_attention_is_returned_when_asked_and_by_no_other_call(twins: Twins, name: str, seed: int) -> None:
    models = [build(backend, MODELS[name], seed) for backend in twins]
    randomise(twins, models, seed)
    ids = random_tokens(np.random.default_rng(seed), SIZES["vocab_size"])[0]
    found = []
    for backend, model in zip(twins, models, strict=True):
        assert model(backend.array(ids)).attention == ()
        found.append(backend.module("language_scoring").ModelScorer(model).attention(ids))
    layers = 0 if name == "control LSTM" else SIZES["num_hidden_layers"]
    assert len(found[0]) == len(found[1]) == layers
    for one, other in zip(*found, strict=True):
        assert one.shape == (3, 2, 11, 11) and np.allclose(one.sum(-1), 1, atol=1e-5)
        check("attention weights of language models", "jax with mlx", one, other, MODEL_TOLERANCE)


def test_a_look_into_a_model_follows_its_memory_through_a_text(backend: Backend, seed: int) -> None:
    class Numbers:
        """A tokenizer of which only the way back is asked."""

        end = 0

        def decode(self, ids: list[int], *, special: bool) -> str:
            return str(ids[0])

    model = build(backend, MEMORY, seed)
    randomise([backend], [model], seed)
    ids = 1 + np.arange(30, dtype=np.int32) % 18  # no segment begins as another: their states would be equal
    scorer: Any = backend.module("language_scoring").ModelScorer(model)
    found = inspect_model(scorer, Numbers(), ids)  # type: ignore[arg-type]
    assert found["attention"]["tokens"] == ["0", *map(str, range(1, 11))]
    memory = {name: np.asarray(values) for name, values in found["memory"].items()}
    assert {name: values.shape for name, values in memory.items()} == {
        "importance": (9, 3),
        "age": (9, 3),
        "read": (10, 3),
        "replaced": (3,),
    }
    assert np.allclose(memory["read"].sum(0), 1, atol=2e-3) and memory["read"][-1, 0] == 1.0  # empty at first
    assert memory["replaced"].tolist() == [4, 4, 4] and (memory["importance"] > 0).sum(0).tolist() == [
        4,
        8,
        9,
    ]
    assert memory["age"].max(0).tolist() == [0, 1, 2]


@every_model
def test_a_later_segment_or_token_changes_no_earlier_logit(backend: Backend, name: str, seed: int) -> None:
    model = build(backend, MODELS[name], seed)
    randomise([backend], [model], seed)
    read = backend.values(lambda *x: [out for out in outputs(model, *x) if out.shape[-1] == 19])
    segments = three_segments(seed)
    before = read(*segments)
    segments[4] = (segments[4] + 1) % SIZES["vocab_size"]  # the third segment
    after = read(*segments)
    assert all((one == other).all() for one, other in zip(before[:2], after[:2], strict=True))
    assert (before[2] != after[2]).any()
    segments[2][0, 6:] = (segments[2][0, 6:] + 1) % SIZES["vocab_size"]  # the second one, from token 6 on
    changed = read(*segments)
    assert (changed[0] == after[0]).all() and np.abs(changed[1][:, :6] - after[1][:, :6]).max() < 1e-5
    assert (changed[1][0, 6:] != after[1][0, 6:]).any()


def test_a_segment_reads_what_earlier_ones_wrote(backend: Backend, seed: int) -> None:
    model = build(backend, MEMORY, seed)
    randomise([backend], [model], seed)
    read = backend.values(lambda *x: [model(x[2], memory=model(x[0]).memory).logits, model(x[2]).logits])
    with_memory, without = read(*three_segments(seed))
    assert np.abs(with_memory - without).max() > 1e-4


def test_a_fresh_model_begins_as_if_it_had_no_memory(backend: Backend, seed: int) -> None:
    model = build(backend, MEMORY, seed)
    ids = three_segments(seed)[0]
    first, again = backend.values(lambda x: [model(x).logits, model(x, memory=model(x).memory).logits])(ids)
    assert (first == again).all()  # the output gate is closed


def test_the_most_important_positions_replace_the_least_important_slots(backend: Backend, seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = build(backend, MEMORY, seed)
    randomise([backend], [model], seed, spread=1.0)
    states = rng.normal(size=(2, 6, 12)).astype(np.float32)
    slots = rng.normal(size=(2, 9, 12)).astype(np.float32)
    importance = rng.permutation(np.linspace(0.1, 0.9, 18)).reshape(2, 9).astype(np.float32)
    importance[0, 3] = 0.0  # an empty slot
    age = rng.integers(0, 4, (2, 9)).astype(np.float32)
    real = np.ones((2, 6), bool)
    real[0, 2:] = False  # two positions for four places
    memory_class = backend.module("models.memory").Memory

    def write(slots: Any, importance: Any, age: Any, states: Any, real: Any) -> Any:
        wanted = model.memory.importance(states)[..., 0]
        return [*model.memory.write(memory_class(slots, importance, age), states, real), wanted]

    new_slots, new_importance, new_age, wanted = backend.values(write)(slots, importance, age, states, real)
    wanted = np.where(real, 1 / (1 + np.exp(-wanted)), -1)
    for row, writes in ((0, 2), (1, 4)):
        sources = np.argsort(-wanted[row])[:writes]
        places = np.argsort(importance[row], kind="stable")[:writes]
        expected = slots[row].copy()
        expected[places] = states[row, sources]
        kept = np.setdiff1d(np.arange(9), places)
        assert np.abs(new_slots[row] - expected).max() < 1e-6
        assert np.abs(new_importance[row, places] - wanted[row, sources]).max() < 1e-5
        assert np.abs(new_importance[row, kept] - 0.8 * importance[row, kept]).max() < 1e-6
        assert (new_age[row, places] == 0).all() and (new_age[row, kept] == age[row, kept] + 1).all()


def test_a_row_of_padding_leaves_its_memory_alone(backend: Backend, seed: int) -> None:
    model = build(backend, MEMORY, seed)
    ids, segments = three_segments(seed)[:2]
    segments[1] = 0
    found = backend.values(lambda x, s: [*model(x).memory, *model(x, s, memory=model(x).memory).memory])(
        ids, segments
    )
    assert all((one[1] == other[1]).all() for one, other in zip(found[:3], found[3:], strict=True))
    assert (found[0][0] != found[3][0]).any()


def test_empty_slots_are_never_read_and_the_null_slot_is(backend: Backend, seed: int) -> None:
    model = build(backend, MEMORY, seed)
    (read,) = backend.values(lambda x: [model(x).read])(three_segments(seed)[0])
    assert (read[:, :-1] == 0).all() and np.abs(read[:, -1] - 1).max() < 1e-6


def test_exploration_is_noise_on_the_memory_queries_alone(twins: Twins, seed: int) -> None:
    models = [build(backend, MEMORY, seed) for backend in twins]
    randomise(twins, models, seed)
    keys, ids = dropout_keys(twins, seed, 3), three_segments(seed)[0]
    noisy = []
    for backend, model in zip(twins, models, strict=True):

        def read(x: Any, model: Any = model, key: Any = keys[backend.name]) -> Any:
            memory = model(x).memory
            return [model(x, memory=memory, explore=k).read for k in (key, None)]

        with_noise, without = backend.values(read)(ids)
        assert 1e-4 < np.abs(with_noise - without).max() < 0.5
        noisy.append(with_noise)
    check("exploration", "jax with mlx", *noisy, MODEL_TOLERANCE)


def test_noise_is_standard_normal_and_the_same_in_both(twins: Twins, seed: int) -> None:
    keys = dropout_keys(twins, seed, 4)
    noise = [np.array(b.module("models.dropout").gaussian((4, 50, 100), keys[b.name], 2)) for b in twins]
    check("noise", "jax with mlx", *noise, 1e-5)
    rows = noise[0].reshape(4, -1)
    assert np.abs(rows.mean(1)).max() < 0.1 and np.abs(rows.std(1) - 1).max() < 0.1
    assert np.abs(np.corrcoef(rows) - np.eye(4)).max() < 0.1


@every_model
def test_decoding_step_by_step_equals_a_segment_at_once(backend: Backend, name: str, seed: int) -> None:
    model = build(backend, MODELS[name], seed)
    randomise([backend], [model], seed)
    ids, _ = random_tokens(np.random.default_rng(seed), SIZES["vocab_size"], tokens=11)
    segments = np.ones_like(ids)
    lengths = np.array([5, 11, 8])
    segments[np.arange(11) >= lengths[:, None]] = 0

    def both(ids: Any, segments: Any) -> Any:
        memory = model(ids).memory
        whole = model(ids, segments, memory=memory)
        cache, stepped, carried = model.recall(memory, model.empty_cache(3, 11)), [], memory
        for part in (slice(0, 4), slice(4, 5), slice(5, 8), slice(8, 11)):
            out = model(ids[:, part], segments[:, part], memory=carried, cache=cache)
            cache, carried = out.cache, out.memory
            stepped.append(out.logits)
        after = carried if cache is None else model.remember(carried, cache)
        return [whole.logits, *stepped, *leaves(whole.memory), *leaves(after)]

    whole, *rest = backend.values(both)(ids, segments)
    stepped, states = np.concatenate(rest[:4], axis=1), rest[4:]
    for row, length in enumerate(lengths):
        check(
            f"{name}, step by step",
            f"{backend.name} with a segment at once",
            stepped[row, :length],
            whole[row, :length],
            MODEL_TOLERANCE,
        )
    for one, other in zip(states[: len(states) // 2], states[len(states) // 2 :], strict=True):
        check(f"{name}, memory", f"{backend.name} with a segment at once", other, one, MODEL_TOLERANCE)


@pytest.mark.parametrize("name", ["Indra, polar", "Infinito"])
def test_what_one_backend_writes_both_read_back(twins: Twins, name: str, seed: int, tmp_path: Path) -> None:
    segments = three_segments(seed)[:2]
    models = [build(backend, MODELS[name], seed) for backend in twins]
    randomise(twins, models, seed)
    for backend, model in zip(twins, models, strict=True):
        folder = tmp_path / backend.name
        backend.module("language").save_language_model(
            folder,
            model,
            MODELS[name],
            training={},
            tokenizer_save=lambda place: None,
            card="",
            extra={"eos_token_id": 3},
        )
        expected = backend.values(lambda *x, m=model: [m(*x).logits])(*segments)[0]
        for other in twins:
            read, config = other.module("language").load_language_model(folder)
            assert config == MODELS[name]
            found = other.values(lambda *x, m=read: [m(*x).logits])(*segments)[0]
            check(f"{name}, written", f"{other.name} with {backend.name}", found, expected, MODEL_TOLERANCE)
