"""Training a language model: it learns, resumes exactly, stops early, and refuses what cannot be trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.checkpoint import read_tensors
from common.config import to_dict
from common.data.language import LanguageBatch
from common.errors import UserError
from common.language.evaluation import evaluate_perplexity
from common.language.prepare import prepare_language
from common.language.text import load_tokenizer
from common.runs import RunFolder
from jax_impl.language_scoring import load_segment_scorer
from jax_impl.training.language import LanguageTrainer
from tests.tiny_language import recipe, write_articles, write_corpus

slow = pytest.mark.slow
KINDS = (pytest.param("decoder", marks=slow), pytest.param("indra", marks=slow), "infinito")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESONANCE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_articles(tmp_path_factory.mktemp("data") / "articles")


def train(config: Any, runs: Path, **how: Any) -> tuple[dict[str, Any], Path, list[str]]:
    """The summary, the run's folder, and what was said."""
    said: list[str] = []
    prepared = prepare_language(config.validate(), say=said.append)
    trainer = how.pop("trainer", LanguageTrainer)(config, prepared, say=said.append)
    minutes = how.pop("minutes", None)
    with RunFolder.create(runs, config.name, to_dict(config), **how) as folder:
        summary = trainer.run(folder, minutes)
    return summary, folder.path, said


class Interrupted(LanguageTrainer):
    """Gets Ctrl-C in its fifth step."""

    def _one_step(self, step: int, batch: LanguageBatch) -> Any:
        if self._steps_done() == 4:
            import signal

            signal.raise_signal(signal.SIGINT)
        return super()._one_step(step, batch)


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_ends_as_if_it_had_not_been(kind: str, corpus: Path, tmp_path: Path) -> None:
    config = recipe(kind, corpus, average=0.9)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "resumed", trainer=Interrupted)
    resumed, folder, said = train(config, tmp_path / "resumed")
    whole, other, _ = train(config, tmp_path / "whole")
    assert "resumed at step 5 of 8" in said
    assert resumed == whole and resumed["steps"] == 8
    weights, expected = read_tensors(folder / "final"), read_tensors(other / "final")
    assert weights.keys() == expected.keys()
    assert all((weights[key] == expected[key]).all() for key in weights)


def test_what_can_be_learned_is_learned_and_the_best_checkpoint_says_the_same(
    corpus: Path, tmp_path: Path
) -> None:
    text = write_corpus(tmp_path / "corpus.txt")
    config = recipe("decoder", text, max_steps=60, learning_rate=2e-2)
    summary, folder, _ = train(config, tmp_path)
    lines = [line for line in RunFolder(folder, owned=False).read_metrics("train")]
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    prepared = prepare_language(config, say=lambda _: None)
    scorer = load_segment_scorer(folder / "best")
    found = evaluate_perplexity(
        scorer, prepared.split("dev"), prepared.tokenizer.end, cache=False, batch_size=3
    )
    assert found.perplexity.token == pytest.approx(summary["best_dev"], rel=1e-4)
    assert load_tokenizer(folder / "best").fingerprint() == prepared.tokenizer.fingerprint()
    assert "perplexity a token" in (folder / "best" / "README.md").read_text()


def test_a_run_without_progress_stops_early_and_keeps_its_best(corpus: Path, tmp_path: Path) -> None:
    config = recipe(
        "decoder", corpus, max_steps=40, evaluations=20, patience=2, learning_rate=0.9, warmup=0.0
    )
    summary, _, said = train(config, tmp_path)
    assert summary["steps"] < 40 and summary["best_step"] == summary["steps"] - 4
    assert any(line.startswith("no better dev result in 2 evaluations") for line in said)


def test_a_run_whose_time_is_up_ends_at_its_next_evaluation_and_is_finished(
    corpus: Path, tmp_path: Path
) -> None:
    config = recipe("decoder", corpus, max_steps=8, evaluations=4)
    summary, folder, said = train(config, tmp_path, minutes=0.0)
    assert (summary["steps"], summary["planned_steps"], summary["stopped"]) == (2, 8, "time")
    assert summary["best_step"] == 2 and (folder / "best").is_dir() and (folder / "final").is_dir()
    assert "the time is up: stopped at step 2 of 8" in said
    again, _, _ = train(config, tmp_path)
    assert again == summary


def test_a_loss_that_is_not_finite_ends_the_run_with_what_to_do(corpus: Path, tmp_path: Path) -> None:
    class Broken(LanguageTrainer):
        def _one_step(self, step: int, batch: LanguageBatch) -> Any:
            return dict(super()._one_step(step, batch)) | {"loss": np.float32("nan")}

    with pytest.raises(UserError, match=r"step 1: loss is not a finite number.*--train\.learning-rate"):
        train(recipe("decoder", corpus), tmp_path, trainer=Broken)


def test_fine_tuning_begins_with_the_base_and_refuses_another_kind(corpus: Path, tmp_path: Path) -> None:
    _, folder, _ = train(recipe("decoder", corpus), tmp_path)
    text = write_corpus(tmp_path / "task.txt")
    tuned = recipe("decoder", text, max_steps=1, learning_rate=1e-8, evaluations=1).changed(
        name="tuned", base=str(folder)
    )
    _, after, _ = train(tuned, tmp_path)
    before, weights = read_tensors(folder / "best"), read_tensors(after / "final")
    assert all(np.abs(weights[key] - before[key]).max() < 1e-6 for key in before)
    other = dataclasses.replace(recipe("infinito", text), base=str(folder))
    with pytest.raises(UserError, match="is a Decoder, the recipe trains a Infinito"):
        train(other, tmp_path)


def test_a_teacher_with_another_vocabulary_is_refused_with_both_sizes(corpus: Path, tmp_path: Path) -> None:
    _, folder, _ = train(recipe("decoder", corpus, max_steps=1, evaluations=1), tmp_path)
    text = write_corpus(tmp_path / "task.txt")
    student = recipe("decoder", text).changed(name="student", distillation={"teacher": str(folder)})
    with pytest.raises(UserError, match=r"has a vocabulary of \d+ tokens, the student \d+"):
        train(student, tmp_path)
    lost = student.changed(distillation={"teacher": str(tmp_path / "nowhere")})
    with pytest.raises(UserError, match=r"was not found[\s\S]*--preset teacher"):
        train(lost, tmp_path)


@slow
def test_a_stored_teacher_teaches_as_one_that_runs_in_every_step(corpus: Path, tmp_path: Path) -> None:
    _, folder, _ = train(recipe("decoder", corpus, max_steps=2, evaluations=1), tmp_path)
    losses = []
    for stored in (0, 10_000):
        student = recipe("indra", corpus, max_steps=3, evaluations=1).changed(
            name=f"student{stored}",
            distillation={"teacher": str(folder), "stored": stored, "end_weight": 1.0},
        )
        # fixed rows for both: what a step shows must not depend on how the teacher is asked
        _, run, _ = train(student, tmp_path, trainer=FixedRows)
        lines = RunFolder(run, owned=False).read_metrics("train")
        losses.append([[line[name] for name in TERMS] for line in lines])
    assert np.allclose(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    first, last = losses[0][0], losses[0][-1]
    assert first[1] > 0 and first[2] > 0 and last[4] > first[4]


TERMS = ("next_token", "distillation", "magnitude", "phase", "distillation_weight")


class FixedRows(LanguageTrainer):
    """Reads the same rows in every epoch, whether the teacher's outputs are stored or not."""

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__(*args, **how)
        self.plan.fixed = True


def test_a_corpus_smaller_than_a_step_and_a_bad_recipe_are_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fewer than the 4000 of one step"):
        train(recipe("decoder", corpus, batch_size=4000), tmp_path)
    with pytest.raises(UserError, match=r"train\.unroll is 2; allowed: 1 but for Infinito") as raised:
        recipe("decoder", corpus, unroll=2, warmup=1.0).changed(evaluation={"stride": 40}).validate()
    assert "train.warmup is 1.0; allowed: [0, 1)" in str(raised.value)
    assert "evaluation.stride is 40; allowed: 1 to the context, 16" in str(raised.value)
