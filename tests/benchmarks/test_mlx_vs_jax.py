"""The benchmark of the two backends runs, on a tiny world, and records its row."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import mlx_vs_jax
from benchmarks.reranker_training import speed_options
from common.errors import UserError
from tests.tiny import build


def test_quick_mode_records_steps_per_second_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlx.core", reason="needs MLX: install the extra `mlx`")
    world = build(tmp_path / "world")
    monkeypatch.setenv("RESONANCE_CACHE", str(tmp_path / "cache"))
    command = ["mlx_vs_jax.py", "--quick", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--data", str(world.data), "--base", str(world.base)])
    mlx_vs_jax.main()
    stored = json.loads((tmp_path / "mlx_vs_jax.cpu.json").read_text())
    (row,) = stored["rows"]
    assert row["what"].startswith("training, MLX with") and row["unit"] == "steps/s"
    assert row["ratio"] == pytest.approx(row["ours"] / row["peer"])
    assert stored["workload"]["pairs_per_step"] == 16
    assert 0 < stored["workload"]["tokens_per_step"] <= stored["workload"]["padded_tokens_per_step"]


def test_flags_out_of_range_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(UserError, match="--list-size is 1; allowed: >= 2; --repetitions is 0; allowed: >= 1"):
        speed_options("", ["--list-size", "1", "--repetitions", "0", "--data", "./nowhere"])
