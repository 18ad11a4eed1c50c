"""The checklist as a user types it, on a run trained here: as it is, with limits it misses, spoilt, and on
what is no language model's run. The report of that run."""

from __future__ import annotations

import contextlib
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
from common.language.workflow import train_language
from scripts import evaluate_lm, validate
from tests.tiny_language import recipe, write_articles

# A model this small knows little after 12 steps.
LOOSE = ("--max-perplexity", "500", "--max-exploration", "1", "--max-new-tokens", "8", "--backend", "jax")


def checked(*argv: object) -> tuple[int, dict[str, Any]]:
    """Exit code and items, by name, of the command."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = validate.main([*map(str, argv), "--json"])
    said = json.loads(out.getvalue())
    assert said["passed"] == (code == 0)
    return code, {item["name"]: item for item in said["items"]}


def failing(items: dict[str, Any]) -> list[str]:
    return [name for name, item in items.items() if item["result"] == "fail"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run with a memory."""
    root = tmp_path_factory.mktemp("validate")
    data = write_articles(root / "articles")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESONANCE_CACHE", str(root / "cache"))
        options = RunOptions(runs=root / "runs", backend="jax")
        yield train_language(recipe("infinito", data, max_steps=12), options, say=lambda _: None).folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the run, to be spoilt."""
    return lambda name: Path(shutil.copytree(trained, tmp_path / name))


def test_a_run_passes_and_every_item_says_value_limit_and_result(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert validate.main([str(trained), *LOOSE]) == 0
    said = capsys.readouterr().out
    for part in (
        "Checklist of infinito/best",
        "memory rotation",
        "<= 500",
        "there is no teacher",
        "0 failed",
    ):
        assert part in said


def test_limits_that_are_missed_fail_and_the_command_exits_with_1(trained: Path) -> None:
    code, items = checked(trained, *LOOSE, "--max-perplexity", 1.5, "--min-utilisation", 1)
    assert code == 1
    assert failing(items) == ["memory utilisation", "validation perplexity, a token"]
    assert items["the same text for the same seed"]["result"] == "pass"
    assert items["distillation weight reached"]["result"] == "not applicable"


def test_a_checkpoint_that_lost_a_tensor_or_a_byte_fails_at_loading(copy: Callable[[str], Path]) -> None:
    from safetensors.numpy import save_file

    best = copy("spoilt") / "best"
    tensors = read_tensors(best)
    tensors.pop("norm.weight")
    save_file(tensors, best / "model.safetensors")
    code, items = checked(best, *LOOSE)
    assert code == 1 and failing(items) == ["checkpoint loads strictly"]
    assert "missing: norm.weight" in items["checkpoint loads strictly"]["value"]
    (best / "model.safetensors").write_bytes((best / "model.safetensors").read_bytes()[:-7])
    _, items = checked(best, *LOOSE)
    assert "truncated or corrupt" in items["checkpoint loads strictly"]["value"]


def test_a_checkpoint_outside_a_run_is_checked_without_a_log_and_a_nan_in_it_fails(
    copy: Callable[[str], Path], tmp_path: Path
) -> None:
    from safetensors.numpy import save_file

    alone = (copy("spoilt") / "best").rename(tmp_path / "downloaded")
    tensors = read_tensors(alone)
    tensors["memory.null"][:2] = np.nan
    save_file(tensors, alone / "model.safetensors")
    (alone / "training.json").unlink()
    code, items = checked(alone, *LOOSE)
    assert code == 1 and failing(items) == ["weights that are not finite"]
    assert items["weights that are not finite"]["value"] == 2
    assert "in no run's folder" in items["log"]["why"] and "cross-entropy, end / begin" not in items
    assert items["validation perplexity, a token"]["result"] == "not applicable"


def test_what_cannot_be_checked_is_explained(copy: Callable[[str], Path], tmp_path: Path) -> None:
    reranker, early, bert = tmp_path / "reranker", copy("early"), tmp_path / "bert"
    for folder, config in (
        (reranker, {"config": {"model": {}, "quantum": {}}, "environments": [{}]}),
        (bert, {"model_type": "bert"}),
    ):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(early / "best" / "model.safetensors", bert)
    shutil.rmtree(early / "best")
    for argv, message in (
        ((tmp_path / "nowhere" / "x",), "was not found"),
        ((reranker,), r"is the run of a reranker or an expander.*use scripts/analyze\.py"),
        ((early,), "has not been evaluated yet, there is no best/"),
        ((bert,), "model_type is 'bert'; language models"),
        ((early, "--max-repetition", 2), r"--max-repetition is 2\.0; allowed: \[0, 1\]"),
        ((early, "--max-new-tokens", 0), "--max-new-tokens is 0; allowed: >= 1"),
    ):
        with pytest.raises(UserError, match=message):
            checked(*argv)


def test_the_report_shows_the_model_and_generation_once_it_was_measured(
    copy: Callable[[str], Path],
) -> None:
    run = copy("measured")
    page = (run / "report.html").read_text()
    for part in (
        "memory: active slots of 8",
        "Memory map",
        "layer 1",
        "rotation: slots replaced",
        "Not measured:",
    ):
        assert part in page, part
    look = json.loads((run / "inspection.json").read_text())
    layers = np.asarray(look["attention"]["layers"])
    assert layers.shape == (2, 16, 16) and np.allclose(layers.sum(-1), 1, atol=2e-3)
    assert not np.triu(layers, 1).any() and look["attention"]["tokens"][0] == "<|endoftext|>"
    importance, replaced = np.asarray(look["memory"]["importance"]), look["memory"]["replaced"]
    assert importance.shape == (8, len(replaced)) and replaced[0] == 4  # as many as a segment writes
    assert ((importance[:, 0] > 0).sum(), np.asarray(look["memory"]["age"])[:, 0].max()) == (4, 0)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        sizes = ("--prompt-tokens", "4", "--max-new-tokens", "8", "--samples", "3", "--backend", "jax")
        evaluate_lm.main(["--model", str(run), "--metrics", "all", *sizes])
    assert f"report: {run / 'report.html'}" in out.getvalue()
    measured = (run / "report.html").read_text()
    assert "3 texts of 8 tokens" in measured and "Not measured:" not in measured
