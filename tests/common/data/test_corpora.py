"""What a user may expect of texts for language models: sizes, forms, rows of every kind, refusals."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.data import corpora
from common.data.corpora import (
    Document,
    detokenised,
    held_out,
    load_alpaca,
    load_corpus,
    load_wikitext,
    mixed_corpus,
    row_document,
    wikitext_documents,
)
from common.errors import UserError

PUBLIC = Path(os.environ.get("RESONANCE_DATA", "")) / "wikitext-2"
TWO_ARTICLES = [
    " ",
    " = First <unk> = ",
    " ",
    " A well @-@ known number is 1 @,@ 000 . ",
    " ",
    " = = Part = = ",
    " ",
    ' It \'s " quoted " ( so ) . ',
    " ",
    " = Second = ",
    " ",
    " Words . ",
]


def write_wikitext(folder: Path, lines: list[str]) -> Path:
    folder.mkdir(parents=True)
    for part in ("train", "valid", "test"):
        (folder / f"wiki.{part}.tokens.gz").write_bytes(
            gzip.compress("".join(f"{x}\n" for x in lines).encode())
        )
    return folder


def test_articles_begin_at_titles_and_keep_every_word_and_line() -> None:
    first, second = wikitext_documents(TWO_ARTICLES, "literal")
    assert first.text + second.text == "".join(f"{line}\n" for line in TWO_ARTICLES)
    assert second.text.startswith(" = Second = \n")
    assert first.words + second.words == sum(len(line.split()) + 1 for line in TWO_ARTICLES)
    assert (first.unknown, second.unknown) == (1, 0)


@pytest.mark.parametrize(
    ("tokens", "typed"),
    [
        (" A well @-@ known number is 1 @,@ 000 @.@ 5 . ", "A well-known number is 1,000.5."),
        (" It 's \" quoted \" ( so ) , he did n't . ", "It's \"quoted\" (so), he didn't."),
        (" <unk> , the <unk> ; $ 5 % ", "<unk>, the <unk>; $5%"),
        (" = = Part = = ", "= = Part = ="),
        (" ", ""),
    ],
)
def test_the_detokenised_form_reads_as_typed(tokens: str, typed: str) -> None:
    assert detokenised(tokens) == typed


def test_both_forms_count_the_words_of_the_original(tmp_path: Path) -> None:
    folder = write_wikitext(tmp_path / "wiki", TWO_ARTICLES)
    literal, typed = (load_wikitext(folder, form) for form in ("literal", "detokenised"))
    assert [d.words for d in literal.split("test")] == [d.words for d in typed.split("test")]
    assert literal.fingerprint != typed.fingerprint
    assert "A well-known number is 1,000." in typed.split("train")[0].text


def test_a_cut_wikitext_2_is_refused_with_both_numbers(tmp_path: Path) -> None:
    folder = write_wikitext(tmp_path / "wikitext-2", TWO_ARTICLES)
    with pytest.raises(UserError, match=r"has 45 words with end of line; published are 2,088,628"):
        load_wikitext(folder)
    (folder / "wiki.train.tokens.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match=r"wiki\.train\.tokens\.gz: cannot be read"):
        load_wikitext(folder)
    (folder / "wiki.train.tokens.gz").unlink()
    with pytest.raises(UserError, match=r"has neither wiki\.train\.tokens nor wiki\.train\.tokens\.gz"):
        load_wikitext(folder)


@pytest.mark.skipif(not PUBLIC.is_dir(), reason="WikiText-2 is not in $RESONANCE_DATA")
def test_wikitext_2_has_its_published_sizes() -> None:
    corpus = load_wikitext(PUBLIC)
    sizes = {split: sum(d.words for d in items) for split, items in corpus.splits.items()}
    assert sizes == {"train": 2_088_628, "dev": 217_646, "test": 245_569}
    assert [len(corpus.split(split)) for split in ("train", "dev", "test")] == [600, 60, 60]


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        (
            {"instruction": "Add.", "input": "1 and 2", "output": "3"},
            "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n",
            "3",
        ),
        (
            {"instruction": "Greet.", "input": "", "output": " Hello\n"},
            "### Instruction:\nGreet.\n\n### Response:\n",
            "Hello",
        ),
        (
            {"text": "Long text.", "summary": "Short."},
            "### Instruction:\nSummarize the text.\n\n### Input:\nLong text.\n\n### Response:\n",
            "Short.",
        ),
        (
            {"question": "Who?", "context": "Ada wrote.", "answer": "Ada"},
            "### Instruction:\nAnswer the question.\n\n### Input:\nAda wrote.\n\nWho?\n\n### Response:\n",
            "Ada",
        ),
        ({"prompt": "Once ", "completion": "upon"}, "Once ", "upon"),
        ({"text": "Only text.\nTwo lines."}, "", "Only text.\nTwo lines."),
    ],
)
def test_rows_of_every_form_become_prompt_and_answer(row: dict[str, str], prompt: str, answer: str) -> None:
    document = row_document(row)
    assert document.text == prompt + answer
    assert document.prompt == len(prompt)


def test_bad_rows_are_named_by_line_and_nothing_is_trained_on_a_guess(tmp_path: Path) -> None:
    file = tmp_path / "task.jsonl"
    rows: list[Any] = [
        {"question": "Who?", "answer": "Ada"},
        {"instruction": "x", "output": " "},
        {"a": "b"},
        {"text": 3},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError) as raised:
        load_corpus(str(file))
    for part in (
        "3 bad rows",
        "task.jsonl:2: 'output' is empty",
        ":3: has the fields a; allowed:",
        ":4: 'text' is",
    ):
        assert part in str(raised.value)
    file.write_text('{"text": "x"}\n[1]\n')
    with pytest.raises(UserError, match=r"task\.jsonl:2: holds a list"):
        load_corpus(str(file))


def test_alpaca_takes_random_rows_alone_and_says_so(tmp_path: Path) -> None:
    rows = [
        {"instruction": f"Do {i}", "input": "", "output": "" if i == 4 else f"done {i}", "from": [source]}
        for i, source in enumerate(["random_9k", "claude_t45", "random_5000"] * 40)
    ]
    (tmp_path / "alpaca_subset.jsonl.gz").write_bytes(
        gzip.compress("\n".join(map(json.dumps, rows)).encode())
    )
    corpus = load_alpaca(tmp_path)
    kept = [document for split in corpus.splits.values() for document in split]
    assert len(kept) == 80 and not any("Do 1\n" in d.text or "Do 4\n" in d.text for d in kept)
    assert "80 random rows of alpaca_subset.jsonl.gz stand for its 52,002" in corpus.notes[0]


def test_a_row_lies_in_one_split_whatever_others_there_are() -> None:
    documents = [Document(f"prompt {i % 500} answer {i}", 4, len(f"prompt {i % 500}")) for i in range(1000)]
    all_of_them, some = held_out(documents), held_out(documents[::7])
    for split, items in some.items():
        assert set(items) <= set(all_of_them[split])
    prompts = [{d.text[: d.prompt] for d in items} for items in all_of_them.values()]
    assert not prompts[0] & (prompts[1] | prompts[2]) and 900 < len(all_of_them["train"]) < 1000


def test_mixed_shuffles_paragraphs_and_rows(tmp_path: Path) -> None:
    wikitext = load_wikitext(write_wikitext(tmp_path / "wiki", TWO_ARTICLES), "detokenised")
    rows = [Document(f"### Instruction:\n{i}", 2, 5) for i in range(30)]
    alpaca = corpora.Corpus("alpaca", {"train": tuple(rows), "dev": (), "test": ()})
    mixed = mixed_corpus(wikitext, alpaca)
    assert len(mixed.split("train")) == 33 and set(rows) <= set(mixed.split("train"))
    assert mixed.split("train")[:30] != tuple(rows) and mixed == mixed_corpus(wikitext, alpaca)
    assert mixed.notes[0] == "mixed: 3 paragraphs of wiki and 30 rows of Alpaca to train on"


def test_text_files_are_split_by_place(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("\n\n".join(f"Paragraph {i}." for i in range(20)))
    corpus = load_corpus(str(file))
    assert corpus.split("test")[0].text == "Paragraph 18.\n\nParagraph 19.\n"
    assert corpus.split("train")[0].text.startswith("Paragraph 0.\n\n")
    file.write_text("one paragraph")
    with pytest.raises(UserError, match="has 1 paragraphs"):
        load_corpus(str(file))


def test_an_unknown_corpus_and_a_missing_hub_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="'wikitext' is no corpus: give pydocs, wikitext-2"):
        load_corpus("wikitext")

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no network\nmore")

    monkeypatch.delenv("RESONANCE_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    with pytest.raises(UserError, match=r"Salesforce/wikitext .*\(no network\).*--data pydocs"):
        load_corpus("wikitext-2")


def test_the_hubs_alpaca_is_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"instruction": f"Do {i}", "input": "", "output": "done", "text": "the same again"} for i in range(50)
    ]
    monkeypatch.delenv("RESONANCE_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: rows))
    corpus = load_corpus("alpaca")
    assert sum(map(len, corpus.splits.values())) == 50 and not corpus.notes


@pytest.mark.slow
def test_the_documentation_here_is_a_corpus_whose_splits_share_no_docstring() -> None:
    corpus = load_corpus("pydocs")
    train, test = ("".join(d.text for d in corpus.split(split)) for split in ("train", "test"))
    assert len(train) > 10 * 200_000 and 100_000 < len(test) < len(train)
    paragraphs = {part for part in test.split("\n\n") if len(part) > 300}
    assert len(paragraphs & set(train.split("\n\n"))) < 0.02 * len(paragraphs)


def test_few_rows_have_a_dev_and_a_test_row_all_the_same() -> None:
    documents = [row_document({"instruction": f"Say {number}.", "output": "it"}) for number in range(12)]
    splits = held_out(documents)
    assert {name: len(items) > 0 for name, items in splits.items()} == dict.fromkeys(splits, True)
    assert sorted(d.text for items in splits.values() for d in items) == sorted(d.text for d in documents)
    assert len(held_out(documents[:5])["train"]) == 5


def test_too_few_rows_to_be_split_are_explained(tmp_path: Path) -> None:
    file = tmp_path / "few.jsonl"
    file.write_text("".join(f'{{"text": "row {n}"}}\n' for n in range(3)))
    with pytest.raises(UserError, match=r"in split 'dev'; it has: train\. .* from 10 different ones on"):
        load_corpus(str(file)).split("dev")
