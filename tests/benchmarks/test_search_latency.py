"""The search benchmark runs, on a tiny world, and records both comparisons."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import search_latency
from tests.rerankers import reranker
from tests.tiny import build


@pytest.mark.slow
def test_quick_mode_records_int8_beside_fp32_and_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime", reason="install the extra `serve`")
    world, model = build(tmp_path / "world"), reranker(tmp_path, 0)
    command = ["search_latency.py", "--quick", "--results", str(tmp_path), "--model", str(model)]
    command += ["--data", str(world.data), "--split", "train", "--encoder", str(world.base)]
    monkeypatch.setattr(sys, "argv", [*command, "--cut", "32", "--target", "1000"])
    search_latency.main()
    (file,) = tmp_path.glob("search_latency_*.cpu.json")
    stored = json.loads(file.read_text())
    assert [row["peer_name"] for row in stored["rows"]] == ["ours, fp32", "target"]
    first = stored["rows"][0]
    times = first["milliseconds"]["ours"]
    assert 0 < times["rerank"]["p50"] < times["total"]["p50"] and 0 <= first["nDCG@10"]["peer"] <= 1
    assert stored["workload"]["documents"] == 60 and first["index"]["megabytes"] > 0
    shown = capsys.readouterr().out
    assert "60 documents indexed in" in shown and "int8" in shown


def test_the_curves_hold_the_asked_point_once() -> None:
    options = search_latency._options(["--model", "x", "--depths", "50", "100", "--cuts", "192", "64"])
    assert search_latency.wanted(options)[:3] == [("fp32", 50, 192), ("fp32", 100, 192), ("fp32", 50, 64)]
    assert len(search_latency.wanted(options)) == 6
