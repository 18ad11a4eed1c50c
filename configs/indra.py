"""Indra: a phase/magnitude projector before and after the decoder blocks, on WikiText and Alpaca.

    python scripts/train.py --config configs/indra.py [--preset small|smoke|teacher|...]

The source's unified recipe (v4): next token, distillation from a teacher and phase/magnitude alignment,
together from scratch. Its teacher is TinyLlama, whose tokenizer is Llama-2's. WikiText and Alpaca are read
from $RESONANCE_DATA or the hub (`python scripts/prepare_data.py mixed`).

preset       what for
(default)    the source's: TinyLlama teaches, from the hub; needs a GPU
smoke        everything runs, on the documentation here; under 2 minutes, without a teacher
teacher      a larger decoder on the same data, to teach `small`
small        on a CPU: an 8k BPE, `--distillation.teacher runs/indra_teacher` distils from the preset teacher
pure         the source's abandoned stage 1: next token alone
aggressive   its stage 2: distillation alone at full weight, from scratch
gentle       its stage 3: distillation at a low weight after stage 1 (--base runs/indra_pure)

On one core of a CPU: teacher about 8 minutes, test perplexity a token 224; small 4 minutes, 308 (mean of
three seeds), with the teacher 7 minutes, 306 (docs/results.md). The 32k vocabulary and TinyLlama: not
measured.
"""

from __future__ import annotations

from collections.abc import Callable

from common.language.config import (
    DecoderConfig,
    DecoderRecipe,
    DistillationConfig,
    IndraRecipe,
    LanguageDataConfig,
    LanguageRecipe,
    LanguageTrainConfig,
)


def default() -> IndraRecipe:
    """V = 32000, D = 128, at most 128 tokens, w_kd from 0.01 to 0.05."""
    return IndraRecipe(
        name="indra",
        data=LanguageDataConfig(name="mixed", tokenizer="llama2"),
        train=LanguageTrainConfig(epochs=3.0, batch_size=64),
        distillation=DistillationConfig(teacher="TinyLlama/TinyLlama_v1.1"),
    )


def small() -> IndraRecipe:
    """For a CPU: the tokenizer is trained on the corpus, and there is no teacher unless one is named."""
    return IndraRecipe(
        name="indra_small",
        data=LanguageDataConfig(name="mixed", max_dev_documents=400),
        train=LanguageTrainConfig(epochs=0.0, max_steps=800, batch_size=16),
    )


def smoke() -> IndraRecipe:
    """Thirty steps on the documentation here."""
    return small().changed(
        name="indra_smoke",
        model={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "complex_width": 64},
        data={"name": "pydocs", "vocab_size": 2048, "max_dev_documents": 3},
        train={"max_steps": 30, "evaluations": 2, "checkpoint_every": 10},
    )


def teacher() -> DecoderRecipe:
    """A decoder of about 8 M parameters on the data of `small`."""
    student = small()
    return DecoderRecipe(
        name="indra_teacher",
        model=DecoderConfig(
            hidden_size=320, intermediate_size=864, num_attention_heads=5, max_position_embeddings=128
        ),
        data=student.data,
        train=student.train,
    )


def pure() -> IndraRecipe:
    """Next token alone, no projector's alignment."""
    return default().changed(name="indra_pure", distillation={"teacher": None})


def aggressive() -> IndraRecipe:
    """The teacher's distribution alone."""
    return default().changed(
        name="indra_aggressive",
        distillation={"cross_entropy_weight": 0.0, "start_weight": 1.0, "end_weight": 1.0},
    )


def gentle() -> IndraRecipe:
    """A low constant weight after pre-training."""
    return default().changed(
        name="indra_gentle",
        base="runs/indra_pure",
        distillation={"start_weight": 0.01, "end_weight": 0.01},
        train={"learning_rate": 1e-4},
    )


PRESETS: dict[str, Callable[[], LanguageRecipe]] = {
    "small": small,
    "smoke": smoke,
    "teacher": teacher,
    "pure": pure,
    "aggressive": aggressive,
    "gentle": gentle,
}


def get_config(preset: str | None = None) -> LanguageRecipe:
    """The recipe of a preset; the source's without one."""
    return default() if preset is None else PRESETS[preset]()
