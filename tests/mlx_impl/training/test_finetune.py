"""Fine-tuning with MLX: adapters learn and the base rests, and an interrupted run ends as another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.checkpoint import read_tensors
from common.config import to_dict
from common.data.language import LanguageBatch
from common.language.architectures import DecoderConfig
from common.language.text import LanguageTokenizer, train_bpe
from common.language.workflow import prepare
from common.runs import RunFolder
from tests.tiny_language import SIZES, finetune_recipe, write_tasks

pytest.importorskip("mlx.core")

from mlx_impl.generation import load_engine
from mlx_impl.language import build_language_model, save_language_model
from mlx_impl.training.language import LanguageTrainer


class Interrupted(LanguageTrainer):
    """Gets Ctrl-C in its fourth step."""

    def _one_step(self, step: int, batch: LanguageBatch) -> Any:
        if self._steps_done() == 3:
            import signal

            signal.raise_signal(signal.SIGINT)
        return super()._one_step(step, batch)


def train(config: Any, runs: Path, kind: Any = LanguageTrainer) -> tuple[LanguageTrainer, Path]:
    recipe, prepared = prepare(config.validate(), say=lambda _: None)
    trainer = kind(recipe, prepared, say=lambda _: None)
    with RunFolder.create(runs, recipe.name, to_dict(recipe)) as folder:
        trainer.run(folder)
    return trainer, folder.path


def first_logits(engine: Any) -> np.ndarray:
    state = engine.start(1, 8)
    return engine.read(state, np.array([[5, 6, 7]], np.int32), np.array([3], np.int32))[1]


def test_adapters_learn_the_base_rests_and_an_interrupted_run_ends_as_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESONANCE_CACHE", str(tmp_path / "cache"))
    size = DecoderConfig(**SIZES, vocab_size=512, max_position_embeddings=96)
    tokenizer = LanguageTokenizer(train_bpe(["### Instruction: Name the thing ### Response:"], 512), name="t")
    model, base = build_language_model(size, seed=1), tmp_path / "base"
    save_language_model(base, model, size, training={}, tokenizer_save=tokenizer.save, card="")
    data = write_tasks(tmp_path / "tasks.jsonl")
    lora = {"rank": 2, "alpha": 4.0, "targets": ("q_proj", "up_proj")}
    config = finetune_recipe(data, base, average=0.9).changed(lora=lora)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "resumed", Interrupted)
    trainer, folder = train(config, tmp_path / "resumed")
    _, other = train(config, tmp_path / "whole")
    before, weights, again = (read_tensors(path) for path in (base, folder / "final", other / "final"))
    assert all(np.array_equal(weights[name], again[name]) for name in before)
    changed = {name for name in before if not np.array_equal(weights[name], before[name])}
    assert changed == {name for name in before if "q_proj" in name or "up_proj" in name}
    # what generates during training is what is written: the running mean of the weights
    written = first_logits(load_engine(folder / "final"))
    np.testing.assert_allclose(first_logits(trainer.engine()), written, rtol=0, atol=1e-5)
