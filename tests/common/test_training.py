"""What both training loops ask of a loaded model before they begin."""

from __future__ import annotations

import pytest

from common.config import ModelConfig, QuantumConfig, RerankerConfig, TrainConfig
from common.errors import UserError
from common.training import SEPARABLE, check_model


def test_a_separable_start_is_refused_by_name_for_families_that_lack_it() -> None:
    config = RerankerConfig(train=TrainConfig(separable_start=0.3))
    for family in SEPARABLE:
        check_model(config, family, "resonance")
    for family in ("distilbert", "deberta-v2", "modernbert"):
        check_model(RerankerConfig(), family, "resonance")
        with pytest.raises(UserError, match=f"{family} is not one of the families.*: bert, electra"):
            check_model(config, family, "resonance")


def test_a_checkpoint_s_own_head_refuses_as_the_recipe_s_would() -> None:
    config = RerankerConfig(model=ModelConfig(base="runs/x"), quantum=QuantumConfig(mode="resonance"))
    check_model(config.validate(), "bert", "resonance")
    with pytest.raises(UserError, match=r"runs/x has another head .*under model\.head 'cls'"):
        check_model(config, "bert", "cls")
