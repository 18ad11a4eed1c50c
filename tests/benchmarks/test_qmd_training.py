"""The benchmark of SFT and GRPO runs at a tiny size and records its rows beside both peers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from benchmarks import qmd_training
from common.errors import UserError


@pytest.mark.slow
def test_quick_mode_records_rates_and_memory_of_both_sides(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm", reason="needs MLX and mlx-lm: install the extra `mlx`")
    grpo = importlib.util.find_spec("mlx_lm_lora") is not None
    qmd_training.main(["--quick", "--results", str(tmp_path), *([] if grpo else ["--no-grpo"])])
    stored = json.loads((tmp_path / "qmd_training.cpu.json").read_text())
    rows = {row["what"]: row for row in stored["rows"]}
    expected = {
        f"SFT, {kind}{what}" for kind in ("length buckets", "packed") for what in ("", ": peak memory")
    }
    assert rows.keys() == expected | ({"GRPO", "GRPO: peak memory"} if grpo else set())
    for what, row in rows.items():
        memory = what.endswith("memory")
        assert row["unit"] == ("MB" if memory else "completions/s" if what == "GRPO" else "target tokens/s")
        better = row["peer"] / row["ours"] if memory else row["ours"] / row["peer"]
        assert row["ratio"] == pytest.approx(better) and row["ours"] > 0


def test_a_missing_peer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"mlx-lm-lora is not installed; .*--no-grpo"):
        qmd_training.parse([])
    assert qmd_training.parse(["--no-grpo", "--quick"]).repetitions == 1
