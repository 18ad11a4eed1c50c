"""The index on disk: searched as it should, whole after every crash, refused where it does not fit."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from common.retrieval import index as module
from common.retrieval.documents import Chunking, Document
from common.retrieval.index import PassageIndex
from common.retrieval.lexical import BM25
from tests.retrieval_fakes import WordEncoder

WORDS = [f"w{number}" for number in range(60)]


def documents(count: int, seed: int = 0, first: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    return [
        Document(f"d{number}", f"own{number} " + " ".join(rng.choice(WORDS, 6)), metadata={"n": number})
        for number in range(first, first + count)
    ]


def opened(folder: Path, encoder: WordEncoder | None = None, **settings: object) -> PassageIndex:
    return PassageIndex(folder, encoder or WordEncoder(), say=lambda _: None, **settings)


def texts(index: PassageIndex, found: dict[int, float]) -> list[str]:
    return [passage.document for passage in index.passages(list(found)).values()]


def test_both_searches_find_what_exhaustive_search_finds(tmp_path: Path, seed: int) -> None:
    given, encoder = documents(200, seed), WordEncoder()
    index = opened(tmp_path, encoder)
    index.add(given)
    query = "w1 w2 w3 own7"
    vectors, asked = encoder.encode([d.text for d in given]), encoder.encode([query])[0]
    exact = np.argsort(-(vectors @ asked), kind="stable")[:10]
    assert texts(index, index.dense(query, 10)) == [f"d{place}" for place in exact]
    np.testing.assert_allclose(list(index.dense(query, 10).values()), (vectors @ asked)[exact], atol=1e-5)
    lexical = BM25([d.text for d in given]).scores(query)
    found = index.lexical(query, 10)
    assert texts(index, found) == [f"d{place}" for place in np.argsort(-lexical, kind="stable")[:10]]
    np.testing.assert_allclose(list(found.values()), np.sort(lexical)[::-1][:10], rtol=1e-5)


def test_it_is_the_same_when_it_is_opened_again(tmp_path: Path) -> None:
    index = opened(tmp_path)
    index.add(documents(30))
    lexical, dense = index.lexical("w1 own3", 5), index.dense("w1 own3", 5)
    again = opened(tmp_path)
    assert (again.lexical("w1 own3", 5), again.dense("w1 own3", 5)) == (lexical, dense)
    assert (again.version, again.size, again.documents, again.kind) == (index.version, 30, 30, "flat")
    assert again.get("d3")[0].metadata == {"n": 3} and again.get("d99") == []
    assert isinstance(again._view.vectors, np.memmap)
    again.verify()


def test_adding_again_embeds_only_what_is_new_or_changed(tmp_path: Path) -> None:
    encoder = WordEncoder()
    index = opened(tmp_path, encoder)
    assert index.add(documents(20)).added == 20
    before = encoder.encoded
    changes = index.add([*documents(20)[:18], Document("d18", "changed words"), Document("new", "own words")])
    assert (changes.added, changes.updated, changes.unchanged) == (1, 1, 18)
    assert encoder.encoded == before + 2 and index.documents == 21
    assert texts(index, index.lexical("own18", 5)) == [] and texts(index, index.lexical("changed", 5)) == [
        "d18"
    ]
    assert changes.version == index.version > 1


def test_what_is_deleted_is_found_no_more_and_its_place_is_taken_back(tmp_path: Path) -> None:
    index, encoder = opened(tmp_path), WordEncoder()
    given = documents(300)
    index.add(given)
    assert index.delete([f"d{number}" for number in range(0, 300, 2)] + ["unknown"]) == 150
    assert index.size == 150 and index._view.rows == 150 and index._view.generation == 1  # written anew
    kept = [d for d in given if int(d.id[1:]) % 2]
    asked = encoder.encode(["w4 w5"])[0]
    exact = np.argsort(-(encoder.encode([d.text for d in kept]) @ asked), kind="stable")[:20]
    assert texts(index, index.dense("w4 w5", 20)) == [kept[place].id for place in exact]
    assert not {f"d{n}" for n in range(0, 300, 2)} & set(texts(index, index.lexical("w4 w5", 300)))
    index.verify()
    assert index.delete([d.id for d in kept]) == 150
    assert (index.size, index.dense("w4", 3), index.lexical("w4", 3)) == (0, {}, {})
    assert sorted(path.name for path in tmp_path.glob("vectors-*")) == ["vectors-2.f32"]


def test_deleted_neighbours_never_shorten_a_list(tmp_path: Path) -> None:
    index = opened(tmp_path)
    index.add([Document(f"near{n}", "same words here") for n in range(60)] + documents(400))
    index.delete([f"near{number}" for number in range(60)])
    assert index._view.rows == 460  # still there, as too few to write the file anew
    found = texts(index, index.dense("same words here", 30))
    assert len(found) == 30 and not [name for name in found if name.startswith("near")]


def test_numbers_stay_when_the_vectors_are_written_anew(tmp_path: Path) -> None:
    index = opened(tmp_path)
    index.add(documents(200))
    query = documents(200)[150].text
    found = index.dense(query, 1)
    index.delete([f"d{number}" for number in range(120)])
    assert texts(index, found) == ["d150"] and list(index.dense(query, 1)) == list(found)


@pytest.mark.parametrize(
    ("graph_limit", "kind"), [(10_000, "HNSW"), pytest.param(500, "IVF-PQ", marks=pytest.mark.slow)]
)
def test_large_indexes_are_searched_by_faiss_with_exact_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graph_limit: int, kind: str
) -> None:
    monkeypatch.setattr(module, "FLAT_LIMIT", 400)
    monkeypatch.setattr(module, "GRAPH_LIMIT", graph_limit)
    encoder, said = WordEncoder(), list[str]()
    index = PassageIndex(tmp_path, encoder, say=said.append)
    given = documents(1500)
    index.add(given)
    assert index.kind == kind and f"1,500 passages, {kind} is built" in said[0]
    vectors, hits = encoder.encode([d.text for d in given]), 0
    for number in range(20):
        query = f"own{number} w{number}"
        scores = vectors @ encoder.encode([query])[0]
        found = index.dense(query, 10)
        hits += len({f"d{place}" for place in np.argsort(-scores)[:10]} & set(texts(index, found)))
        for name, score in zip(texts(index, found), found.values(), strict=True):
            assert score == pytest.approx(float(scores[int(name[1:])]), abs=1e-5)
    assert hits >= 140  # of 200
    file = next(tmp_path.glob("near-*")).name
    index.add(documents(50, first=2000))  # too few to build anew: compared one by one
    assert next(tmp_path.glob("near-*")).name == file
    assert texts(index, index.dense(index.get("d2049")[0].text, 1)) == ["d2049"]
    assert texts(opened(tmp_path, encoder), index.dense(index.get("d2049")[0].text, 1)) == ["d2049"]
    index.add(documents(400, first=3000))
    assert next(tmp_path.glob("near-*")).name == file.replace("1500", "1950")


def test_long_documents_are_cut_and_found_by_their_part(tmp_path: Path) -> None:
    long = " ".join(f"Sentence {n} is about thing{n} and more." for n in range(40))
    index = opened(tmp_path, chunking=Chunking(max_tokens=40, overlap=0))
    index.add([Document("long", long, "Title"), Document("short", "Little.")])
    (passage,) = index.passages(list(index.lexical("thing20", 1))).values()
    assert "thing20" in passage.text and passage.id == f"long#{passage.chunk + 1}"
    assert passage.read == f"Title {passage.text}"
    assert " ".join(part.text for part in index.get("long")) == long and index.get("short")[0].id == "short"
    other = opened(tmp_path, chunking=Chunking(max_tokens=80, overlap=0))
    assert other.add([Document("long", long, "Title")]).updated == 1  # cut in another way now
    assert max(len(part.text) for part in other.get("long")) > 2 * len(passage.text) - 60


def test_an_index_of_another_model_is_refused(tmp_path: Path) -> None:
    opened(tmp_path).add(documents(3))
    with pytest.raises(UserError, match=r"vectors are of words \(words\), the retriever is other"):
        opened(tmp_path, WordEncoder("other"))
    with pytest.raises(UserError, match="retriever is none"):
        PassageIndex(tmp_path, None, say=lambda _: None)


def test_without_an_encoder_there_is_bm25_alone(tmp_path: Path) -> None:
    index = PassageIndex(tmp_path, None, say=lambda _: None)
    index.add(documents(10))
    assert texts(index, index.lexical("own4", 3)) == ["d4"] and index.kind == "none"
    assert not list(tmp_path.glob("*.f32"))
    with pytest.raises(UserError, match="has no vectors"):
        index.dense("own4", 3)


def crash(folder: Path, point: str, given: list[Document]) -> None:
    """Add documents, and die at a point of the work as a killed process does."""
    index = opened(folder)

    def die(*_: object) -> None:
        os._exit(9)

    if point == "after the vectors":
        append = index._append

        def then_die(first: int, vectors: np.ndarray) -> None:
            append(first, vectors)
            die()

        index._append = then_die  # type: ignore[method-assign]
    elif point == "inside the transaction":
        module._bump = die  # type: ignore[assignment]
    elif point == "while tidying":
        index._tidy = die  # type: ignore[method-assign]
    index.add(given)


@pytest.mark.parametrize(
    ("point", "kept"),
    [("after the vectors", False), ("inside the transaction", False), ("while tidying", True)],
)
def test_a_crash_in_the_middle_of_an_add_loses_nothing(tmp_path: Path, point: str, kept: bool) -> None:
    opened(tmp_path).add(documents(50))
    more = documents(30, seed=1, first=50)
    process = multiprocessing.get_context("spawn").Process(target=crash, args=(tmp_path, point, more))
    process.start()
    process.join()
    assert process.exitcode == 9
    index = opened(tmp_path)
    assert index.size == (80 if kept else 50)
    index.verify()
    assert texts(index, index.dense(documents(50)[49].text, 1)) == ["d49"]
    assert index.add(more).added == (0 if kept else 30)  # the same call goes on
    index.verify()
    assert index.size == 80 and texts(index, index.dense(more[29].text, 1)) == ["d79"]


def test_a_full_disk_leaves_the_version_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = opened(tmp_path)
    index.add(documents(20))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device.*committed before is kept"):
        index.add(documents(5, first=100))
    monkeypatch.undo()
    assert index.size == 20
    index.verify()
    assert index.add(documents(5, first=100)).added == 5
    index.verify()


def _truncate(folder: Path) -> None:
    with open(next(folder.glob("*.f32")), "r+b") as file:
        file.truncate(100)


def _overwrite(folder: Path) -> None:
    for name in ("index.sqlite-wal", "index.sqlite-shm"):
        (folder / name).unlink(missing_ok=True)
    (folder / "index.sqlite").write_bytes(b"not a database at all" * 300)


@pytest.mark.parametrize(
    ("damage", "message"), [(_truncate, "holds 100 bytes of"), (_overwrite, "broken index")]
)
def test_a_damaged_index_is_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    opened(tmp_path / "whole").add(documents(20))
    shutil.copytree(tmp_path / "whole", tmp_path / "copy")
    damage(tmp_path / "copy")
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "copy").lexical("w1", 3)


def test_verify_sees_a_changed_byte(tmp_path: Path) -> None:
    index = opened(tmp_path)
    index.add(documents(20))
    with open(next(tmp_path.glob("*.f32")), "r+b") as file:
        file.seek(200)
        file.write(b"\x01\x02")
    with pytest.raises(UserError, match="rows 0 to 19 have changed"):
        index.verify()


def test_another_process_sees_the_change(tmp_path: Path) -> None:
    reader, writer = opened(tmp_path), opened(tmp_path)
    writer.add(documents(10))
    assert reader.size == 10 and texts(reader, reader.lexical("own3", 1)) == ["d3"]
    writer.delete(["d3"])
    assert texts(reader, reader.lexical("own3", 1)) == []


def test_threads_search_while_others_change(tmp_path: Path) -> None:
    index = opened(tmp_path)
    index.add(documents(100))
    wrong: list[object] = []
    done = threading.Event()

    def search() -> None:
        while not done.is_set():
            try:
                for query in ("own42", "own43"):
                    if texts(index, index.lexical(query, 1)) != [f"d{query[3:]}"]:
                        wrong.append(query)
                index.dense("own42 w1", 10)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for step in range(8):
        index.add(documents(40, first=1000 + 40 * step))
        index.delete([f"d{number}" for number in range(1000 + 40 * step, 1040 + 40 * step)])
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == [] and index.size == 100
    index.verify()
