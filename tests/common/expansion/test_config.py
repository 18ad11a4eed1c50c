"""The query expansion's settings: QMD's YAML, keys that are refused, values out of range."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from common.errors import UserError
from common.expansion.config import GrpoConfig, SftConfig, parse_expansion_command, read_yaml

ROOT = Path(__file__).resolve().parents[3]

ORIGINAL = """
model: {base: Qwen/Qwen3-1.7B, output: outputs/sft, push_to_hub: false}
dataset: {name: data/train/, split: train, eval_split: validation}
training:
  epochs: 5
  batch_size: 4
  gradient_accumulation_steps: 4
  learning_rate: 0.0002
  max_length: 512
  warmup_ratio: 0.03
  lr_scheduler: cosine
  save_interval_minutes: 30
  save_steps: 200
  save_total_limit: 3
  eval_steps: 200
lora: {rank: 16, alpha: 32, dropout: 0.05, target_modules: [q_proj, v_proj]}
"""


@dataclass(frozen=True)
class Nothing:
    """A command without flags of its own."""


def yaml(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return file


def test_the_originals_values_are_read(tmp_path: Path) -> None:
    config = read_yaml(yaml(tmp_path, ORIGINAL), SftConfig).validate()
    assert config.training.learning_rate == 2e-4 and config.training.save_interval_minutes == 30
    assert config.lora.target_modules == ("q_proj", "v_proj") and config.lora.alpha == 32
    assert config.dataset.eval_split == "validation" and config.training.save_total_limit == 3


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "training: {learning_rate: 2e-4}",
            r"learning_rate is '2e-4'.*YAML reads 2e-4 as text: write 0.0002",
        ),
        ("training: {epoch: 5}", r"training\.epoch: unknown key; did you mean epochs\?"),
        ("trainin: {epochs: 5}", r"trainin: unknown key; did you mean training\?"),
        ("model: {push_to_hub: true}", r"model\.push_to_hub is not used: .*hf upload"),
        ("model: {trust_remote_code: true}", r"trust_remote_code is not used: no code"),
        ("dataset: {text_field: text}", r"dataset\.text_field is not used: prompts are rendered"),
        ("tracking: {project: x}", r"tracking is not used: a run is logged"),
        ("training: {ddp_find_unused_parameters: false}", r"not used: it is a switch of torch"),
        ("gguf: {types: [Q8_0]}", r"gguf is not used: mlx_impl/convert.py"),
        ("training: 5", r"training: expected a section"),
        ("training: {epochs: five}", r"training\.epochs is 'five'; allowed: a finite number"),
        ("lora: {target_modules: q_proj}", r"lora\.target_modules is 'q_proj'; allowed: several of"),
        ("[1, 2]", r"expected sections"),
        ("a: [", r"not valid YAML"),
    ],
)
def test_a_key_that_is_wrong_is_named(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        read_yaml(yaml(tmp_path, text), SftConfig)


def test_all_wrong_keys_are_listed_together(tmp_path: Path) -> None:
    file = yaml(tmp_path, "dataset: {text_field: text}\ntraining: {learning_rate: 2e-4, epoch: 1}")
    with pytest.raises(UserError, match=r"text_field(?s:.*)epoch(?s:.*)learning_rate"):
        read_yaml(file, SftConfig)


@pytest.mark.parametrize(
    ("kind", "flags", "told"),
    [
        (
            "sft",
            ["--lora.target-modules", "q_proj", "w_proj"],
            r"target_modules is .*'w_proj'.*allowed: of q_proj",
        ),
        ("sft", ["--output", "someone/model"], r"model\.output is 'someone/model'; allowed: a local folder"),
        ("sft", ["--model.load-in-4bit", "--lora.train-embeddings"], r"train_embeddings is True.*quantised"),
        (
            "sft",
            ["--training.grad-checkpoint", "--lora.dropout", "0.1"],
            r"grad_checkpoint is True; allowed: false",
        ),
        ("sft", ["--training.epochs", "0"], r"training\.epochs is 0.*allowed: > 0"),
        ("sft", ["--training.epoch", "1"], r"unknown setting --training\.epoch; did you mean"),
        ("grpo", ["--grpo.num-generations", "3"], r"a divisor of training\.batch_size x .* \(16\)"),
        ("grpo", ["--reward.retrieval", "1"], r"retrieval_data is ''; allowed: a BEIR folder"),
        ("grpo", ["--generation.temperature", "0"], r"temperature is 0.*a group must differ"),
        ("grpo", ["--lora.train-embeddings"], r"train_embeddings is True.*the KL's reference is the model"),
        ("grpo", ["--dataset.trim-hyde"], r"trim_hyde is True.*reads the query alone"),
        ("grpo", ["--prompt.no-final-newline"], r"final_newline is False.*GRPO has no targets"),
        ("grpo", ["--reward.score", "0"], r"reward\.score is 0.*one weight not 0"),
    ],
)
def test_a_value_out_of_range_is_named(kind: str, flags: list[str], told: str) -> None:
    config = {"sft": SftConfig, "grpo": GrpoConfig}[kind]
    with pytest.raises(UserError, match=told):
        parse_expansion_command("", flags, str(ROOT / f"configs/{kind}.yaml"), config, Nothing)


def test_the_configs_in_the_tree_are_the_originals_values() -> None:
    sft = read_yaml(ROOT / "configs/sft.yaml", SftConfig).validate()
    assert (sft.model.base, sft.training.epochs, sft.lora.rank, sft.training.learning_rate) == (
        "Qwen/Qwen3-1.7B",
        5,
        16,
        2e-4,
    )
    grpo = read_yaml(ROOT / "configs/grpo.yaml", GrpoConfig).validate()
    assert (grpo.grpo.beta, grpo.training.learning_rate, grpo.lora.rank, grpo.completions) == (
        0.04,
        5e-7,
        4,
        16,
    )


def test_the_tiny_base_has_settings_of_its_own_and_flags_go_before_them() -> None:
    config, _ = parse_expansion_command(
        "", ["--base", "tiny", "--training.epochs", "1"], str(ROOT / "configs/sft.yaml"), SftConfig, Nothing
    )
    assert config.model.base == "tiny" and config.dataset.name == "generated"
    assert config.lora.train_embeddings and config.training.epochs == 1
