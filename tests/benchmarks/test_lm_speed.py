"""The speed benchmarks of language models run at toy size and record what they measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import lm_generation, lm_training
from tests.tiny_language import write_corpus


def stored(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.cpu.json").read_text())
    return found


@pytest.mark.slow
def test_training_speed_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="the peer: install the extra `peers`")
    monkeypatch.setenv("RESONANCE_CACHE", str(tmp_path / "cache"))
    corpus = write_corpus(tmp_path / "corpus.txt")
    words = ["--quick", "--models", "infinito", "--data", str(corpus), "--results", str(tmp_path)]
    lm_training.main(words)
    (row,) = stored(tmp_path, "lm_training")["rows"]
    assert (
        row["what"] == "training, infinito"
        and row["unit"] == "tokens/s"
        and row["peer_name"] == "PyTorch GPT"
    )
    assert row["ours"] > 0 and row["peer"] > 0 and row["cpu_ratio"] > 0


def test_the_peer_has_as_many_parameters_as_is_said() -> None:
    pytest.importorskip("torch", reason="the peer: install the extra `peers`")
    shape = lm_training.Shape(50, 16, 2, 2, 48, 8, 0.1, 1e-3)
    model = lm_training.gpt(shape)
    assert sum(p.numel() for p in model.parameters()) == lm_training.parameter_count(shape)


@pytest.mark.slow
def test_generation_speed_is_recorded_for_equal_tokens(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the peer: install the extra `peers`")
    lm_generation.main(["--quick", "--batch", "1", "2", "--results", str(tmp_path)])
    rows = stored(tmp_path, "lm_generation")["rows"]
    assert [row["what"] for row in rows] == ["greedy generation, batch 1", "greedy generation, batch 2"]
    # greedy choices of random weights: a tie may break either way
    assert all(row["equal_tokens"] > 0.8 and row["ratio"] > 0 for row in rows)
