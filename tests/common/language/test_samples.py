"""Prompts from a split, what a model makes of them, and human text measured the same way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from common.data.corpora import Document
from common.data.language import TokenDocuments
from common.errors import UserError
from common.language.generation import Generated, SamplingConfig
from common.language.samples import (
    LanguageGenerator,
    human_metrics,
    measured_samples,
    metrics_table,
    split_prompts,
)
from common.language.text import LanguageTokenizer, corpus_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> LanguageTokenizer:
    text = " ".join(f"word{i} follows others" for i in range(300))
    return corpus_tokenizer([Document(text, 900)], 600, tmp_path_factory.mktemp("cache"))


def documents(*lengths: int) -> TokenDocuments:
    starts = np.concatenate(([0], np.cumsum(lengths)))
    numbers = np.asarray(lengths, np.int64)
    return TokenDocuments(
        np.arange(1, starts[-1] + 1, dtype=np.int32), np.ones(starts[-1], bool), starts, numbers, numbers
    )


def test_prompts_and_what_follows_them_are_of_one_document() -> None:
    split = documents(40, 5, 60)
    found = split_prompts(split, count=30, prompt_tokens=4, new_tokens=6, seed=1)
    for prompt, human in zip(found.prompts, found.human, strict=True):
        whole = prompt + human
        assert whole == list(range(whole[0], whole[0] + 10))
        assert whole[-1] <= 40 or whole[0] > 45  # never of the short one, never across a border
    assert found == split_prompts(split, count=30, prompt_tokens=4, new_tokens=6, seed=1)
    with pytest.raises(UserError, match=r"no document has 61 tokens.*the longest has 60"):
        split_prompts(split, count=1, prompt_tokens=1, new_tokens=60, seed=0)


def test_a_model_that_writes_what_the_author_wrote_has_bleu_100(tokenizer: LanguageTokenizer) -> None:
    ids = tokenizer.encode(" ".join(f"word{i} follows others" for i in range(120)))
    split = TokenDocuments(
        ids, np.ones(len(ids), bool), np.array([0, len(ids)]), np.array([360]), np.array([len(ids)])
    )
    prompts = split_prompts(split, count=4, prompt_tokens=5, new_tokens=30, seed=0)

    class Author(LanguageGenerator):
        def continued(self, given: Sequence[Sequence[int]], *_: object) -> list[Generated]:
            assert list(given) == prompts.prompts
            return [Generated(tuple(text), "", "length", 0.1) for text in prompts.human]

    author = Author("author", None, tokenizer)  # type: ignore[arg-type]
    found, made = measured_samples(author, prompts, SamplingConfig())
    assert found["bleu_4"] == pytest.approx(100) and found["exploration"] == pytest.approx(0.1)
    assert found["tokens"] == 30 and len(made) == 4
    human = human_metrics(prompts, tokenizer)
    assert human["repetition_2"] == pytest.approx(found["repetition_2"]) and human["bleu_4"] < 60


def test_the_table_has_a_column_for_each_text_and_shows_what_is_missing() -> None:
    table = metrics_table("t", {"human": {"a_b": 1.0}, "model": {"a_b": math.nan, "c": 2.0}}, "note")
    assert table["columns"] == ["metric", "human", "model"]
    assert table["rows"] == [["a b", 1.0, None], ["c", None, 2.0]]


def test_the_documentations_tokens_fit_the_cache_of_a_second_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from common.data.corpora import Corpus
    from common.language import prepare as module
    from tests.tiny_language import recipe

    calls = []

    def load(name: str, *_: object, **__: object) -> Corpus:
        calls.append(name)
        return Corpus("pydocs", {split: (Document("text " * 50, 50),) for split in ("train", "dev", "test")})

    monkeypatch.setenv("RESONANCE_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "load_corpus", load)
    config = recipe("decoder", Path("pydocs"))
    first, second = (module.recipe_corpus(config) for _ in range(2))
    assert first == second and calls == ["pydocs"]
