"""The checklist as a user types it, on runs trained here: a good one, spoilt ones, and what is not a run.

The same runs hold what the dashboard of the report shows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.checkpoint import read_tensors
from common.config import RunOptions
from common.errors import UserError
from common.language.config import DistillationConfig, LanguageRecipe
from common.language.workflow import train_language
from scripts import evaluate_lm, validate
from tests.tiny_language import recipe, write_articles

ITEMS = {
    "training ended",
    "values of the log that are not finite",
    "cross-entropy, end / begin",
    "distillation weight reached",
    "validation perplexity, a token",
    "checkpoint loads strictly",
    "weights that are not finite",
    "generated texts that are empty",
    "the same text for the same seed",
    "another text for another seed",
    "repetition of 3-grams",
    "exploration",
}
# Of models this small: they know little after 30 steps.
LOOSE = ("--max-perplexity", "480", "--max-exploration", "1", "--max-new-tokens", "24")


def checked(*argv: object) -> tuple[int, dict[str, Any]]:
    """Exit code and items, by name, of the command."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = validate.main([*map(str, argv), "--json"])
    said = json.loads(out.getvalue())
    assert said["passed"] == (code == 0)
    return code, {item["name"]: item for item in said["items"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """runs/ with a teacher (decoder), its student (indra) and a model with a memory (infinito)."""
    root = tmp_path_factory.mktemp("validate")
    data = write_articles(root / "articles")

    def trained(made: LanguageRecipe) -> None:
        train_language(made, RunOptions(runs=root / "runs", backend="jax"), say=lambda _: None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESONANCE_CACHE", str(root / "cache"))
        trained(recipe("decoder", data, max_steps=20))
        student = recipe("indra", data, max_steps=30)
        trained(
            dataclasses.replace(
                student, distillation=DistillationConfig(teacher=str(root / "runs" / "decoder" / "best"))
            )
        )
        trained(recipe("infinito", data, max_steps=30))
        yield root / "runs"


@pytest.fixture
def copy(runs: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a run, to be spoilt."""
    return lambda name: Path(shutil.copytree(runs / name, tmp_path / name))


def test_a_distilled_run_passes_and_every_item_says_its_value_and_limit(runs: Path) -> None:
    code, items = checked(runs / "indra", *LOOSE)
    assert code == 0, items
    assert items.keys() == ITEMS | {
        "magnitude stable: spread at the end",
        "phase stable: spread at the end",
        "memory used",
    }
    assert items["distillation weight reached"]["value"] == pytest.approx(0.05, abs=0.002)
    assert items["cross-entropy, end / begin"]["value"] < 1
    assert items["memory used"]["result"] == "not applicable" and items["memory used"]["why"]
    assert all(item["limit"] for item in items.values())


def test_a_run_with_a_memory_passes_and_says_what_does_not_apply(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert validate.main([str(runs / "infinito"), *LOOSE]) == 0
    said = capsys.readouterr().out
    for part in ("Checklist of infinito/best", "memory rotation", "there is no teacher", "0 failed"):
        assert part in said


@pytest.mark.parametrize(
    ("flags", "failing"),
    [
        (("--max-perplexity", "1.5"), "validation perplexity, a token"),
        (("--min-exploration", "1", "--max-exploration", "1"), "exploration"),
        (("--max-repetition", "0", "--max-new-tokens", "400"), "repetition of 3-grams"),
        (("--min-utilisation", "1"), "memory utilisation"),
    ],
)
def test_a_limit_that_is_missed_fails_and_alone(runs: Path, flags: tuple[str, ...], failing: str) -> None:
    code, items = checked(runs / "infinito", *LOOSE, *flags)
    assert code == 1
    assert [name for name, item in items.items() if item["result"] == "fail"] == [failing]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def spoil_log(run: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    text = "".join(json.dumps(change(line)) + "\n" for line in lines(run))
    (run / "metrics.jsonl").write_text(text)


@pytest.mark.parametrize(
    ("kind", "change", "failing"),
    [
        ("indra", lambda x: x | {"cross_entropy": 1.0 + x["step"]}, "cross-entropy, end / begin"),
        ("indra", lambda x: x | {"phase": None}, "values of the log that are not finite"),
        ("indra", lambda x: x | {"phase": x["step"] % 20 / 10}, "phase stable: spread at the end"),
        ("indra", lambda x: x | {"magnitude": x["step"] % 20 / 10}, "magnitude stable: spread at the end"),
        ("indra", lambda x: x | {"distillation_weight": 0.03}, "distillation weight reached"),
        ("infinito", lambda x: x | {"rotation": 0.0}, "memory rotation"),
    ],
)
def test_a_log_that_went_wrong_fails(
    copy: Callable[[str], Path], kind: str, change: Callable[[dict[str, Any]], dict[str, Any]], failing: str
) -> None:
    run = copy(kind)
    spoil_log(run, change)
    code, items = checked(run, *LOOSE)
    assert code == 1
    assert [name for name, item in items.items() if item["result"] == "fail"] == [failing]


def test_a_run_that_did_not_end_fails(copy: Callable[[str], Path]) -> None:
    run = copy("infinito")
    shutil.rmtree(run / "final")
    code, items = checked(run, *LOOSE)
    assert code == 1 and items["training ended"]["result"] == "fail"


def test_a_checkpoint_that_lost_a_tensor_or_a_byte_fails_at_loading(copy: Callable[[str], Path]) -> None:
    from safetensors.numpy import save_file

    best = copy("decoder") / "best"
    tensors = read_tensors(best)
    tensors.pop("model.norm.weight")
    save_file(tensors, best / "model.safetensors")
    code, items = checked(best, *LOOSE)
    assert code == 1 and "missing: model.norm.weight" in items["checkpoint loads strictly"]["value"]
    (best / "model.safetensors").write_bytes((best / "model.safetensors").read_bytes()[:-7])
    code, items = checked(best, *LOOSE)
    assert code == 1 and "truncated or corrupt" in items["checkpoint loads strictly"]["value"]


def test_weights_with_a_nan_fail(copy: Callable[[str], Path]) -> None:
    from safetensors.numpy import save_file

    best = copy("decoder") / "best"
    tensors = read_tensors(best)
    tensors["model.embed_tokens.weight"][300, :2] = np.nan
    save_file(tensors, best / "model.safetensors")
    code, items = checked(best, *LOOSE)
    assert code == 1 and items["weights that are not finite"]["value"] == 2


def test_a_checkpoint_outside_a_run_is_checked_without_a_log(runs: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(runs / "decoder" / "best", tmp_path / "downloaded"))
    code, items = checked(alone, *LOOSE)
    assert code == 0, items
    assert items["log"]["result"] == "not applicable" and "in no run's folder" in items["log"]["why"]
    assert "cross-entropy, end / begin" not in items
    (alone / "training.json").unlink()
    code, items = checked(alone, *LOOSE)
    assert code == 0 and items["validation perplexity, a token"]["result"] == "not applicable"


def test_what_cannot_be_checked_is_explained(runs: Path, copy: Callable[[str], Path], tmp_path: Path) -> None:
    reranker = tmp_path / "reranker"
    reranker.mkdir()
    (reranker / "config.json").write_text(json.dumps({"config": {"model": {}}, "environments": [{}]}))
    early = copy("indra")
    for name in ("best", "final"):
        shutil.rmtree(early / name)
    unmeasured = copy("infinito")
    training = json.loads((unmeasured / "best" / "training.json").read_text())
    del training["dev"]
    (unmeasured / "best" / "training.json").write_text(json.dumps(training))
    bert = tmp_path / "bert"
    bert.mkdir()
    (bert / "config.json").write_text(json.dumps({"model_type": "bert"}))
    shutil.copy(runs / "decoder" / "best" / "model.safetensors", bert)
    for argv, message in (
        ((tmp_path / "nowhere" / "x",), "was not found"),
        ((reranker,), "is the run of a reranker, not of a language model: use scripts/analyze.py"),
        ((early,), "has not been evaluated yet, there is no best/"),
        ((unmeasured,), "was never evaluated, training.json has no dev perplexity"),
        ((bert,), "model_type is 'bert'; language models"),
        ((runs / "indra", "--max-repetition", 2), r"--max-repetition is 2\.0; allowed: \[0, 1\]"),
        ((runs / "indra", "--max-new-tokens", 0), "--max-new-tokens is 0; allowed: >= 1"),
    ):
        with pytest.raises(UserError, match=message):
            checked(*argv)


def test_the_report_shows_the_dashboard_and_generation_once_it_was_measured(
    copy: Callable[[str], Path],
) -> None:
    run = copy("infinito")
    page = (run / "report.html").read_text()
    for part in ("Perplexity", "50 to 80", "not reached", "Generation quality", "not measured", "Total loss"):
        assert part in page
    for part in (
        "memory: active slots of 8",
        "Use of the memory on dev",
        "Memory map",
        "Attention",
        "layer 1",
    ):
        assert part in page
    assert "distillation weight, last step" not in page and "utilisation (dev)" not in page
    with contextlib.redirect_stdout(io.StringIO()) as out:
        sizes = ("--prompt-tokens", "4", "--max-new-tokens", "8", "--samples", "3")
        evaluate_lm.main(["--model", str(run), "--metrics", "all", *sizes])
    assert f"report: {run / 'report.html'}" in out.getvalue()
    measured = (run / "report.html").read_text()
    assert "3 texts of 8 tokens" in measured and "Not measured:" not in measured
    assert measured.count("not measured") < page.count("not measured")
