"""A tiny world of the query expansion: a few short rows, and a Qwen3 of one layer made for them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.data.expansion import load_expansions, render_lines
from common.expansion.config import GrpoConfig, SftConfig
from common.expansion.prompts import System
from common.expansion.recipe import ExpansionRecipe
from common.expansion.tiny_qwen import write_tiny_qwen

THINGS = ("router", "faucet", "lamp", "sofa", "queue", "fence")
ACTIONS = ("clean", "repair", "move", "paint")
SIZES = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}


def row(query: str) -> dict[str, Any]:
    return {"query": query, "output": [["lex", f"{query} fast"], ["vec", f"how to {query} now"]]}


def write_rows(folder: Path) -> Path:
    """20 training and 4 validation rows."""
    folder.mkdir(parents=True)
    queries = [f"{action} {thing}" for thing in THINGS for action in ACTIONS]
    for name, chosen in (("train", queries[4:]), ("val", queries[:4])):
        text = "".join(json.dumps(row(query)) + "\n" for query in chosen)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def write_expander(folder: Path, rows: Path, **sizes: Any) -> Path:
    """A random Qwen3 whose tokenizer knows the rows."""
    data = load_expansions(str(rows))
    texts = [
        f"user\n/no_think Expand this search query: {r.query}\n{render_lines(r.lines)}" for r in data.train
    ]
    write_tiny_qwen(folder, texts * 3, sizes={**SIZES, **sizes})
    return folder


def expansion_recipe(rows: Path, base: Path | str, **train: Any) -> ExpansionRecipe:
    """Two epochs of five steps, adapters of rank 4, both forms of the prompt."""
    settings = {
        "epochs": 2.0,
        "batch_size": 4,
        "learning_rate": 0.01,
        "evaluations": 2,
        "checkpoint_every": 2,
    }
    return ExpansionRecipe().changed(
        name="tiny",
        base=str(base),
        data={"name": str(rows)},
        train=settings | train,
        lora={"rank": 4, "alpha": 8.0},
        evaluation={"queries": 2, "max_tokens": 12, "batch_size": 2},
    )


def sft_config(
    rows: Path, base: Path, output: Path, *, system: System = "none", plain: bool = False, **training: Any
) -> SftConfig:
    """Full of what a run can have: dropout, accumulation, evaluations, embeddings that learn; `plain` without
    dropout and with adapters alone."""
    config = SftConfig()
    settings = {
        "epochs": 2.0,
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "eval_steps": 3,
        "save_steps": 2,
    }
    return replace(
        config,
        model=replace(config.model, base=str(base), output=str(output)),
        dataset=replace(config.dataset, name=str(rows)),
        prompt=replace(config.prompt, system=system),
        training=replace(config.training, **(settings | training)),
        lora=replace(
            config.lora, rank=4, alpha=8.0, dropout=0.0 if plain else 0.1, train_embeddings=not plain
        ),
        evaluation=replace(config.evaluation, queries=2, max_tokens=16, batch_size=4),
    ).validate()


def grpo_config(rows: Path, sft: Path, output: Path, **policy: Any) -> GrpoConfig:
    config = GrpoConfig()
    settings = {"num_generations": 4, "max_completion_length": 12, "num_iterations": 2}
    return replace(
        config,
        model=replace(config.model, sft=str(sft), output=str(output)),
        dataset=replace(config.dataset, name=str(rows)),
        prompt=replace(config.prompt, system="none"),
        training=replace(
            config.training,
            max_steps=3,
            batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=0.01,
            eval_steps=2,
            save_steps=1,
        ),
        grpo=replace(config.grpo, **(settings | policy)),
        evaluation=replace(config.evaluation, queries=2, max_tokens=12, batch_size=4),
    ).validate()
