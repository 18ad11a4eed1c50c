"""The growth benchmark measures a small index, and its recall is that of another order where it should be."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import index_growth
from common.retrieval import index as module
from tests.tiny import World


def vectors(count: int, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=(count, 16)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def test_flat_search_has_all() -> None:
    encoder = index_growth.Multiplied(vectors(40, 0), vectors(10, 1))
    row = index_growth.measured(encoder, 600)
    assert row["index"]["recall"] == 1.0 and row["index"]["kind"] == "flat" and row["unit"] == "milliseconds"
    near = encoder.encode(["3", "43", "4"]) @ encoder.encode(["3"])[0]
    assert 0.9 < near[1] < 1.0 and near[2] < 0.9  # clusters remain


@pytest.mark.slow
def test_a_coarse_index_has_less(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = index_growth.Multiplied(vectors(40, 0), vectors(10, 1))
    monkeypatch.setattr(module, "FLAT_LIMIT", 100)
    monkeypatch.setattr(module, "GRAPH_LIMIT", 200)
    monkeypatch.setattr(module, "_WIDE", 1)
    monkeypatch.setitem(module._EFFORT, "IVF-PQ", ("nprobe", 2))
    coarse = index_growth.measured(encoder, 1500)["index"]
    assert coarse["kind"] == "IVF-PQ" and coarse["recall"] < 1.0 and coarse["megabytes_on_disk"] > 0


@pytest.mark.slow
def test_the_command_records_each_size(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["index_growth.py", "--sizes", "100", "200", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--data", str(world.data), "--encoder", str(world.base)])
    index_growth.main()
    rows = json.loads((tmp_path / "index_growth.cpu.json").read_text())["rows"]
    assert [row["index"]["passages"] for row in rows] == [100, 200]
