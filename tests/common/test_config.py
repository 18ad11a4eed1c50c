"""Settings: recipes and their presets, overrides, and what a misspelt or impossible one is told."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.config import RerankerConfig, RunOptions, load_recipe, parse_command
from common.errors import UserError
from tests.test_dependencies import HEAVY, ROOT

RECIPES = sorted((ROOT / "configs").glob("*.py"))
RERANKER = str(ROOT / "configs" / "quantum_resonance.py")


def parsed(*argv: str) -> tuple[RerankerConfig, RunOptions]:
    return parse_command("test", ["--config", RERANKER, *argv])


def test_a_flag_overrides_the_recipe_and_nothing_else() -> None:
    config, options = parsed("--quantum.mode", "entanglement", "--train.epochs=5", "--model.use_lora")
    assert (config.quantum.mode, config.train.epochs, config.model.use_lora) == ("entanglement", 5.0, True)
    assert config.data == load_recipe(RERANKER).data and options == RunOptions()


def test_data_is_short_for_its_name() -> None:
    for argv in (["--data", "a/b"], ["--data=a/b"], ["--data.name", "a/b"]):
        config, _ = parsed(*argv, "--data.list-size", "4")
        assert (config.data.name, config.data.list_size) == ("a/b", 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("train=TrainConfig(epoch=3)", r"argument 'epoch'\); did you mean train\.epochs\?"),
        ("traim=TrainConfig()", r"argument 'traim'"),
        (
            "train=TrainConfig(objective='list')",
            r"objective is 'list'; allowed: 'quantum', 'listwise'",
        ),
        ("quantum=QuantumConfig(mode='entangled')", r"did you mean 'entanglement'\?"),
        ("quantum=QuantumConfig(phase='resonnance')", r"quantum\.phase is 'resonnance'.*mean 'resonance'\?"),
        ("train=TrainConfig(epochs='3')", r"train\.epochs is '3'; allowed: a finite number"),
        ("train=TrainConfig(max_steps=2.5)", r"max_steps is 2\.5; allowed: a whole number or None"),
        ("data=DataConfig(length_buckets=[32])", r"length_buckets is \[32\]; allowed: several of a whole"),
        ("model=ModelConfig(use_lora=1)", r"use_lora is 1; allowed: True or False"),
        ("model=ModelConfig(passage_segment=2)", r"passage_segment is 2; allowed: 0, 1 or None"),
        ("evaluation=EvalConfig(first_stage='bm52')", r"first_stage is 'bm52'.*mean 'bm25'\?"),
    ],
)
def test_a_recipe_with_an_unknown_key_or_choice_is_refused(
    tmp_path: Path, settings: str, message: str
) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        f"from common.config import *\n\n\ndef get_config():\n    return RerankerConfig({settings})\n"
    )
    with pytest.raises(UserError, match=message):
        parse_command("", ["--config", str(recipe)])


def test_a_preset_is_the_base_of_overrides() -> None:
    config, options = parsed("--preset", "quick", "--data.max-samples", "7", "--no-evaluate-test")
    assert config.model.use_lora and config.data.max_samples == 7 and not options.evaluate_test


def test_the_presets_are_the_three_scenarios() -> None:
    quick, production, tuning = (
        load_recipe(RERANKER, name).validate() for name in ("quick", "production", "fine_tuning")
    )
    assert quick.data.max_samples == 1000 and quick.train.epochs == 1 and quick.model.use_lora
    assert (production.quantum.mode, production.quantum.phase) == ("entanglement", "auto")
    assert (production.train.epochs, production.train.batch_size) == (3, 16)
    assert production.data.max_samples is None and 2e-5 <= production.train.learning_rate <= 5e-5
    assert (tuning.quantum.mode, tuning.train.learning_rate) == ("resonance", 1e-5)
    assert len({config.name for config in (RerankerConfig(), quick, production, tuning)}) == 4


def test_every_recipe_and_preset_is_valid_and_loads_no_framework() -> None:
    program = f"""
import runpy, sys
from common.config import load_recipe
for path in {[str(path) for path in RECIPES]!r}:
    for preset in (None, *runpy.run_path(path).get("PRESETS", ())):
        load_recipe(path, preset).validate()
print(*sorted({HEAVY!r} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert RECIPES and result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train.epoch", "3"], r"unknown setting --train\.epoch; did you mean --train\.epochs\?"),
        (["--quantum.resonance-treshold=0.5"], r"did you mean --quantum\.resonance-threshold\?"),
        (["--train.lr", "1e-4"], r"unknown setting --train\.lr; did you mean --train\.learning-rate\?"),
        (["--name", "a/b"], r"name is 'a/b'; allowed: a folder's name, without /"),
        (["--name", ""], r"name is ''; allowed: a folder's name"),
        (["--train.hidden-dropout", "0.99999999999"], r"hidden_dropout is .*; allowed: \[0, 0\.95\]"),
        (["--train.attention-dropout", "0.96"], r"attention_dropout is 0\.96; allowed: \[0, 0\.95\]"),
        (["--evaluation.fusion-grid", "0", "-1"], r"fusion_grid is \(0\.0, -1\.0\); allowed: numbers >= 0"),
        (["--evaluation.fusion-grid", "1"], r"fusion_grid is \(1\.0,\); allowed: .* that contain 0"),
        (["--list-size", "3"], r"did you mean --data\.list-size\?"),
        (["--preset", "qick"], r"no preset 'qick'; it has: fine_tuning, .*Did you mean 'quick'\?"),
        (["--preset"], "--preset needs a value"),
        (["--quantum.resonance_threshold", "1.5"], r"resonance_threshold is 1\.5; allowed: \[0, 1\]"),
        (["--train.batch-size", "6", "--train.micro-batches", "4"], "allowed: a divisor of batch_size"),
    ],
)
def test_what_is_misspelt_or_out_of_range_is_refused_with_what_is_allowed(
    argv: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        parsed(*argv)


def floats(config: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of the settings that are numbers with a fraction."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from floats(value, f"{prefix}{field.name}.")
        elif isinstance(value, float):
            yield prefix + field.name


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_numbers_that_are_not_finite_are_refused_in_every_field(value: str) -> None:
    names = list(floats(RerankerConfig()))
    assert len(names) > 20
    with pytest.raises(UserError) as caught:
        parsed(*(f"--{name}={value}" for name in names), "--evaluation.fusion-grid", "0", value)
    for name in names:
        assert f"{name} is {value}; allowed: a finite number" in str(caught.value)
    assert f"evaluation.fusion_grid is (0.0, {value}); allowed: several of a finite" in str(caught.value)


def test_the_retraining_recipes_keep_what_the_base_knew() -> None:
    recipe = str(ROOT / "configs" / "quantum_retrain.py")
    for preset, mode in ((None, "adaptation"), ("resonance", "resonance"), ("entanglement", "entanglement")):
        config = load_recipe(recipe, preset).validate()
        assert config.retrains and config.preserves and config.quantum.mode == mode
        assert config.retrain.preserve_knowledge == 0.3 and config.retrain.analyze_existing
    config, _ = parse_command(
        "", ["--config", recipe, "--model.base", "runs/x/best", "--retrain.old-data", "b"]
    )
    assert (config.model.base, config.retrain.old_data, config.lists_per_step) == ("runs/x/best", "b", 12)
    assert not load_recipe(RERANKER).retrains


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--retrain.preserve-knowledge", "-0.1"], r"retrain\.preserve_knowledge is -0\.1; allowed: >= 0"),
        (["--retrain.resonance-alignment=-1"], r"retrain\.resonance_alignment is -1\.0; allowed: >= 0"),
        (["--retrain.old-batch-size", "0"], r"retrain\.old_batch_size is 0; allowed: >= 1"),
        (["--retrain.old-queries", "0"], r"retrain\.old_queries is 0; allowed: >= 1"),
        (["--retrain.old-data", "b"], r"retrain\.old_data is 'b'; allowed: with preserve_knowledge or"),
        (
            ["--retrain.preserve-knowledge=1", "--data.in-batch-negatives=1"],
            r"in_batch_negatives is 1; allowed: 0 in a retraining",
        ),
        (
            [
                *("--retrain.preserve-knowledge=1", "--retrain.old-data=b"),
                *("--retrain.old-batch-size=3", "--train.micro-batches=2"),
            ],
            r"micro_batches is 2; allowed: a divisor of retrain\.old_batch_size too",
        ),
        (["--retrain.preserve-knowlege", "1"], r"did you mean --retrain\.preserve-knowledge\?"),
    ],
)
def test_retraining_settings_out_of_range_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parsed(*argv)


def test_every_field_out_of_range_is_named_at_once() -> None:
    with pytest.raises(UserError) as caught:
        parsed("--data.list-size", "1", "--train.learning-rate", "-1", "--evaluation.depth", "0")
    for field in ("data.list_size is 1", "train.learning_rate is -1.0", "evaluation.depth is 0"):
        assert field in str(caught.value)


def test_a_missing_recipe_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "quantum.py").write_text("")
    with pytest.raises(UserError, match=r"no recipe at .*quantun\.py; did you mean .*quantum\.py\?"):
        load_recipe(str(tmp_path / "quantun.py"))


def test_outside_the_clone_a_command_says_where_to_run_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"configs/quantum_resonance\.py .*run from the root of the clone"):
        parse_command("test", [])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("recipe.yaml", "a: 1", "a recipe is a Python file"),
        ("recipe.py", "x = 1", r"has no get_config\(\)"),
        ("recipe.py", "def (", r"cannot be read \(SyntaxError"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_recipe(str(tmp_path / name))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model.head overlap", r"projector is 'cartesian'; allowed: 'polar' under model\.head 'overlap'"),
        ("--model.head real --model.projector polar", r"projector is 'polar'; allowed: 'cartesian' under"),
        ("--model.head cls --quantum.mode resonance", r"mode is 'resonance'; allowed: 'superposition', 'ad"),
        ("--model.head cls --quantum.mode entanglement", r"whose score reads no state"),
        (
            "--model.head cls --retrain.resonance-alignment 0.1",
            r"resonance_alignment is 0\.1; allowed: 0 und",
        ),
        (
            "--model.head overlap --model.projector polar --quantum.mode resonance",
            r"entanglement_weight is 0\.3; allowed: 0 under model\.head 'overlap', whose score sees no phase",
        ),
        ("--train.separable-start 1", r"separable_start is 1\.0; allowed: \[0, 1\)"),
    ],
)
def test_a_head_refuses_what_would_mean_nothing_with_it(flags: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parsed(*flags.split())


def test_a_head_goes_with_every_other_term() -> None:
    for flags in (
        "--model.head cls --train.objective listwise --quantum.mode resonance",
        "--model.head overlap --model.projector polar --quantum.mode resonance"
        " --quantum.entanglement-weight 0",
        "--model.head block_fidelity --model.projector polar --quantum.mode entanglement",
        "--model.head root_fidelity --retrain.resonance-alignment 0.1",
    ):
        assert parsed(*flags.split())[0].model.head in flags


def test_a_recipe_is_changed_by_parts() -> None:
    config = RerankerConfig().changed(name="mine", train={"epochs": 2, "seed": 7}, data={"list_size": 3})
    assert (config.name, config.train.epochs, config.train.seed) == ("mine", 2, 7)
    assert config.data.list_size == 3 and config.train.learning_rate == RerankerConfig().train.learning_rate
    with pytest.raises(TypeError, match="sead"):
        config.changed(train={"sead": 1})
    with pytest.raises(UserError, match=r"data\.flipped_labels is 1\.5; allowed: \[0, 1\]"):
        config.changed(data={"flipped_labels": 1.5}).validate()
