"""Writing an export: it takes its place only when it ranks as well as its source."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from common.data.records import RankingData
from common.errors import UserError
from common.export.verification import (
    Exported,
    Measured,
    Verification,
    calibration_pairs,
    compare,
    export_table,
    measure,
    write_export,
)
from common.report import tables_text

DATA = RankingData(
    "made up",
    corpus={f"p{n}": f"passage {n}" for n in range(6)},
    queries={"q1": "one", "q2": "two"},
    qrels={"test": {"q1": {"p0": 1}, "q2": {"p4": 1}}},
)
STAGE = {query: {f"p{n}": float(6 - n) for n in range(6)} for query in DATA.queries}


def measured(folder: Path, best: dict[str, int], shift: float = 0.0) -> Measured:
    def judge(query: str, passages: list[str]) -> np.ndarray:
        wanted = f"passage {best[query]}"
        return np.asarray([shift + (text == wanted) for text in passages], np.float32)

    (folder / "model.onnx").parent.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(b"x" * 3000)
    return measure(judge, folder, DATA, STAGE, DATA.qrels["test"])


EXPORTED = Exported(b"model", {"onnx": {"kind": "cross-encoder"}}, lambda folder: None, {"layer": 0.01})


def verification(tmp_path: Path, export: dict[str, int]) -> Verification:
    right = {"one": 0, "two": 4}
    return compare(measured(tmp_path / "a", right), measured(tmp_path / "b", export, shift=0.25))


def test_a_model_is_measured_over_its_candidates(tmp_path: Path) -> None:
    found = measured(tmp_path, {"one": 0, "two": 4})
    assert found.ndcg == 1.0 and found.megabytes == 0.003 and found.scores["q2"]["p4"] == 1.0
    assert 0 <= found.milliseconds["p50"] <= found.milliseconds["p95"] <= found.milliseconds["p99"]
    assert found.pairs_per_second > 0


def test_an_export_is_compared_pair_by_pair(tmp_path: Path) -> None:
    same = verification(tmp_path, {"one": 0, "two": 4})
    assert (same.queries, same.pairs, same.loss) == (2, 12, 0.0)
    assert same.difference == {"largest": 0.25, "mean": 0.25}
    worse = verification(tmp_path, {"one": 0, "two": 0})
    assert worse.difference["largest"] == 1.25 and worse.loss > 0.2
    text = tables_text([export_table("mine", {"int8": worse})])
    for part in ("mine (source)", "onnx int8", "nDCG@10", "loss %", "p99", "2 queries, 12 pairs"):
        assert part in text


def test_a_good_export_is_written_with_its_report(tmp_path: Path) -> None:
    good = verification(tmp_path, {"one": 0, "two": 4})
    seen: list[bytes] = []

    def verify(folder: Path) -> Verification:
        seen.append((folder / "model.onnx").read_bytes())
        return good

    write_export(tmp_path / "out", EXPORTED, verify, 0.005, force=False)
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    assert seen == [b"model"] and report["kind"] == "cross-encoder" and report["forced"] is False
    assert report["verification"]["export"]["ndcg"] == 1.0 and report["quantization_error"] == {"layer": 0.01}
    assert "scores" not in report["verification"]["source"]


def test_a_bad_export_is_refused_and_the_one_before_stays_unless_forced(tmp_path: Path) -> None:
    good, bad = (verification(tmp_path, best) for best in ({"one": 0, "two": 4}, {"one": 1, "two": 0}))
    write_export(tmp_path / "out", EXPORTED, lambda _: good, 0.005, force=False)
    before = (tmp_path / "out" / "export.json").read_bytes()
    with pytest.raises(UserError, match=r"ranks worse than its source: nDCG@10 .* or --force it"):
        write_export(tmp_path / "out", EXPORTED, lambda _: bad, 0.005, force=False)
    assert (tmp_path / "out" / "export.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]
    write_export(tmp_path / "out", EXPORTED, lambda _: bad, 0.005, force=True)
    assert json.loads((tmp_path / "out" / "export.json").read_text())["forced"] is True


def test_a_folder_that_is_no_export_is_never_replaced(tmp_path: Path) -> None:
    good = verification(tmp_path, {"one": 0, "two": 4})
    with pytest.raises(UserError, match="it is not replaced"):
        write_export(tmp_path / "a", EXPORTED, lambda _: good, 0.005, force=True)


@pytest.mark.parametrize("size", [1, 3, 4, 7, 10])
def test_calibration_takes_passages_from_all_over_the_corpus(size: int) -> None:
    corpus = {f"p{n}": f"text {n}" for n in range(size)}
    pairs = calibration_pairs(corpus, count=4)
    places = [int(text.split()[1]) for _, text in pairs]
    assert 1 <= len(set(places)) == len(pairs) <= 4
    assert places[0] == 0 and size - places[-1] <= -(-size // 4)  # the last stretch has one too
    assert calibration_pairs({}) == []
