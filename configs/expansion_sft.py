"""A query expander for QMD by SFT in JAX: LoRA on Qwen3, QMD's rows, prompts and score.

    python scripts/train.py --config configs/expansion_sft.py               Qwen3-1.7B, the hub's data: a GPU
    python scripts/train.py --config configs/expansion_sft.py --base tiny   no download: a tiny random Qwen3
    python scripts/train.py --config configs/expansion_sft.py --data my_rows.jsonl

The same training as `python mlx_impl/train.py sft` by configs/sft.yaml; rows are
{"query": ..., "output": [["lex", "..."], ...]}. The result, runs/expansion_sft/best, is a whole Qwen3
checkpoint with the adapters merged, which transformers, mlx_impl/eval.py and mlx_impl/convert.py read.

preset     what for                                            time, memory     score
(default)  the original's: 5 epochs, 2e-4, rank 16             not measured     not measured
tiny       that everything runs, on generated rows (= --base)  see README       a template's is better
"""

from __future__ import annotations

from collections.abc import Callable

from common.expansion.recipe import ExpansionRecipe


def tiny() -> ExpansionRecipe:
    """A random Qwen3 of 0.7 M parameters on rows that need no download."""
    return ExpansionRecipe().tiny()


PRESETS: dict[str, Callable[[], ExpansionRecipe]] = {"tiny": tiny}


def get_config(preset: str | None = None) -> ExpansionRecipe:
    """The recipe of a preset; the original's values without one."""
    return ExpansionRecipe() if preset is None else PRESETS[preset]()
