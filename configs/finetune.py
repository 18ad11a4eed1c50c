"""A trained language model (Indra, Infinito, decoder) goes on with a task: instruction, summary, question.

    python scripts/train.py --config configs/finetune.py --base runs/infinito_small --data tasks.jsonl

tasks.jsonl has a row a line: instruction, input (may be absent), output; or text, summary; or question,
answer, context (may be absent); or prompt, completion. They are asked in Alpaca's form (### Instruction: ...)
and the answer alone is learned. Without --data: Alpaca, from $RESONANCE_DATA or the hub; without --base: what
configs/infinito_small.py has left. Then:

    python scripts/generate.py --model runs/finetune --instruction --prompt "..."

Each row stands alone and must fit the context of the base; only Infinito reads longer ones, with its memory.

preset   what for                                               time, memory     result
(none)   every parameter learns                                 not measured     not measured
lora     adapters of rank 16 on every linear layer learn alone  not measured     not measured
"""

from __future__ import annotations

from collections.abc import Callable

from common.language.config import FineTuneRecipe, LanguageDataConfig, LanguageLoraConfig, LanguageTrainConfig


def default() -> FineTuneRecipe:
    """Three epochs at a low rate."""
    return FineTuneRecipe(
        base="runs/infinito_small",
        data=LanguageDataConfig(name="alpaca", mask_prompt=True, max_dev_documents=400),
        train=LanguageTrainConfig(epochs=3.0, batch_size=16, learning_rate=2e-4, weight_decay=0.01),
    )


def lora() -> FineTuneRecipe:
    """Adapters learn faster than weights do."""
    adapters = LanguageLoraConfig(rank=16, alpha=32.0)
    return default().changed(name="finetune_lora", lora=adapters, train={"learning_rate": 1e-3})


PRESETS: dict[str, Callable[[], FineTuneRecipe]] = {"lora": lora}


def get_config(preset: str | None = None) -> FineTuneRecipe:
    """The recipe of a preset; every parameter learns without one."""
    return default() if preset is None else PRESETS[preset]()
