"""The recipe of a query expander's SFT in the loop of the language models: configs/expansion_sft.py.

Its YAML twin is SftConfig of common/expansion/config.py, for `mlx_impl/train.py sft`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

from common.expansion.config import TARGETS, TINY, TINY_REMEDY, DatasetConfig, PromptConfig
from common.language.config import (
    FineTuneRecipe,
    LanguageEvalConfig,
    LanguageLoraConfig,
    LanguageTrainConfig,
)


@dataclasses.dataclass(frozen=True)
class ExpansionEvalConfig(LanguageEvalConfig):
    queries: int = 64
    """Dev queries that are expanded greedily and scored at each evaluation, 0 for none."""
    max_tokens: int = 300
    """Of an expansion."""


@dataclasses.dataclass(frozen=True)
class ExpansionRecipe(FineTuneRecipe):
    """`configs/expansion_sft.py`; the values are those of configs/sft.yaml, in the words of this loop."""

    name: str = "expansion_sft"
    base: str | None = "Qwen/Qwen3-1.7B"
    """Qwen3 checkpoint directory, run, name on the hub, or `tiny`: a small random one made here."""
    data: DatasetConfig = dataclasses.field(default_factory=DatasetConfig)  # type: ignore[assignment]
    prompt: PromptConfig = dataclasses.field(default_factory=PromptConfig)
    train: LanguageTrainConfig = dataclasses.field(
        default_factory=lambda: LanguageTrainConfig(
            epochs=5.0, batch_size=16, learning_rate=2e-4, warmup=0.03, weight_decay=0.0, seed=42
        )
    )
    lora: LanguageLoraConfig = dataclasses.field(
        default_factory=lambda: LanguageLoraConfig(rank=16, alpha=32.0, targets=TARGETS)
    )
    evaluation: ExpansionEvalConfig = dataclasses.field(default_factory=ExpansionEvalConfig)
    context: int | None = 512
    """Tokens of prompt and target."""

    @property
    def remedy(self) -> str | None:
        return TINY_REMEDY

    @property
    def scored(self) -> bool:
        return self.evaluation.queries > 0

    @property
    def max_dev_documents(self) -> int | None:
        return None

    @property
    def masks_unknown(self) -> bool:
        return False

    def tiny(self) -> Self:
        """The same for the tiny base: rows that need no download, all of its embeddings learn, minutes on a
        CPU."""
        return self.changed(
            name="expansion_sft_tiny",
            base=TINY,
            data={"name": "generated", "eval_split": ""},
            train={"epochs": 2.0, "batch_size": 8, "learning_rate": 5e-3, "evaluations": 2},
            lora={"train_embeddings": True},
            evaluation={"queries": 32, "max_tokens": 120, "batch_size": 32},
        )

    def _data_checks(self) -> list[tuple[str, Any, bool, str]]:
        most, evaluation = self.data.max_samples, self.evaluation
        return [
            ("data.max_samples", most, most is None or most >= 1, ">= 1"),
            ("evaluation.queries", evaluation.queries, evaluation.queries >= 0, ">= 0"),
            ("evaluation.max_tokens", evaluation.max_tokens, evaluation.max_tokens >= 1, ">= 1"),
        ]
