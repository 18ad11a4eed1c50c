"""One query and its passages: order, probabilities, confidence, and the files they come from."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from common.backends import Scores
from common.errors import UserError
from common.metrics.calibration import Confidence
from common.reranker.reranking import load_confidence, read_passages, rerank, shown


class Lengths:
    """Scores a passage by its number of words."""

    name, identity, fusion_weight = "lengths", "", 0.0

    def score(
        self,
        queries: Sequence[str],
        passages: Sequence[str],
        on_batch: Callable[[int], None] | None = None,
    ) -> Scores:
        words = np.array([len(passage.split()) for passage in passages], np.float32)
        return Scores(words, words, words / 10, words, words)


def fitted() -> Confidence:
    margin = np.linspace(0, 1, 40)
    return Confidence.fit(np.stack([1 - margin, margin, margin], axis=1), (margin > 0.5).astype(float), 3)


def test_the_highest_score_comes_first_and_probabilities_add_up() -> None:
    ranking = rerank(Lengths(), "q", {"a": "one", "b": "one two three", "c": "one two", "d": "two one"})
    assert [passage.id for passage in ranking.passages] == ["b", "c", "d", "a"]
    assert [passage.rank for passage in ranking.passages] == [1, 2, 3, 4]
    assert sum(passage.probability for passage in ranking.passages) == pytest.approx(1.0)
    assert ranking.passages[0].probability == pytest.approx(np.exp(3) / np.exp([1, 3, 2, 2]).sum())
    assert ranking.passages[0].resonance == pytest.approx(0.3)


def test_confidence_is_the_calibrated_one_or_said_to_be_missing() -> None:
    clear, even = {"a": " ".join("abcdefghij"), "b": "x"}, {"a": "x y", "b": "z w"}
    assert rerank(Lengths(), "q", clear).confidence is None
    assert "relevant: none was fitted" in shown(rerank(Lengths(), "q", clear))
    assert "on lists of 3 passages" in shown(rerank(Lengths(), "q", {"a": "x"}, fitted()))
    high, low = (rerank(Lengths(), "q", passages, fitted()) for passages in (clear, even))
    assert high.confidence is not None and low.confidence is not None
    assert high.confidence > 0.9 > 0.1 > low.confidence
    assert shown(high).endswith(f"relevant: {high.confidence:.2f}")


def test_confidence_is_read_from_the_checkpoints_config(tmp_path: Path) -> None:
    for stored, expected in (({"confidence": fitted().to_json()}, fitted()), ({"confidence": None}, None)):
        (tmp_path / "config.json").write_text(json.dumps({"resonance": stored}))
        assert load_confidence(tmp_path) == expected
    (tmp_path / "config.json").write_text("{}")
    assert load_confidence(tmp_path) is None


def test_only_the_first_lines_and_words_are_shown() -> None:
    text = shown(rerank(Lengths(), "q", {"a": "one two three", "b": "x"}), top=1, words=2)
    assert "a: one two …" in text and "b:" not in text


def test_passages_from_lines_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.txt").write_bytes("first\r\n\n third\fpage\u2028of it \n".encode())
    assert read_passages(tmp_path / "p.txt") == {"1": "first", "3": "third\fpage\u2028of it"}
    rows = [{"id": "x", "text": "body", "title": "Head"}, {"id": None, "text": "alone"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_passages(tmp_path / "p.jsonl") == {"x": "Head body", "2": "alone"}
    monkeypatch.setattr("sys.stdin", io.StringIO("typed\n"))
    assert read_passages("-") == {"1": "typed"}


def test_bad_passages_are_all_named(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(
        '{"text": ""}\n{"id": 1, "text": "a"}\n"text"\n{"id": "1", "text": "b"}\n{"id": [2], "text": "c"}\n'
    )
    with pytest.raises(UserError) as caught:
        read_passages(file)
    for problem in (
        "4 bad row",
        ":1: expected",
        ":3: expected",
        ":4: the id '1' appears twice",
        ":5: the id",
    ):
        assert problem in str(caught.value)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # of a UTF-8 locale, and of the C locale
def test_bytes_that_are_not_utf8_are_refused(monkeypatch: pytest.MonkeyPatch, errors: str) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8", errors))
    with pytest.raises(UserError, match="standard input: not UTF-8"):
        read_passages("-")
    with pytest.raises(UserError, match="the query holds bytes that are not UTF-8"):
        rerank(Lengths(), "caf\udce9", {"a": "b"})
    with pytest.raises(UserError, match="passage a holds bytes that are not UTF-8"):
        rerank(Lengths(), "q", {"a": "caf\udce9"})


def test_nothing_to_rank_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n  \n")
    with pytest.raises(UserError, match=r"p\.txt: no passages; give one a line"):
        read_passages(tmp_path / "p.txt")
    with pytest.raises(UserError, match="the query is empty"):
        rerank(Lengths(), " ", {"a": "b"})


def test_a_damaged_confidence_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"resonance": {"confidence": {"bias": 1.0}}}))
    with pytest.raises(UserError, match=r"confidence in its config\.json"):
        load_confidence(tmp_path)
