"""What both training loops ask of a loaded model before they begin."""

from __future__ import annotations

import pytest

from common.config import ModelConfig, QuantumConfig, RerankerConfig, TrainConfig
from common.errors import UserError
from common.reranker.training import SEPARABLE, check_model, verdict


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


@pytest.mark.parametrize(
    ("step", "alone", "fused", "says"),
    [
        (40, 0.7, 0.8, None),
        (40, 0.5, 0.8, "better than the first stage only when fused"),
        (40, 0.5, 0.6, "no better than the first stage, which is what you should keep"),
        (0, 0.7, 0.8, "best/ is the untrained base"),
    ],
)
def test_the_verdict_warns_where_training_did_not_help(
    step: int, alone: float, fused: float, says: str | None
) -> None:
    summary = {"best_step": step, "best_dev": alone, "best_dev_fused": fused, "dev_first_stage": 0.6}
    said = verdict(RerankerConfig(), summary)
    assert f"best on dev: step {step}, nDCG@10 {alone:.4f} alone" in said
    assert says in said if says else "warning" not in said
