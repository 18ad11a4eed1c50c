"""Fine-tuning a language model on a task file: which rows, what counts, and what is refused, in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.checkpoint import to_json
from common.config import load_recipe
from common.data.language import Streams, WholeRows
from common.errors import UserError
from common.language.architectures import DecoderConfig, InfinitoConfig, language_config
from common.language.config import FineTuneRecipe, LanguageDataConfig
from common.language.prepare import PreparedLanguage, plan_language, prepare_language, with_base
from common.language.text import LanguageTokenizer, train_bpe
from common.language.training import model_settings
from tests.tiny_language import SIZES, finetune_recipe, write_tasks

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESONANCE_CACHE", str(tmp_path / "cache"))


def base_directory(folder: Path, config: Any) -> Path:
    """A checkpoint's settings and tokenizer: all that is read before training begins."""
    folder.mkdir()
    (folder / "config.json").write_bytes(to_json(config if isinstance(config, dict) else config.to_dict()))
    (folder / "model.safetensors").write_bytes(b"")
    words = ["### Instruction:\nName the thing of Ada.\n\n### Response:\nthe red kite"] * 4
    LanguageTokenizer(train_bpe(words, 512), name="tiny").save(folder)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    config = DecoderConfig(**SIZES, vocab_size=512, max_position_embeddings=64)
    return base_directory(tmp_path / "base", config)


def prepared(recipe: FineTuneRecipe) -> tuple[FineTuneRecipe, PreparedLanguage]:
    full = with_base(recipe.validate())
    assert isinstance(full, FineTuneRecipe)
    return full, prepare_language(full, say=lambda _: None)


def test_a_row_is_a_prompt_an_answer_that_counts_and_an_end_that_is_learned(
    base: Path, tmp_path: Path
) -> None:
    data = write_tasks(tmp_path / "tasks.jsonl")
    recipe, ready = prepared(finetune_recipe(data, base))
    assert recipe.model == language_config(json.loads((base / "config.json").read_text()), base)
    plan = plan_language(recipe, ready)
    assert isinstance(plan, WholeRows)
    batch, end = plan.batch(0), ready.tokenizer.end
    for inputs, labels, mask in zip(batch.input_ids[:, 0], batch.labels[:, 0], batch.mask[:, 0], strict=True):
        assert inputs[0] == end
        answer = labels[mask]
        assert answer[-1] == end and ready.tokenizer.decode(answer).startswith("the ")
        shown = ready.tokenizer.decode(inputs[1 : np.flatnonzero(mask)[0] + 1])
        assert shown.startswith("### Instruction:\n") and shown.endswith("### Response:\n")


def test_longer_rows_than_the_context_stop_or_are_left_out(base: Path, tmp_path: Path) -> None:
    data = write_tasks(tmp_path / "tasks.jsonl", extra=[{"instruction": "Count. " * 80, "output": "one"}] * 2)
    recipe, ready = prepared(finetune_recipe(data, base))
    with pytest.raises(
        UserError, match=r"longer than the context of 64 tokens:\s+\d+ tokens: '### Instr"
    ) as error:
        plan_language(recipe, ready)
    assert "--on-long-row skip" in str(error.value)
    said: list[str] = []
    plan = plan_language(recipe.changed(on_long_row="skip"), ready, said.append)
    assert isinstance(plan, WholeRows)
    assert plan.documents.lengths().max() < 64 and said[0].endswith("tokens: left out")


def test_infinito_reads_rows_of_any_length_with_its_memory(tmp_path: Path) -> None:
    sizes = InfinitoConfig(**SIZES, vocab_size=512, context=16, memory_slots=4, memory_writes=2)
    base = base_directory(tmp_path / "infinito", sizes)
    recipe, ready = prepared(finetune_recipe(write_tasks(tmp_path / "tasks.jsonl"), base))
    assert isinstance(plan_language(recipe, ready), Streams)


def test_running_text_among_the_rows_and_rows_without_output_are_refused(base: Path, tmp_path: Path) -> None:
    text = write_tasks(tmp_path / "text.jsonl", extra=[{"text": f"Just text {i}."} for i in range(90)])
    with pytest.raises(UserError, match=r"rows have text, but no prompt with an answer:\s+'Just text"):
        prepared(finetune_recipe(text, base))
    whole = finetune_recipe(text, base).changed(data={"mask_prompt": False})
    assert prepared(whole)[1].split("train").counted.all()
    missing = write_tasks(tmp_path / "missing.jsonl", extra=[{"instruction": "Say it.", "output": " "}])
    with pytest.raises(UserError, match=r"missing\.jsonl:41: 'output' is empty"):
        prepared(finetune_recipe(missing, base))


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (
            {"model_type": "mamba"},
            {},
            r"model_type is 'mamba'; language models: llama, qwen3, indra, infinito",
        ),
        (None, {"context": 65}, "has a context of 64 tokens, --context asks for 65"),
        (None, {"context": 4}, r"context is 4; allowed: >= 8"),
        (None, {"base": None}, "base is None; allowed: a checkpoint or run to begin with"),
        (None, {"base": "/nowhere"}, "Name a checkpoint directory or a run of configs"),
        (None, {"train": {"best": "score"}}, "train.best is 'score'; allowed: perplexity: nothing is scored"),
        (None, {"lora": {"rank": -1}}, "lora.rank is -1; allowed: >= 0"),
    ],
)
def test_what_cannot_be_fine_tuned_is_told(
    config: dict[str, Any] | None, changes: dict[str, Any], message: str, base: Path, tmp_path: Path
) -> None:
    begins = base if config is None else base_directory(tmp_path / "other", config)
    with pytest.raises(UserError, match=message):
        with_base(finetune_recipe(tmp_path / "tasks.jsonl", begins).changed(**changes).validate())


def test_a_base_with_fewer_tokens_than_its_tokenizer_is_refused(tmp_path: Path) -> None:
    base = base_directory(
        tmp_path / "base", DecoderConfig(**SIZES, vocab_size=100, max_position_embeddings=64)
    )
    recipe, ready = prepared(finetune_recipe(write_tasks(tmp_path / "tasks.jsonl"), base))
    with pytest.raises(UserError, match=r"has 100 tokens, its tokenizer \d+: they differ"):
        model_settings(recipe, ready, base)


def test_adapters_need_a_base_and_the_recipe_in_configs_asks_for_one() -> None:
    recipe = load_recipe(str(ROOT / "configs" / "finetune.py"), "lora")
    assert recipe.validate().lora.rank == 16
    with pytest.raises(UserError, match=r"lora\.rank is 16; allowed: 0 without a --base that rests"):
        recipe.changed(base=None).validate()
    assert not recipe.lora.learns(("model", "norm", "weight")) and recipe.lora.learns(("q_proj", "lora_a"))
    assert LanguageDataConfig().mask_prompt is False
