"""Documents, their sentences and chunks."""

import random
from typing import Any

import pytest

from common.errors import UserError
from common.retrieval.documents import (
    Chunking,
    Document,
    as_documents,
    chunks,
    count_tokens,
    sentences,
)


def test_texts_and_records_become_documents() -> None:
    given = [
        "one text",
        {"id": 7, "text": "two", "title": "T", "metadata": {"a": 1}, "url": "u"},
        Document("x", "y"),
    ]
    found = as_documents(given)
    assert [document.text for document in found] == ["one text", "two", "y"]
    assert found[1] == Document("7", "two", "T", {"a": 1, "url": "u"})
    assert as_documents(["one text", "one text"]) == found[:1]  # the same text is the same document
    assert as_documents([{"text": "one text", "title": "T"}])[0].id != found[0].id


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"id": "a"}, "document 2: needs a `text`"),
        ("   ", "document 2: needs a `text`"),
        (3, "document 2: is a int"),
        ({"text": "a", "id": 1.5}, "document 2: the id 1.5"),
        ({"text": "a", "metadata": [1]}, "document 2: `metadata` is a list"),
        ({"text": "a", "metadata": {"k": {1}}}, "document 2: `metadata` is not JSON"),
        ({"text": "a\ud800"}, "document 2: holds what is no Unicode"),
        ({"id": "one", "text": "other"}, "document 2: the id 'one' appears twice"),
    ],
)
def test_what_is_no_document_is_named(item: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        as_documents([{"id": "one", "text": "first"}, item])


@pytest.mark.parametrize("items", [{"id": "q", "text": "x"}, "word", b"word", None, 5])
def test_one_document_without_its_list_is_refused(items: Any) -> None:
    """Else a record's keys, or a text's letters, would become documents."""
    with pytest.raises(UserError, match=r"documents come in a list, this is a .*: \[document\]"):
        as_documents(items)


def test_sentences_end_where_a_reader_ends_them() -> None:
    text = 'Dr. Who sorts, e.g. lists of 3.5 items. It "works!" Then? Yes… No\n\nA new line. see also this'
    assert sentences(text) == [
        "Dr. Who sorts, e.g. lists of 3.5 items.",
        'It "works!"',
        "Then?",
        "Yes…",
        "No",
        "A new line. see also this",
    ]
    assert sentences("これは文です。次の文。") == ["これは文です。", "次の文。"]
    assert sentences("  \n ") == []


def test_chunks_hold_every_sentence_whole_within_the_limit(seed: int) -> None:
    rng = random.Random(seed)
    lines = [
        " ".join(["Word", *(f"w{rng.randrange(999)}" for _ in range(rng.randrange(30)))]) + "."
        for _ in range(60)
    ]
    chunking = Chunking(max_tokens=80, overlap=1)
    made = chunks(" ".join(lines), chunking)
    assert len(made) > 3 and all(count_tokens(chunk) <= 80 for chunk in made)
    assert all(any(line in chunk for chunk in made) for line in lines if count_tokens(line) <= 80)
    firsts = [sentences(chunk)[0] for chunk in made[1:]]
    before = [sentences(chunk)[-1] for chunk in made[:-1]]
    assert any(first == last for first, last in zip(firsts, before, strict=True))  # the overlap
    without = chunks(" ".join(lines), Chunking(max_tokens=80, overlap=0))
    assert " ".join(without) == " ".join(lines)


def test_a_sentence_longer_than_a_chunk_is_cut_between_words_and_nothing_is_lost() -> None:
    words = [f"word{number}" for number in range(200)]
    made = chunks(" ".join(words), Chunking(max_tokens=20, overlap=0))
    assert " ".join(made).split() == words and all(count_tokens(chunk) <= 20 for chunk in made)
    endless = chunks("x" * 1000, Chunking(max_tokens=20, overlap=0))
    assert "".join(endless).replace(" ", "") == "x" * 1000 and all(
        count_tokens(part) <= 20 for part in endless
    )
    assert chunks("short", Chunking()) == ["short"]


def test_chunking_says_what_is_allowed() -> None:
    for settings in ({"max_tokens": 15}, {"overlap": -1}):
        with pytest.raises(UserError, match="allowed: >="):
            Chunking(**settings)
