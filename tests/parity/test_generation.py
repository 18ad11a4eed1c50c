"""Generated tokens: both backends against each other and against transformers' `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.language.generation import SamplingConfig, generate
from tests.languages import random_decoder, randomise, transformers_decoder, write_transformers
from tests.parity.backends import Backend
from tests.parity.test_language_models import MODELS, SIZES, build
from tests.parity.test_models import Twins


class Numbers:
    """A tokenizer that writes ids as numbers and ends at none."""

    end: int | None = None

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def tokens(backend: Backend, model: Any, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
    engine = backend.module("generation").ModelEngine(model)
    return [list(found.ids) for found in generate(engine, prompts, Numbers(), SamplingConfig(**settings))]


def random_prompts(rng: np.random.Generator, vocabulary: int, *lengths: int) -> list[list[int]]:
    return [rng.integers(0, vocabulary, length).tolist() for length in lengths]


@pytest.mark.parametrize(("family", "penalty"), [("llama", 1.0), ("qwen3", 1.3)])
def test_greedy_tokens_are_those_of_transformers(
    twins: Twins, family: str, penalty: float, seed: int, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch", reason="the oracle needs torch: install the extra `peers`")
    rng = np.random.default_rng(seed)
    settings = random_decoder(family, rng)
    oracle = transformers_decoder(family, settings, seed)
    write_transformers(tmp_path / "base", oracle)
    prompts = random_prompts(rng, settings["vocab_size"], 5, 1, 9)
    expected = []
    for prompt in prompts:
        ids = oracle.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=16,
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=None,
            pad_token_id=0,
        )
        expected.append(ids[0, len(prompt) :].tolist())
    for backend in twins:
        model, _ = backend.module("language").load_language_model(tmp_path / "base")
        found = tokens(backend, model, prompts, max_new_tokens=16, repetition_penalty=penalty)
        assert found == expected, backend.name


@pytest.mark.parametrize("name", ["Indra, polar", "Infinito", "control LSTM"])
def test_tokens_agree_with_the_twin_greedy_and_sampled(twins: Twins, name: str, seed: int) -> None:
    models = [build(backend, MODELS[name], seed) for backend in twins]
    randomise(twins, models, seed, spread=0.5)
    prompts = random_prompts(np.random.default_rng(seed), SIZES["vocab_size"], 3, 8)
    for settings in (
        {"max_new_tokens": 20},
        {"max_new_tokens": 20, "temperature": 0.8, "top_p": 0.9, "seed": seed % 1000, "explore": True},
    ):
        first, second = (
            tokens(backend, model, prompts, **settings) for backend, model in zip(twins, models, strict=True)
        )
        assert first == second, settings
        assert [len(row) for row in first] == ([9, 4] if name == "Indra, polar" else [20, 20])


def test_a_row_of_a_batch_is_what_it_is_alone_over_segments(backend: Backend, seed: int) -> None:
    model = build(backend, MODELS["Infinito"], seed)
    randomise([backend], [model], seed, spread=0.5)
    prompts = random_prompts(np.random.default_rng(seed), SIZES["vocab_size"], 25, 3, 11)  # of segments of 11
    together = tokens(backend, model, prompts, max_new_tokens=15)
    alone = [tokens(backend, model, [prompt], max_new_tokens=15)[0] for prompt in prompts]
    assert together == alone


def test_segments_of_a_text_are_read_as_in_training(backend: Backend, seed: int) -> None:
    model = build(backend, MODELS["Infinito"], seed)
    randomise([backend], [model], seed, spread=0.5)
    text = random_prompts(np.random.default_rng(seed), SIZES["vocab_size"], 25)[0]

    def last(x: Any) -> list[Any]:
        memory = model(x[:, :11]).memory
        memory = model(x[:, 11:22], memory=memory).memory
        return [model(x[:, 22:], memory=memory).logits[:, -1]]

    (expected,) = backend.values(last)(np.array([text], np.int32))
    assert tokens(backend, model, [text], max_new_tokens=1) == [[int(expected[0].argmax())]]
