"""What a user may expect of a language model's tokenizer: round trips, ends of texts, files others load."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.data.corpora import Document
from common.errors import UserError
from common.language.text import END_OF_TEXT, LanguageTokenizer, corpus_tokenizer, load_tokenizer

TEXTS = [Document(f"The {i} quick brown foxes jump over <unk> dogs.\n", 10) for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> LanguageTokenizer:
    return corpus_tokenizer(TEXTS, 520, tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("text", ["The quick fox.\n", " Ünï 漢字 \t x", "never seen <unk> words", ""])
def test_any_text_comes_back(tokenizer: LanguageTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_vocabulary_holds_what_it_was_given_and_unknown_is_one_token(
    tokenizer: LanguageTokenizer,
) -> None:
    assert 400 < tokenizer.vocab_size <= 520 and tokenizer.end_token == END_OF_TEXT
    assert len(tokenizer.unknown_ids) == 1
    assert tokenizer.decode(tokenizer.unknown_ids) == "<unk>"
    assert len(tokenizer.encode(" quick brown foxes jump")) < 12


def test_it_is_trained_once_and_a_broken_file_is_named(tmp_path: Path) -> None:
    first = corpus_tokenizer(TEXTS, 520, tmp_path)
    file = next(tmp_path.glob("bpe-*.json"))
    written = file.stat().st_mtime_ns
    assert corpus_tokenizer(TEXTS, 520, tmp_path).fingerprint() == first.fingerprint()
    assert file.stat().st_mtime_ns == written
    file.write_text("{")
    with pytest.raises(UserError, match="a broken cache file"):
        corpus_tokenizer(TEXTS, 520, tmp_path)
    with pytest.raises(UserError, match=r"data\.vocab_size is 100; allowed: >= 512"):
        corpus_tokenizer(TEXTS, 100, tmp_path)


def test_a_saved_tokenizer_is_the_same_here_and_in_transformers(
    tokenizer: LanguageTokenizer, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    text = "The quick brown fox and <unk>\n"
    again = load_tokenizer(tmp_path)
    assert again.fingerprint() == tokenizer.fingerprint()
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text).tolist()
    assert theirs.eos_token_id == tokenizer.end


def test_what_is_no_tokenizer_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("RESONANCE_DATA", raising=False)
    with pytest.raises(UserError, match=r"tokenizer 'nowhere/none' was not found.*data\.tokenizer bpe"):
        load_tokenizer("nowhere/none")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)
