"""Runs of language models as their folders would be, written without training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common.config import to_dict
from common.language.config import DistillationConfig
from common.language.inspection import INSPECTION_FILE
from common.runs import RESULTS_FILE, RunFolder
from tests.tiny_language import recipe

STEPS = 40  # logged every second step, dev at 20 and 40
Line = dict[str, float]


def train_line(kind: str, step: int) -> Line:
    """What a step of a good run logs: the loss falls, a student's terms settle."""
    entropy = 3.0 + 4.0 / step
    line = {"next_token": entropy, "cross_entropy": entropy, "loss": entropy, "gradient_norm": 1.0}
    if kind == "indra":
        weight = 0.01 + 0.04 * (step - 1) / STEPS
        line |= {
            "distillation": 2.0 + 1.0 / step,
            "distillation_weight": weight,
            "magnitude": 0.02,
            "phase": 0.1,
        }
        line["loss"] += weight * line["distillation"]
    return line | {"learning_rate": 1e-3, "counted_share": 0.5}


def dev_line(kind: str, step: int) -> Line:
    """What an evaluation of a good run logs."""
    line = {"perplexity": 60.0 + 400.0 / step, "word_perplexity": 200.0, "bits_per_byte": 1.5}
    if kind == "infinito":
        used = {
            "utilisation": 0.6,
            "active_slots": 6.0,
            "null_share": 0.3,
            "mean_importance": 0.5,
            "rotation": 0.4,
        }
        line |= used
    if kind == "indra":
        line |= {"magnitude_r2": 0.25, "magnitude_entropy_rank": -0.5, "phase_r2": -0.125}
    return line


def write_run(
    root: Path, kind: str, change: Callable[[str, int, Line], Line] = lambda _kind, _step, line: line
) -> Path:
    """A run that has ended, of tiny_language's recipe; `change` gets (train or dev, step, line)."""
    made = recipe(kind, root / "text.txt", max_steps=STEPS)
    if kind == "indra":
        made = dataclasses.replace(made, distillation=DistillationConfig(teacher="runs/decoder"))
    with RunFolder.create(root, kind, to_dict(made), data_fingerprint="abc123") as run:
        for step in range(2, STEPS + 1, 2):
            run.log(step, "train", change("train", step, train_line(kind, step)))
            if step % 20 == 0:
                run.log(step, "dev", change("dev", step, dev_line(kind, step)))
        run.final.mkdir()
        test = {"mode": "static", "token": 75.25, "word": 210.5, "bits_per_byte": 1.625}
        run.write_json(RESULTS_FILE, {"tables": [], "test": [test], "training": {"steps": STEPS}})
        run.write_json(INSPECTION_FILE, inspection(kind))
    return root / kind


def inspection(kind: str) -> dict[str, Any]:
    """Two layers over five tokens, one of which is a formula's sign, and eight slots over six segments."""
    rng = np.random.default_rng(0)
    attention = np.tril(rng.random((2, 5, 5)))
    attention /= attention.sum(-1, keepdims=True)
    memory = None
    if kind == "infinito":
        memory = {
            "importance": rng.random((8, 6)).tolist(),
            "age": rng.integers(0, 5, (8, 6)).tolist(),
            "read": rng.dirichlet(np.ones(9), 6).T.tolist(),
            "replaced": [8, 4, 4, 4, 4, 4],
        }
    tokens = ["<|endoftext|>", " costs", " $", "5", "\n"]
    return {"attention": {"tokens": tokens, "layers": attention.tolist()}, "memory": memory}
