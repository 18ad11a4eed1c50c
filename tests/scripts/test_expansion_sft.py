"""`scripts/train.py --config configs/expansion_sft.py`, and what reads its result: MLX's eval and convert."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest

from common.runs import read_metrics
from scripts import train
from tests.test_dependencies import ROOT
from tests.tiny_expansion import write_expander, write_rows

RECIPE = str(ROOT / "configs" / "expansion_sft.py")


def run(*argv: object) -> str:
    """What the command prints; its errors are raised."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        train.main(["--config", RECIPE, "--backend", "jax", *map(str, argv)])
    return out.getvalue()


@pytest.mark.slow
def test_a_run_ends_with_scores_beside_the_template_and_a_checkpoint_that_mlx_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESONANCE_CACHE", str(tmp_path / "cache"))
    rows = write_rows(tmp_path / "rows")
    base = write_expander(tmp_path / "base", rows)
    flags = ("--train.epochs", 0, "--train.max-steps", 2, "--train.batch-size", 4, "--train.evaluations", 1)
    flags += ("--evaluation.queries", 2, "--evaluation.max-tokens", 4, "--prompt.system", "none")
    argv = (
        "--base",
        base,
        "--data",
        rows,
        "--runs",
        tmp_path / "runs",
        "--train.learning-rate",
        1e-2,
        *flags,
    )
    said = run(*argv)
    for part in ("template", "strict", "mlx_impl/convert.py", "parameters learn"):
        assert part in said, said
    folder = tmp_path / "runs" / "expansion_sft"
    dev = [line for line in read_metrics(folder) if line["kind"] == "dev"]
    assert {"loss", "score", "ended"} <= set(dev[0]) and dev[0]["step"] == 2
    assert json.loads((folder / "results.json").read_text())["training"]["best_step"] == 2
    assert "| score |" in (folder / "best" / "README.md").read_text()
    assert "is finished" in run(*argv)
    mlx_reads(folder, base)


def mlx_reads(run_folder: Path, base: Path) -> None:
    """The run's best checkpoint is a Qwen3 of mlx-lm with the base's tokenizer and template, and learned."""
    pytest.importorskip("mlx_lm", reason="needs MLX and mlx-lm: install the extra `mlx`")
    import jax.numpy as jnp
    import mlx.core as mx

    from common.expansion.prompts import ExpansionPrompts, load_tokenizer
    from jax_impl.language import load_language_model
    from mlx_impl.export.gguf import read_template
    from mlx_impl.models.qwen import Origin, load_base, load_trained

    loaded = load_trained(str(run_folder), say=lambda _: None)
    assert loaded.origin.base == run_folder / "best"
    assert read_template(run_folder / "best") == read_template(base)
    ids = ExpansionPrompts(load_tokenizer(run_folder / "best")).prompt("clean router")
    found = np.asarray(loaded.model(mx.array([ids])))
    ours, _ = load_language_model(run_folder / "best")
    np.testing.assert_allclose(found, np.asarray(ours(jnp.array([ids])).logits), rtol=0, atol=1e-3)
    start = load_base(Origin(base)).model(mx.array([ids]))
    assert np.abs(found - np.asarray(start)).max() > 1e-2


@pytest.mark.slow
def test_the_embedded_default_runs_without_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESONANCE_CACHE", str(tmp_path / "cache"))
    flags = (
        "--train.epochs",
        0,
        "--train.max-steps",
        30,
        "--train.evaluations",
        1,
        "--evaluation.queries",
        4,
    )
    said = run("--base", "tiny", "--runs", tmp_path / "runs", "--evaluation.max-tokens", 40, *flags)
    assert "generated: 666 training" in said
    lines = read_metrics(tmp_path / "runs" / "expansion_sft_tiny")
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < 0.7 * losses[0]
