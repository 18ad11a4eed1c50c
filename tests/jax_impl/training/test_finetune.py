"""Fine-tuning in JAX: adapters learn and the base rests, a kill changes nothing, Infinito reads long rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.checkpoint import read_tensors
from common.config import to_dict
from common.data.language import LanguageBatch
from common.errors import UserError
from common.language.architectures import DecoderConfig, IndraConfig, InfinitoConfig
from common.language.text import LanguageTokenizer, train_bpe
from common.language.workflow import prepare
from common.runs import RunFolder, read_metrics
from jax_impl.language import build_language_model, save_language_model
from jax_impl.training.language import LanguageTrainer
from tests.tiny_language import SIZES, finetune_recipe, write_tasks


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESONANCE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def write_base(folder: Path, config: Any) -> Path:
    """A random model of few tokens, and its tokenizer."""
    tokenizer = LanguageTokenizer(train_bpe(["### Instruction: Name the thing ### Response:"], 512), name="t")
    model = build_language_model(config, seed=1)
    save_language_model(folder, model, config, training={}, tokenizer_save=tokenizer.save, card="")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = DecoderConfig(**SIZES, vocab_size=512, max_position_embeddings=96)
    return write_base(tmp_path_factory.mktemp("models") / "base", config)


@pytest.fixture(scope="module")
def data(base: Path) -> Path:
    return write_tasks(base.parent / "tasks.jsonl")


def train(config: Any, runs: Path, trainer: Any = LanguageTrainer) -> tuple[dict[str, Any], Path]:
    recipe, prepared = prepare(config.validate(), say=lambda _: None)
    with RunFolder.create(runs, recipe.name, to_dict(recipe)) as folder:
        return trainer(recipe, prepared, say=lambda _: None).run(folder), folder.path


class Interrupted(LanguageTrainer):
    """Gets Ctrl-C in its fourth step."""

    def _one_step(self, step: int, batch: LanguageBatch) -> Any:
        if self._steps_done() == 3:
            import signal

            signal.raise_signal(signal.SIGINT)
        return super()._one_step(step, batch)


def test_adapters_learn_the_base_rests_and_an_interrupted_run_ends_as_another(
    base: Path, data: Path, tmp_path: Path
) -> None:
    config = finetune_recipe(data, base).changed(
        lora={"rank": 2, "alpha": 4.0, "targets": ("q_proj", "up_proj")}
    )
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "resumed", Interrupted)
    resumed, folder = train(config, tmp_path / "resumed")
    whole, other = train(config, tmp_path / "whole")
    assert resumed == whole and resumed["steps"] == 6
    before, weights = read_tensors(base), read_tensors(folder / "final")
    assert weights.keys() == before.keys()
    changed = {name for name in weights if not np.array_equal(weights[name], before[name])}
    assert changed == {name for name in before if "q_proj" in name or "up_proj" in name}
    again = read_tensors(other / "final")
    assert all(np.array_equal(weights[name], again[name]) for name in weights)
    assert (folder / "best" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    state = sum(file.stat().st_size for file in (folder / "state").rglob("*") if file.is_file())
    assert state < sum(value.nbytes for value in before.values())  # the base is not saved with each state


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(
            IndraConfig(**SIZES, vocab_size=512, context=96, complex_width=8), marks=pytest.mark.slow
        ),
        InfinitoConfig(**SIZES, vocab_size=512, context=16, memory_slots=4, memory_writes=2),
    ],
    ids=["indra", "infinito"],
)
def test_a_task_is_learned_by_the_other_models_too(config: Any, data: Path, tmp_path: Path) -> None:
    begins = write_base(tmp_path / "base", config)
    _, folder = train(finetune_recipe(data, begins, max_steps=20, evaluations=1), tmp_path)
    lines = [line["loss"] for line in read_metrics(folder) if line["kind"] == "train"]
    assert lines[-1] < lines[0] - 0.5


def test_a_target_that_names_no_layer_is_told(base: Path, data: Path, tmp_path: Path) -> None:
    config = finetune_recipe(data, base).changed(lora={"rank": 2, "targets": ("query",)})
    with pytest.raises(UserError, match=r"lora\.targets: LoRA targets \['query'\] name no linear layer"):
        train(config, tmp_path)
