"""Recipes of language models: presets, flags, and what an impossible setting is told."""

from __future__ import annotations

from typing import Any

import pytest

from common.config import load_recipe, parse_command, parse_recipe
from common.errors import UserError
from common.language.architectures import parameter_count
from common.language.config import IndraRecipe, InfinitoRecipe, LanguageRecipe
from tests.test_dependencies import ROOT

INFINITO = str(ROOT / "configs" / "infinito_small.py")
INDRA = str(ROOT / "configs" / "indra.py")


def parsed(*argv: str) -> LanguageRecipe:
    recipe, _ = parse_recipe("test", argv)
    assert isinstance(recipe, LanguageRecipe)
    return recipe


def test_flags_reach_every_part_of_a_recipe() -> None:
    recipe = parsed(
        *("--config", INFINITO, "--data", "wikitext-2", "--model.memory-slots", "32", "--train.unroll=3"),
        *("--distillation.temperature", "1.5", "--evaluation.stride", "64", "--name", "mine"),
    )
    assert isinstance(recipe, InfinitoRecipe)
    assert (recipe.data.name, recipe.model.memory_slots, recipe.train.unroll) == ("wikitext-2", 32, 3)
    assert (recipe.distillation.temperature, recipe.evaluation.stride, recipe.name) == (1.5, 64, "mine")


@pytest.mark.parametrize("preset", [None, "small", "smoke", "teacher", "pure", "aggressive", "gentle"])
def test_every_stage_of_the_source_is_a_preset(preset: str | None) -> None:
    argv = ["--config", INDRA] if preset is None else ["--config", INDRA, "--preset", preset]
    recipe = parsed(*argv)
    weights = (recipe.distillation.start_weight, recipe.distillation.end_weight)
    expected: dict[str | None, Any] = {None: (0.01, 0.05), "aggressive": (1.0, 1.0), "gentle": (0.01, 0.01)}
    assert weights == expected.get(preset, weights)
    assert (recipe.distillation.teacher is None) == (preset in ("small", "smoke", "teacher", "pure"))


def test_the_sizes_are_those_that_the_recipes_promise() -> None:
    reference = load_recipe(str(ROOT / "configs" / "infinito.py"))
    assert 70e6 < parameter_count(reference.model) < 72e6
    small = load_recipe(INFINITO).changed(model={"vocab_size": 8192})
    assert parameter_count(small.model) <= 5e6
    indra = load_recipe(INDRA)
    assert isinstance(indra, IndraRecipe)
    assert (indra.model.vocab_size, indra.model.hidden_size, indra.model.context) == (32000, 128, 128)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train.reset-rate", "1"], r"train\.reset_rate is 1\.0; allowed: \[0, 1\)"),
        (["--data.vocab-size", "100"], r"data\.vocab_size is 100; allowed: >= 512"),
        (["--evaluation.stride", "0"], r"evaluation\.stride is 0; allowed: 1 to the context, 128"),
        (["--model.memory-writes", "0"], r"model\.memory_writes is 0"),
        (["--distillation.temperature", "0"], r"distillation\.temperature is 0\.0; allowed: > 0"),
        (["--train.unrol", "2"], r"unknown setting --train\.unrol; did you mean --train\.unroll\?"),
        (["--model.slots", "2"], r"unknown setting --model\.slots"),
    ],
)
def test_what_cannot_be_is_named_with_what_is_allowed(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parsed("--config", INFINITO, *argv)


def test_a_rerankers_command_refuses_a_language_models_recipe() -> None:
    with pytest.raises(
        UserError, match="is the recipe of a InfinitoRecipe, and this command is for rerankers"
    ):
        parse_command("test", ["--config", INFINITO])
