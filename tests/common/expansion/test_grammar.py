"""QMD's grammar as sets of tokens: it allows what QMD's own grammar accepts, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from common.expansion.grammar import CONTENT, EMPTY, LINE, START, Grammar
from common.expansion.prompts import ExpansionPrompts, load_tokenizer
from common.expansion.qmd import in_grammar
from tests.tiny_expansion import write_expander, write_rows


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("grammar")
    return load_tokenizer(write_expander(folder / "base", write_rows(folder / "rows")))


@pytest.fixture(scope="module")
def grammar(tokenizer: Any) -> Grammar:
    return Grammar(tokenizer, ExpansionPrompts(tokenizer).end_id, len(tokenizer) + 5)


def accepted(grammar: Grammar, tokenizer: Any, text: str) -> bool:
    """Whether every token of the text, and then the end of the turn, is allowed."""
    state = grammar.start
    for token in [*tokenizer.encode(text, add_special_tokens=False), grammar.end_id]:
        if not grammar.allowed(state)[token]:
            return False
        state = grammar.advance(state, token)
    return True


@pytest.mark.parametrize(
    "text",
    [
        "lex: a\n",
        "hyde: Grüße, 你好.\nvec: how to clean\nlex: x: y\n",
        "lex: a",
        "",
        "lex:a\n",
        "lex: \n",
        "Lex: a\n",
        "lex: a\n\nvec: b\n",
        " lex: a\n",
        "query: a\n",
        "lex: a\nand more\n",
    ],
)
def test_it_accepts_what_qmd_accepts(grammar: Grammar, tokenizer: Any, text: str) -> None:
    assert accepted(grammar, tokenizer, text) == in_grammar(text)


def test_any_walk_of_allowed_tokens_is_in_the_grammar(grammar: Grammar, tokenizer: Any) -> None:
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    random = np.random.default_rng(seed)
    for _ in range(20):
        state, ids = grammar.start, []
        while not (ids and grammar.allowed(state)[grammar.end_id]) and len(ids) < 300:
            ids.append(int(random.choice(np.flatnonzero(grammar.allowed(state)))))
            state = grammar.advance(state, ids[-1])
        text = b"".join(grammar.bytes_of(i) for i in ids).decode(errors="replace")
        if state == LINE:
            assert in_grammar(text), (seed, text)
        else:
            assert in_grammar(text + ("x\n" if state == EMPTY else "\n")) == (state in (CONTENT, EMPTY)), text


def test_padding_and_control_tokens_are_never_allowed(grammar: Grammar, tokenizer: Any) -> None:
    for state in (START, LINE, EMPTY, CONTENT):
        mask = grammar.allowed(state).copy()
        mask[grammar.end_id] = False
        assert not mask[len(tokenizer) :].any()
        assert not mask[list(tokenizer.added_tokens_decoder)].any()
    with pytest.raises(ValueError, match="not allowed in state"):
        grammar.advance(START, grammar.end_id)
