"""What is measured of an export beside its source, when it is refused, and what its card says."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from common.data.language import TokenDocuments
from common.export.language_verification import (
    NEW_TOKENS,
    LanguageMeasured,
    LanguageVerification,
    SideBySide,
    language_export_table,
    verification_prompts,
)
from common.language.generation import SamplingConfig, generate
from common.report import tables_text
from tests.language_exports import MODELS

SOURCE = LanguageMeasured(4.0, {"static": 20.0, "cache": 10.0})
FOUND = LanguageVerification(
    name="mine",
    precision="int8",
    corpus="text, split dev",
    documents=3,
    tokens=1000,
    source=SOURCE,
    export=LanguageMeasured(1.0, {"static": 20.1, "cache": 10.1}),
    difference={"largest": 0.5, "mean": 0.01, "of": 12.0},
    greedy={"prompts": 5, "tokens": 120, "different": 4, "regret": 0.3},
    loss=0.01,
)


class Counting:
    """An engine whose logits are largest at the number of tokens that a row has read, plus `more`."""

    context, segmented, vocab_size = 4, True, 50

    def __init__(self, more: int = 0, peak: float = 5.0) -> None:
        self.more, self.peak, self.renewed = more, peak, 0

    def start(self, rows: int, capacity: int) -> np.ndarray:
        return np.zeros(rows, int)

    def read(self, state: Any, ids: Any, counts: Any, explore: Any = None) -> Any:
        state = state + counts
        logits = np.zeros((len(state), self.vocab_size), np.float32)
        logits[np.arange(len(state)), (state + self.more) % self.vocab_size] = self.peak
        return state, logits

    def renew(self, state: Any, rows: Any) -> Any:
        self.renewed += 1
        return state


class Silent:
    end = None

    def decode(self, ids: Any) -> str:
        return ""


def test_two_engines_read_the_same_tokens_and_the_sources_are_written() -> None:
    for export, largest, regrets in (
        (Counting(), 0.0, 0),
        (Counting(peak=5.5), 0.5, 0),
        (Counting(more=1), 5.0, 14),
    ):
        both = SideBySide(Counting(), export)
        texts = generate(both, [[0], [0, 0, 0]], Silent(), SamplingConfig(max_new_tokens=7))
        assert [text.ids for text in texts] == [tuple(range(1, 8)), tuple(range(3, 10))]
        assert export.renewed > 0 and both.tokens == 14
        assert max(part.max() for part in both.differences) == pytest.approx(largest)
        assert both.regrets == [5.0] * regrets and both.largest == 5.0


def test_an_export_is_refused_for_perplexity_and_in_fp32_for_other_tokens() -> None:
    assert FOUND.refused(0.02) is None
    worse = dataclasses.replace(
        FOUND, loss=0.5, export=LanguageMeasured(1.0, {"static": 21.0, "cache": 15.0})
    )
    said = worse.refused(0.02)
    assert said is not None
    for part in ("perplexity 15.000 against 10.000 (cache), 50.00% more (allowed: 2.00%)", "--force it"):
        assert part in said
    other = dataclasses.replace(FOUND, precision="fp32").refused(0.02)
    assert other is not None and "chooses other tokens than its source: 4 of 120" in other
    near = dataclasses.replace(FOUND, precision="fp32", greedy=FOUND.greedy | {"regret": 1e-4})
    assert near.refused(0.02) is None


def test_the_table_and_the_card_say_what_was_lost() -> None:
    text = tables_text([language_export_table({"int8": FOUND})])
    for part in ("mine (source)", "onnx int8", "perplexity, cache", "10.1", "4 of 120", "1,000 tokens in 3"):
        assert part in text
    card = FOUND.card(MODELS["infinito"].to_dict())
    for part in (
        "# mine, ONNX int8",
        "onnx int8",
        "`past_memory.slots` float32 | [rows, 9, 32]",
        "`present_memory.slots`",
        "def decode(",
        "`new_segment` (of a model with a memory)",
    ):
        assert part in card
    assert "past_memory" not in FOUND.card(MODELS["qwen3"].to_dict()).partition("## Inputs")[2]


@pytest.mark.parametrize("context", [8, 64, 256])
def test_prompts_go_over_a_border_or_stay_within_the_context(context: int) -> None:
    sizes = np.array([30, 70], np.int64)
    text = TokenDocuments(
        np.arange(100, dtype=np.int32), np.ones(100, bool), np.array([0, 30, 100]), sizes, sizes
    )
    over = [len(prompt) for prompt in verification_prompts(text, context, segmented=True)]
    assert any(n < context < n + NEW_TOKENS for n in over) and any(n > context for n in over)
    within = [len(prompt) for prompt in verification_prompts(text, context, segmented=False)]
    assert min(within) == 1 and max(within) <= max(1, context - NEW_TOKENS)
    assert len({tuple(prompt) for prompt in verification_prompts(text, context, segmented=True)}) == 4
