"""A benchmark's results: continued, never mixed with another workload, ratios that read the same way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.record import Record, compared, short_name
from common.errors import UserError

WORKLOAD = {"lists": 3, "lengths": (32, 64)}


def record(folder: Path, workload: dict = WORKLOAD) -> Record:
    return Record("speed", workload, device="cpu", folder=folder)


def test_a_benchmark_that_goes_on_keeps_its_rows_and_measures_only_the_others(tmp_path: Path) -> None:
    record(tmp_path).add(compared("training", [2.0, 4.0, 3.0], [1.0], "torch", "pairs/s"))
    again = record(tmp_path)
    assert again.has("training", "torch") and not again.has("training", "other")
    again.add(compared("training", [9.0], [1.0], "torch", "pairs/s"))
    again.add(compared("scoring", [1.0], [1.0], "torch", "pairs/s"))
    assert [(row["what"], row["ours"]) for row in again.rows] == [("training", 3.0), ("scoring", 1.0)]
    again.add(compared("training", [9.0], [1.0], "torch", "pairs/s"), replace=True)
    stored = json.loads((tmp_path / "speed.cpu.json").read_text())
    assert [(row["what"], row["ours"]) for row in stored["rows"]] == [("training", 9.0), ("scoring", 1.0)]
    assert {"name", "command", "commit", "device", "versions", "workload", "rows"} <= stored.keys()


def test_a_ratio_above_one_is_ours_better_whatever_the_unit() -> None:
    assert compared("a", [4.0], [2.0], "p", "pairs/s")["ratio"] == 2
    row = compared("a", [1.0, 2.0, 6.0], [4.0], "p", "seconds", higher_is_better=False)
    assert row["ratio"] == 2 and row["runs"]["spread"] == {"ours": 2.5, "peer": 0.0}


def test_rows_of_another_workload_are_refused(tmp_path: Path) -> None:
    record(tmp_path).add(compared("a", [1.0], [1.0], "p", "s"))
    with pytest.raises(UserError, match=r"another workload.*Move the file away"):
        record(tmp_path, {"lists": 4})


@pytest.mark.parametrize(
    ("kind", "short"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-sxm4-40gb"),
    ],
)
def test_a_device_is_named_without_its_memory(kind: str, short: str) -> None:
    assert short_name(kind) == short
