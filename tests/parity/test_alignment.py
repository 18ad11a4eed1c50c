"""How well Indra's state is aligned with a teacher's certainty: both backends' dev against the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import to_dict
from common.data.language import evaluation_batches
from common.language.architectures import DecoderConfig, IndraConfig
from common.language.prepare import PreparedLanguage, prepare_language
from common.reference import language as reference
from common.runs import RunFolder
from tests.languages import randomise
from tests.parity.backends import MODEL_TOLERANCE, Backend, check_all
from tests.tiny_language import SIZES, recipe, write_articles

KINDS = ("magnitude", "phase")
# A rank jumps where rounding decides between tokens that are nearly as certain: its tolerance is wider.
TOLERANCES = {"r2": MODEL_TOLERANCE, "entropy_rank": 1e-2}


def write_model(backend: Backend, folder: Path, config: Any, prepared: PreparedLanguage, seed: int) -> Any:
    """A random model with the vocabulary of the data, in a checkpoint directory too."""
    module = backend.module("language")
    model = module.build_language_model(config, seed=seed % 2**31)
    randomise([backend], [model], seed)
    save = prepared.tokenizer.save
    module.save_language_model(folder, model, config, training={}, tokenizer_save=save, card="")
    return model


def expected_r2(backend: Backend, models: tuple[Any, Any], prepared: PreparedLanguage) -> dict[str, Any]:
    """1 - squared error / variance of the certainty, from the float64 losses."""
    errors, sure = np.zeros(2), []
    for batch in evaluation_batches(prepared.split("dev"), 16, 2, prepared.frame, stride=16, carry=False):
        arrays, mask = (batch.input_ids[:, 0], batch.segments[:, 0]), batch.mask[:, 0]
        re, im, logits = backend.values(lambda *x: [*models[0](*x).state, models[1](*x).logits])(*arrays)
        log_p = reference.log_softmax(logits)
        certainty = reference.certainty(-(np.exp(log_p) * log_p).sum(-1), logits.shape[-1])
        errors += [pair[0] for pair in reference.phase_magnitude(re, im, certainty, mask)]
        sure.append(certainty[mask])
    every = np.concatenate(sure)
    magnitude, phase = 1.0 - errors / len(every) / every.var()
    return {"magnitude_r2": magnitude, "phase_r2": phase}


@pytest.mark.parametrize("stored", [0, pytest.param(8, marks=pytest.mark.slow)])
def test_a_run_logs_the_r2_of_magnitude_and_phase_on_dev(
    twins: tuple[Backend, Backend], stored: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setenv("RESONANCE_CACHE", str(tmp_path / "cache"))
    config = recipe("indra", write_articles(tmp_path / "articles"), max_steps=1, learning_rate=1e-9)
    prepared = prepare_language(config, say=lambda _: None)
    sizes = {**SIZES, "vocab_size": prepared.tokenizer.vocab_size}
    decoder = DecoderConfig(**sizes, max_position_embeddings=16)
    teacher = write_model(twins[0], tmp_path / "teacher", decoder, prepared, seed)
    indra = IndraConfig(**sizes, context=16, complex_width=8)
    student = write_model(twins[0], tmp_path / "student", indra, prepared, seed + 1)
    taught = {"teacher": str(tmp_path / "teacher"), "stored": stored}
    config = config.changed(base=str(tmp_path / "student"), distillation=taught).validate()
    prepared, found, said = prepare_language(config, say=lambda _: None), [], []
    for backend in twins:
        trainer = backend.module("training.language").LanguageTrainer(config, prepared, say=said.append)
        with RunFolder.create(tmp_path / backend.name, "indra", to_dict(config)) as folder:
            trainer.run(folder)
            (line,) = folder.read_metrics("dev")
        found.append({name: np.float64(line[name]) for name in line if name.startswith(KINDS)})
    assert sum("magnitude_r2 " in line and "phase_r2 " in line for line in said) == 2
    assert found[0].keys() == {f"{kind}_{what}" for kind in KINDS for what in TOLERANCES}
    for what, tolerance in TOLERANCES.items():
        pair = ({name: x for name, x in values.items() if name.endswith(what)} for values in found)
        check_all(f"alignment on dev, {what}", "jax with mlx", *pair, tolerance)
    r2 = expected_r2(twins[0], (student, teacher), prepared)
    for backend, values in zip(twins, found, strict=True):
        ours = {name: values[name] for name in r2}
        check_all("alignment on dev, r2", f"{backend.name} with float64", ours, r2, MODEL_TOLERANCE)


def test_a_recipe_that_aligns_nothing_does_not_ask_its_teacher(
    twins: tuple[Backend, Backend], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setenv("RESONANCE_CACHE", str(tmp_path / "cache"))
    config = recipe("indra", write_articles(tmp_path / "articles"), max_steps=1)
    prepared = prepare_language(config, say=lambda _: None)
    decoder = DecoderConfig(**SIZES, vocab_size=prepared.tokenizer.vocab_size, max_position_embeddings=16)
    write_model(twins[0], tmp_path / "teacher", decoder, prepared, seed)
    config = config.changed(
        distillation={"teacher": str(tmp_path / "teacher"), "phase_magnitude_weight": 0.0}
    ).validate()
    for backend in twins:
        trainer = backend.module("training.language").LanguageTrainer(config, prepared, say=lambda _: None)
        assert trainer.certainties is None and trainer._measure().alignment is None
