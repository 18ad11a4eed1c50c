"""The serving benchmark runs, on a tiny world, and records every row."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import rerank_serving
from tests.rerankers import reranker
from tests.tiny import build


@pytest.mark.slow
def test_quick_mode_records_every_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sentence_transformers", reason="the peer: install the extra `peers`")
    pytest.importorskip("flashrank", reason="another peer: install the extra `peers`")
    world = build(tmp_path / "world")
    model = reranker(tmp_path, 0)
    command = ["rerank_serving.py", "--quick", "--results", str(tmp_path), "--model", str(model)]
    monkeypatch.setattr(sys, "argv", [*command, "--data", str(world.data)])
    rerank_serving.main()
    stored = json.loads((tmp_path / "rerank_serving.cpu.json").read_text())
    assert [(row["what"], row["peer_name"].partition(",")[0]) for row in stored["rows"]] == [
        ("fp32", "sentence-transformers on torch"),
        ("fp32", "sentence-transformers over onnxruntime"),
        ("fp32", "FlashRank"),
        ("INT8", "sentence-transformers over onnxruntime"),
        ("INT8", "FlashRank"),
        ("INT8 beside bf16", "sentence-transformers on torch"),
        ("INT8 beside our fp32", "ours"),
    ]
    assert all(row["ratio"] > 0 and row["unit"] == "real tokens/s" for row in stored["rows"])
    for row in stored["rows"][:3]:  # the same weights: the same scores
        assert row["largest_difference_to_fp32"]["peer"] < 1e-3
    assert stored["workload"]["queries"] == 2 and stored["workload"]["pairs"] == 10
