"""The commands of language models as a user types them: prepare, train, generate, evaluate, compare."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from common.checkpoint import read_tensors
from common.errors import UserError
from scripts import compare, evaluate_lm, generate, prepare_data, train
from tests.tiny_language import write_articles

RECIPE = """
from common.language.config import DecoderConfig, DecoderRecipe, LanguageDataConfig, LanguageTrainConfig


def get_config():
    return DecoderRecipe(
        name="tiny",
        model=DecoderConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
        ),
        data=LanguageDataConfig(name={data!r}, vocab_size=512),
        train=LanguageTrainConfig(epochs=0.0, max_steps=4, batch_size=4, evaluations=1, learning_rate=1e-2),
    )
"""


def run(command: Any, *argv: object) -> str:
    """What a command prints; its errors are raised."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        command.main([str(word) for word in argv])
    return out.getvalue()


@dataclass(frozen=True)
class Project:
    recipe: Path
    runs: Path
    data: Path
    trained: str

    @property
    def run(self) -> Path:
        return self.runs / "tiny"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("language")
    data = write_articles(root / "articles")
    recipe = root / "recipe.py"
    recipe.write_text(RECIPE.format(data=str(data)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESONANCE_CACHE", str(root / "cache"))
        trained = run(train, "--config", recipe, "--runs", root / "runs")
        yield Project(recipe, root / "runs", data, trained)


def test_preparing_says_sizes_and_where_the_tokens_lie(project: Project) -> None:
    said = run(prepare_data, project.data, "--config", project.recipe)
    for part in ("train 12 documents", "tokenizer: bpe-512", "of which are counted", "steps of 4 x 1 x 32"):
        assert part in said
    assert Path(said.split("tokens: ")[-1].strip()).is_dir()


def test_training_ends_with_test_perplexity_and_a_report(project: Project) -> None:
    for part in ("dev at step 4, static: perplexity", "split test", "word perplexity", "scripts/generate.py"):
        assert part in project.trained
    results = json.loads((project.run / "results.json").read_text())
    assert results["training"]["steps"] == 4 and results["test"][0]["mode"] == "static"
    assert "word perplexity" in (project.run / "report.html").read_text()
    again = run(train, "--config", project.recipe, "--runs", project.runs)
    assert "is finished" in again and "dev at step" not in again


def test_generating_is_the_same_for_a_seed_and_never_writes_unknown(project: Project, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Ada has the\nBob\n")
    argv = ("--model", project.run, "--file", prompts, "--max-new-tokens", 12, "--json")
    first, again, other = (run(generate, *argv, "--seed", seed) for seed in (1, 1, 2))
    rows = [json.loads(line) for line in first.splitlines()]
    assert first == again != other
    assert [row["prompt"] for row in rows] == ["Ada has the", "Bob"]
    assert all("<unk>" not in row["text"] for row in rows)
    streamed = run(
        generate, "--model", project.run, "--prompt", "Ada", "--max-new-tokens", 5, "--temperature", 0
    )
    assert streamed.startswith("Ada")


def test_a_dialogue_ends_with_an_empty_line(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["Ada has", "", "never asked"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    said = run(generate, "--model", project.run, "--interactive", "--max-new-tokens", 3)
    assert said.startswith("Ada has") and next(lines) == "never asked"


def test_a_dialogue_goes_on_after_a_prompt_that_cannot_be_continued(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["Ada has the " * 30, "Bob", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    said = run(generate, "--model", project.run, "--interactive", "--max-new-tokens", 3)
    assert "the model's context is 32" in capsys.readouterr().err
    assert "\nBob" in f"\n{said.removeprefix('Ada has the ' * 30)}"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "there is no prompt: give --prompt TEXT"),
        (("--prompt", " "), "a prompt is empty"),
        (("--prompt", "Ada", "--top-p", "0"), r"--top-p is 0\.0; allowed: \(0, 1\]"),
        (("--prompt", "Ada", "--top-p", "1.5"), r"--top-p is 1\.5"),
        (("--prompt", "Ada", "--temperature", "-1"), r"--temperature is -1\.0; allowed: >= 0"),
        (("--prompt", "Ada has the " * 30), r"has \d+ tokens, but the model's context is 32"),
        (("--file", "nowhere.txt"), r"nowhere\.txt: cannot be read"),
        (("--prompt", "Ada", "--explore"), r"--explore is noise on .* this model has no memory"),
    ],
)
def test_what_cannot_be_generated_is_explained(project: Project, argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(generate, "--model", project.run, *argv)


def test_evaluating_all_metrics_puts_human_text_beside_the_models(project: Project, tmp_path: Path) -> None:
    sizes = ("--prompt-tokens", 4, "--max-new-tokens", 8, "--samples", 3)
    said = run(evaluate_lm, "--model", project.run, "--metrics", "all", *sizes, "--out", tmp_path)
    for part in ("word perplexity", "human", "character repetition 1", "bleu 4", "self bleu", "exploration"):
        assert part in said
    found = json.loads((tmp_path / "evaluation_lm.json").read_text())
    results = json.loads((project.run / "results.json").read_text())
    assert found["perplexity"][0]["token"] == pytest.approx(results["test"][0]["token"], rel=1e-5)
    assert len(found["samples"]) == 3 and found["generation"]["human"]["bleu_1"] > 0
    assert "<table" in (tmp_path / "evaluation_lm.html").read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--stride", "33"), "--stride is 33; allowed: 1 to the context, 32"),
        (("--metrics", "human", "--max-new-tokens", "9999"), "no document has 10031 tokens"),
        (("--top-p", "0"), r"--top-p is 0\.0; allowed: \(0, 1\]"),
    ],
)
def test_what_cannot_be_evaluated_is_explained(project: Project, argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(evaluate_lm, "--model", project.run, *argv)


def test_places_and_the_other_model_are_checked_before_anything_is_read(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("read")

    for module, name in ((evaluate_lm, "prepare_language"), (compare, "load_generator")):
        monkeypatch.setattr(module, name, never)
    file = tmp_path / "file"
    file.touch()
    lost, closed = r"was not found[\s\S]*a run of configs/\{infinito_small", "cannot be written"
    for given, message in ((("--against", tmp_path / "nowhere"), lost), (("--out", file), closed)):
        with pytest.raises(UserError, match=message):
            run(evaluate_lm, "--model", project.run, *given)
    with pytest.raises(UserError, match="cannot be written"):
        run(compare, "--model1", project.run, "--model2", project.run, "--out", file)


def test_a_perplexity_is_put_beside_another_s_on_the_same_documents(project: Project, tmp_path: Path) -> None:
    """Against a copy of itself, and against one whose output is made flat: uniform over its vocabulary."""
    flat = tmp_path / "flat"
    shutil.copytree(project.run / "best", flat)
    tensors = read_tensors(flat)
    file = next(flat.glob("*.safetensors"))
    save_file(
        {key: np.zeros_like(value) if value.ndim == 2 else value for key, value in tensors.items()}, file
    )
    out = ("--out", tmp_path / "out")
    same = run(evaluate_lm, "--model", project.run, "--against", project.run / "best", *out)
    assert "[1.0000, 1.0000]" in same
    run(evaluate_lm, "--model", project.run, "--against", flat, *out)
    found = json.loads((tmp_path / "out" / "evaluation_lm.json").read_text())
    (row,) = found["against"]["rows"]
    own = found["perplexity"][0]
    size = json.loads((flat / "config.json").read_text())["vocab_size"]
    uniform = own["tokens"] * np.log(size) / own["words"]
    assert row["ratio"] == pytest.approx(own["word"] / np.exp(uniform), rel=1e-3)
    assert row["low"] < row["ratio"] < row["high"]
    said = run(evaluate_lm, "--model", project.run, "--against", flat, *out, "--max-documents", 1)
    found = json.loads((tmp_path / "out" / "evaluation_lm.json").read_text())
    (row,) = found["against"]["rows"]
    assert row["ratio"] < 1 and row["low"] is row["high"] is None and "one has no interval" in said


def test_comparing_shows_texts_differences_and_intervals(project: Project, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Ada has the\nBob\nEve has\n")
    models = ("--model1", project.run / "best", "--model2", project.run / "final")
    said = run(compare, *models, "--prompts", prompts, "--max-new-tokens", 6, "--out", tmp_path / "out")
    for part in ("=== Bob", "--- tiny/best", "--- tiny/final", "95 % interval", "[0.000, 0.000]"):
        assert part in said  # best is the last step: both write the same
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert len(found["samples"]) == 3 and len(found["samples"][0]["texts"]) == 2
    assert "Eve has" in (tmp_path / "out" / "comparison.html").read_text()
    with pytest.raises(UserError, match="has no prompt"):
        (tmp_path / "empty").write_text("\n")
        run(compare, *models, "--prompts", tmp_path / "empty")
