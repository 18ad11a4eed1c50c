"""Generation in batches: what a row says does not depend on its neighbours; ends, copies, sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="needs MLX and mlx-lm: install the extra `mlx`")

import mlx.core as mx

from common.errors import UserError
from common.expansion.grammar import Grammar
from common.expansion.prompts import ExpansionPrompts, load_tokenizer
from common.expansion.qmd import Sampling, in_grammar
from mlx_impl.models.qwen import Origin, load_base
from mlx_impl.training.generation import generate, greedy
from tests.tiny_expansion import write_expander, write_rows

QUERIES = ("clean lamp", "repair the old garden fence", "x")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ExpansionPrompts]:
    folder = tmp_path_factory.mktemp("generation")
    base = write_expander(folder / "base", write_rows(folder / "rows"))
    return load_base(Origin(Path(base))).model, ExpansionPrompts(load_tokenizer(base))


def greedily(model: Any, prompt: list[int], count: int, end: int) -> list[int]:
    """One token after the other, from the whole text each time."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(mx.argmax(model(mx.array([ids]))[0, -1])))
        if ids[-1] == end:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


def test_rows_of_a_batch_are_those_of_one_alone(world: tuple[Any, ExpansionPrompts]) -> None:
    model, prompts = world
    asked = [prompts.prompt(query, consumer=place == 1) for place, query in enumerate(QUERIES)]
    first = greedily(model, asked[0], 20, -1)
    end = first[9]  # a token that some row writes: rows then end at different places
    found = generate(model, asked, end=end, sampling=greedy(20), copies=2, batch_size=6)
    for place, prompt in enumerate(asked):
        expected = greedily(model, prompt, 20, end)
        for row in found[2 * place : 2 * place + 2]:
            assert row.ids == expected and row.ended == (len(expected) < 20)
    assert any(row.ended for row in found)


def test_samples_differ_within_a_group_and_follow_from_the_seed(world: tuple[Any, ExpansionPrompts]) -> None:
    model, prompts = world
    asked = [prompts.prompt(query) for query in QUERIES]
    sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0, presence_penalty=0.0, max_tokens=12)

    def run(seed: int) -> list[list[int]]:
        rows = generate(model, asked, end=prompts.end_id, sampling=sampling, copies=3, seed=seed)
        return [row.ids for row in rows]

    assert run(1) == run(1) != run(2)
    assert len({tuple(ids) for ids in run(1)}) > 3


def test_top_k_and_top_p_keep_the_likeliest(world: tuple[Any, ExpansionPrompts]) -> None:
    model, prompts = world
    prompt = prompts.prompt(QUERIES[0])
    best = np.argsort(-np.array(model(mx.array([prompt]))[0, -1]))
    for limit, kept in (({"top_k": 3, "top_p": 1.0}, 3), ({"top_k": 20, "top_p": 1e-6}, 1)):
        sampling = Sampling(temperature=5.0, presence_penalty=0.0, max_tokens=1, **limit)
        rows = generate(model, [prompt], end=prompts.end_id, sampling=sampling, copies=64, batch_size=64)
        drawn = {token for row in rows for token in (row.ids or [prompts.end_id])}
        assert drawn <= set(best[:kept].tolist()) and len(drawn) == kept


def test_a_presence_penalty_stops_repeating(world: tuple[Any, ExpansionPrompts]) -> None:
    model, prompts = world
    sampling = Sampling(temperature=0.0, top_k=0, top_p=1.0, presence_penalty=1e4, max_tokens=30)
    (row,) = generate(model, [prompts.prompt(QUERIES[0])], end=-1, sampling=sampling)
    assert len(set(row.ids)) == 30


def test_an_answer_held_to_the_grammar_is_in_it(world: tuple[Any, ExpansionPrompts]) -> None:
    model, prompts = world
    grammar = Grammar(prompts.tokenizer, prompts.end_id, 384)
    sampling = Sampling(temperature=30.0, top_k=0, top_p=1.0, presence_penalty=0.0, max_tokens=150)
    asked = [prompts.prompt(query) for query in QUERIES]
    rows = generate(model, asked, end=prompts.end_id, sampling=sampling, copies=4, grammar=grammar)
    texts = [prompts.decode(row.ids) for row in rows]
    lines = [text[: text.rindex("\n") + 1] for text in texts if "\n" in text]
    assert lines and all(in_grammar(text) for text in lines)
    assert all(text.startswith(("lex: ", "vec: ", "hyde: ")) for text in texts)


def test_an_answer_that_the_context_cannot_hold_is_refused(world: tuple[Any, ExpansionPrompts]) -> None:
    model, prompts = world
    for query, tokens in (("clean lamp", 10**9), ("word " * 5000, 4)):
        with pytest.raises(UserError, match=r"longest prompt has \d+ tokens.*context is 4096"):
            generate(model, [prompts.prompt(query)], end=prompts.end_id, sampling=greedy(tokens))
