"""Training a language model with MLX: an interrupted run ends as if it had not been; JAX reads the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.checkpoint import read_tensors
from common.config import to_dict
from common.data.language import LanguageBatch
from common.language.evaluation import evaluate_perplexity
from common.language.prepare import prepare_language
from common.runs import RunFolder
from tests.tiny_language import recipe, write_articles

pytest.importorskip("mlx.core")

from mlx_impl.training.language import LanguageTrainer


class Interrupted(LanguageTrainer):
    """Gets Ctrl-C in its fifth step."""

    def _one_step(self, step: int, batch: LanguageBatch) -> Any:
        if self._steps_done() == 4:
            import signal

            signal.raise_signal(signal.SIGINT)
        return super()._one_step(step, batch)


def train(config: Any, runs: Path, trainer: Any = LanguageTrainer) -> tuple[dict[str, Any], Path]:
    prepared = prepare_language(config, say=lambda _: None)
    with RunFolder.create(runs, config.name, to_dict(config)) as folder:
        return trainer(config, prepared, say=lambda _: None).run(folder), folder.path


@pytest.mark.parametrize("kind", ["decoder", "indra", "infinito"])
def test_an_interrupted_run_ends_as_if_it_had_not_been_and_jax_reads_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jax_impl.language_scoring import load_segment_scorer

    monkeypatch.setenv("RESONANCE_CACHE", str(tmp_path / "cache"))
    config = recipe(kind, write_articles(tmp_path / "articles"), average=0.9)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "resumed", Interrupted)
    resumed, folder = train(config, tmp_path / "resumed")
    whole, other = train(config, tmp_path / "whole")
    assert resumed["steps"] == whole["steps"] == 8
    weights, expected = read_tensors(folder / "final"), read_tensors(other / "final")
    assert all(np.array_equal(weights[key], expected[key]) for key in expected)
    prepared = prepare_language(config, say=lambda _: None)
    scorer = load_segment_scorer(folder / "best")
    cached = scorer.carries
    found = evaluate_perplexity(
        scorer, prepared.split("dev"), prepared.tokenizer.end, cache=cached, batch_size=2
    )
    assert found.perplexity.token == pytest.approx(resumed["best_dev"], rel=1e-4)
