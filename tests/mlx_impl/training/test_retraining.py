"""Retraining in MLX a checkpoint that JAX trained: what it keeps of the original, what it computes once."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="needs MLX: install the extra `mlx`")

from common.checkpoint import read_json
from common.errors import UserError
from mlx_impl.scoring import MlxOriginal, load_scorer
from mlx_impl.training import loop
from tests.jax_impl.training.test_retraining import FILES, Domains, domains, train_lines
from tests.tiny import World, train

__all__ = ["domains"]  # the fixture
TERMS = {"preserve", "preserve_query", "preserve_passage"}


def old_scores(directory: Path, world: World) -> np.ndarray:
    """Scores of old queries with each passage of their topic, [queries, 6], less the mean of a query."""
    rows = [json.loads(line) for line in world.data.read_text().splitlines()]
    pairs = [
        (a["query"], b["positive"]) for n, a in enumerate(rows) for b in rows[n // 6 * 6 : n // 6 * 6 + 6]
    ]
    scores = load_scorer(directory).score(*map(list, zip(*pairs, strict=True))).score.reshape(-1, 6)
    return scores - scores.mean(axis=1, keepdims=True)


def test_preserving_moves_the_old_domain_s_scores_less(domains: Domains, tmp_path: Path) -> None:
    moved = {}
    before = old_scores(domains.base, domains.world)
    for name, config in (("free", domains.config()), ("kept", domains.kept)):
        train(config, tmp_path / name, backend="mlx")
        after = old_scores(tmp_path / name / "retrained" / "final", domains.world)
        moved[name] = float(np.abs(after - before).mean())
    assert 0.01 < moved["kept"] < 0.5 * moved["free"]
    kept, free = train_lines(tmp_path / "kept"), train_lines(tmp_path / "free")
    assert set(kept[0]) >= TERMS and not TERMS & set(free[0])
    for term in TERMS:  # nothing to preserve before the first step
        assert kept[0][term] == pytest.approx(0.0, abs=1e-4) and kept[-1][term] > 1e-5


def test_an_interrupted_retraining_ends_in_the_same_bits_and_scores_the_original_once(
    domains: Domains, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESONANCE_CACHE", str(tmp_path / "cache"))
    scored: list[int] = []
    outputs, make = MlxOriginal.outputs, loop.make_step

    def counted(self: MlxOriginal, encodeds: Any, on_batch: Any = None) -> np.ndarray:
        scored.append(len(encodeds))
        return outputs(self, encodeds, on_batch)

    def broken(*arguments: Any) -> Any:
        step, state = make(*arguments), arguments[1]

        def run(*inputs: Any) -> Any:
            if int(state.step) == 10:
                raise KeyboardInterrupt
            return step(*inputs)

        return run

    monkeypatch.setattr(MlxOriginal, "outputs", counted)
    train(domains.kept, tmp_path / "whole", backend="mlx")
    assert sum(scored) > 0
    scored.clear()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_step", broken)
        with pytest.raises(KeyboardInterrupt):
            train(domains.kept, tmp_path / "cut", backend="mlx")
    said: list[str] = []
    train(domains.kept, tmp_path / "cut", say=said.append, backend="mlx")
    assert "resumed at step 8 of 24" in said and scored == []
    for file in FILES:
        ours, expected = (tmp_path / name / "retrained" / "final" / file for name in ("cut", "whole"))
        assert ours.read_bytes() == expected.read_bytes()
    assert train_lines(tmp_path / "cut") == train_lines(tmp_path / "whole")


def test_a_base_that_changed_under_an_interrupted_retraining_is_refused(
    domains: Domains, tmp_path: Path
) -> None:
    base = shutil.copytree(domains.base, tmp_path / "base")
    config = domains.config(preserve_knowledge=1.0)
    config = replace(
        config,
        model=replace(config.model, base=str(base)),
        train=replace(config.train, max_steps=2, evaluations=1),
    )
    train(config, tmp_path, backend="mlx")
    settings = read_json(base / "config.json")
    (base / "config.json").write_text(json.dumps(settings | {"changed": True}))
    with pytest.raises(UserError, match=r"has changed since this run began(?s:.*)start over with --fresh"):
        train(config, tmp_path, backend="mlx")
