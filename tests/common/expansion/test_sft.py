"""The expansion's SFT as a recipe of the language loop: values, rows, prompts, score, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.checkpoint import to_json
from common.config import load_recipe, parse_recipe
from common.data.language import WholeRows
from common.errors import UserError
from common.expansion.config import SftConfig, read_yaml
from common.expansion.prompts import ExpansionPrompts, load_tokenizer
from common.expansion.recipe import ExpansionRecipe
from common.expansion.sft import PreparedExpansion, prepare_expansion
from common.language.prepare import plan_language
from common.metrics.expansion import score
from tests.tiny_expansion import expansion_recipe, write_expander, write_rows

ROOT = Path(__file__).resolve().parents[3]
RECIPE = str(ROOT / "configs" / "expansion_sft.py")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows")


@pytest.fixture(scope="module")
def base(rows: Path) -> Path:
    return write_expander(rows.parent / "base", rows)


def prepared(recipe: ExpansionRecipe) -> tuple[ExpansionRecipe, PreparedExpansion]:
    return prepare_expansion(recipe.validate(), say=lambda _: None)


def test_the_recipe_has_the_values_of_the_mlx_commands_yaml() -> None:
    recipe, yaml = load_recipe(RECIPE), read_yaml(ROOT / "configs" / "sft.yaml", SftConfig)
    training, train = yaml.training, recipe.train
    assert (recipe.lora.rank, recipe.lora.alpha) == (yaml.lora.rank, yaml.lora.alpha)
    assert recipe.lora.targets == yaml.lora.target_modules
    assert recipe.lora.train_embeddings == yaml.lora.train_embeddings and yaml.lora.dropout == 0.0
    assert train.batch_size == training.batch_size * training.gradient_accumulation_steps
    assert (train.learning_rate, train.epochs, train.seed) == (
        training.learning_rate,
        training.epochs,
        training.seed,
    )
    assert (train.schedule, train.warmup) == (training.lr_scheduler, training.warmup_ratio)
    assert (train.weight_decay, train.max_grad_norm) == (training.weight_decay, training.max_grad_norm)
    assert (recipe.base, recipe.data, recipe.prompt) == (yaml.model.base, yaml.dataset, yaml.prompt)
    assert recipe.context == training.max_length
    assert recipe.evaluation.queries == yaml.evaluation.queries


def test_a_tiny_base_brings_its_settings_and_flags_come_after_them() -> None:
    argv = ["--config", RECIPE, "--base", "tiny", "--train.epochs", "1", "--data.max-samples", "5"]
    recipe, _ = parse_recipe("test", argv)
    assert (recipe.base, recipe.data.name, recipe.data.max_samples) == ("tiny", "generated", 5)
    assert recipe.lora.train_embeddings and recipe.train.epochs == 1.0
    assert recipe.changed(train={"epochs": 2.0}, data={"max_samples": None}) == load_recipe(RECIPE, "tiny")


def test_rows_are_the_prompts_and_completions_of_the_mlx_command(rows: Path, base: Path) -> None:
    """Epoch after epoch every row in its other form; the loss is on the completion and its end of turn."""
    recipe, ready = prepared(expansion_recipe(rows, base))
    prompts = ExpansionPrompts(load_tokenizer(base), system="mixed")
    plan = plan_language(recipe, ready)
    assert isinstance(plan, WholeRows) and len(plan) == 5
    for step in (0, 6):
        batch, epoch = plan.batch(step), step // 5
        for place, row in enumerate(batch.row_index.tolist()):
            example = prompts.example(ready.data.train[row], (row + epoch) % 2)
            shown = batch.segments[place, 0] > 0
            assert batch.input_ids[place, 0][shown].tolist() == list(example.ids[:-1])
            learned = batch.labels[place, 0][batch.mask[place, 0]].tolist()
            assert learned == list(example.ids[example.start :]) and learned[-1] == prompts.end_id
    dev = ready.split("dev")
    for turn, row in enumerate(ready.data.val):
        example = prompts.example(row, turn)
        assert [ready.frame, *dev.ids[dev.document(turn)]] == list(example.ids)
        assert dev.counted[dev.document(turn)].sum() == len(example.ids) - example.start


class Writer:
    """An engine that writes given texts, whatever it is asked."""

    context, segmented = None, False

    def __init__(self, texts: Sequence[Sequence[int]], vocabulary: int) -> None:
        self.texts, self.vocab_size = texts, vocabulary

    def start(self, rows: int, capacity: int) -> int:
        return 0

    def read(self, state: int, ids: Any, counts: Any, explore: Any = None) -> tuple[int, Any]:
        whole = ids.shape[1] > 1
        state = state if whole else state + 1
        logits = np.zeros((len(ids), self.vocab_size), np.float32)
        for row, text in enumerate(self.texts):
            logits[row, text[min(state, len(text) - 1)]] = 1.0
        return state, logits

    def renew(self, state: int, rows: Any) -> int:
        return state


def test_the_dev_score_is_that_of_the_greedy_expansions(rows: Path, base: Path) -> None:
    recipe = expansion_recipe(rows, base).changed(evaluation={"max_tokens": 60}, context=40)
    _, ready = prepared(recipe.changed(prompt={"system": "none"}))
    ids = ready.prompts.completion(ready.data.val[0].lines)
    engine = Writer([ids, ids[:-1]], len(load_tokenizer(base)))
    texts, ended = ready.expansions(engine)
    assert ended == [True, False] and texts[0] == ready.prompts.decode(ids)
    expected = [score(r.query, t).reward for r, t in zip(ready.scored_rows(), texts, strict=True)]
    assert ready.scores(engine) == {"score": pytest.approx(np.mean(expected)), "ended": 0.5}
    shown = ready.score_tables("mine", engine)[0]
    assert shown["rows"][0][0] == "mine" and len(shown["rows"]) == 2


def test_a_row_that_does_not_fit_is_shown(rows: Path, base: Path) -> None:
    recipe, ready = prepared(expansion_recipe(rows, base).changed(context=40))
    with pytest.raises(UserError, match=r"20 of 20 rows are longer than the context of 40 tokens"):
        plan_language(recipe, ready)


def write_config(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    sizes = {"vocab_size": 64, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
    (folder / "config.json").write_bytes(to_json(sizes | {"num_attention_heads": 2} | config))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "Qwen/Qwen3-1.7B"}, "which needs no download: --base tiny"),
        ({"evaluation": {"queries": -1}}, r"evaluation\.queries is -1; allowed: >= 0"),
        ({"evaluation": {"queries": 0}, "train": {"best": "score"}}, "nothing is scored here"),
        ({"data": {"max_samples": 0}}, r"data\.max_samples is 0"),
        ({"lora": {"targets": 3}}, r"lora\.targets is 3; allowed: several of text"),
        ({"context": 4096 * 2}, "has a context of 4096 tokens, --context asks for 8192"),
    ],
)
def test_what_cannot_be_trained_is_told(
    rows: Path, base: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        prepared(expansion_recipe(rows, base).changed(**changes))


def test_another_architecture_and_rows_without_output_are_refused(
    rows: Path, base: Path, tmp_path: Path
) -> None:
    llama = write_config(tmp_path / "llama", model_type="llama", max_position_embeddings=512)
    with pytest.raises(UserError, match="is of the kind llama; QMD's prompts are Qwen3's"):
        prepared(expansion_recipe(rows, llama))
    other = write_config(tmp_path / "bert", model_type="bert")
    with pytest.raises(UserError, match="model_type is 'bert'"):
        prepared(expansion_recipe(rows, other))
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"query": "a query", "output": []}) + "\n")
    with pytest.raises(UserError, match=r"bad\.jsonl:1: the expansion has no line"):
        prepared(expansion_recipe(bad, base))
