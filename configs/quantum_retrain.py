"""Retrain a checkpoint of ours on new, harder data, and keep what it knew.

    python scripts/train.py --config configs/quantum_retrain.py --model.base runs/x/best --data FILE_OR_FOLDER

The loss holds the model to its frozen original: `retrain.preserve_knowledge` its ranking of each list,
`retrain.resonance_alignment` its states. --retrain.old-data NAME adds unlabelled lists of the old domain.
The original is analysed first: analysis-original.json and .png in the run's folder, and in its report. What
is forgotten, and what preservation saves: python benchmarks/retraining.py, with the same flags.

preset        the task's loss                           time, memory        nDCG@10, new and old domain
(default)     adaptation: the ranking loss alone        README              .667 CoNaLa (.571 before), .732
                                                                            SciFact (.740; free .704)
resonance     with the resonance and entanglement       not measured        not measured
              terms
entanglement  with the entanglement term                not measured        not measured
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from common.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    QuantumConfig,
    RerankerConfig,
    RetrainConfig,
    TrainConfig,
)


def adaptation() -> RerankerConfig:
    """The base of `make train`; without --data it goes on with pydocs and its ten hardest negatives."""
    return RerankerConfig(
        name="quantum_retrain",
        model=ModelConfig(base="runs/quantum_resonance/best"),
        data=DataConfig(list_size=4, negative_pool=10),
        quantum=QuantumConfig(mode="adaptation", phase="resonance"),  # it has collapsed already
        train=TrainConfig(epochs=1, learning_rate=2e-5),
        retrain=RetrainConfig(preserve_knowledge=0.3, resonance_alignment=0.1, analyze_existing=True),
        evaluation=EvalConfig(depth=20, dev_depth=20),
    )


def resonance() -> RerankerConfig:
    """Harder on the states: relevant pairs above the resonance threshold, the others below."""
    config = adaptation()
    return replace(
        config, name="quantum_retrain_resonance", quantum=replace(config.quantum, mode="resonance")
    )


def entanglement() -> RerankerConfig:
    """States of related queries drawn together."""
    config = adaptation()
    return replace(
        config, name="quantum_retrain_entanglement", quantum=replace(config.quantum, mode="entanglement")
    )


PRESETS: dict[str, Callable[[], RerankerConfig]] = {"resonance": resonance, "entanglement": entanglement}


def get_config(preset: str | None = None) -> RerankerConfig:
    """The recipe of a preset; adaptation without one."""
    return adaptation() if preset is None else PRESETS[preset]()
