"""The speed benchmark runs, on a tiny world, and records every row."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import reranker_training
from tests.tiny import build


@pytest.mark.slow
def test_quick_mode_records_training_and_scoring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sentence_transformers", reason="the peer: install the extra `peers`")
    world = build(tmp_path / "world")
    monkeypatch.setenv("RESONANCE_CACHE", str(tmp_path / "cache"))
    command = ["reranker_training.py", "--quick", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--data", str(world.data), "--base", str(world.base)])
    reranker_training.main()
    stored = json.loads(next(tmp_path.glob("reranker_training.*.json")).read_text())
    assert [row["what"].split(",")[0] for row in stored["rows"]] == ["training", "training", "scoring"]
    assert all(row["ratio"] > 0 and row["unit"] == "real tokens/s" for row in stored["rows"])
    assert stored["workload"]["pairs"] == 16
    assert 16 * 4 < stored["workload"]["real_tokens"] < 16 * 64
