"""Data parallel over two local processes, as `mlx.launch` starts them: the run of one process."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="needs MLX: install the extra `mlx`")

import mlx.core as mx

from common.checkpoint import read_tensors
from common.config import RerankerConfig
from common.runs import read_metrics
from mlx_impl import train as mac
from tests.parity.backends import check, check_all
from tests.parity.test_training import WITHOUT_GRADIENT
from tests.tiny import World, command, environment

ROOT = Path(__file__).resolve().parents[3]
LAUNCH = Path(sys.executable).parent / "mlx.launch"
TOLERANCE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def launcher() -> None:
    if not (mx.distributed.is_available("ring") and LAUNCH.exists()):
        pytest.skip("this mlx has no ring backend or no mlx.launch: needs both to join two processes")


def recipe(world: World, **train: Any) -> RerankerConfig:
    """Four steps with terms between queries, and dropout."""
    config = world.config(
        max_steps=4, evaluations=1, checkpoint_every=2, hidden_dropout=0.1, learning_rate=1e-4, **train
    )
    return replace(
        config,
        data=replace(config.data, encoder=str(world.base), dev_split="train"),
        quantum=replace(config.quantum, mode="entanglement", entanglement_weight=0.2),
    )


def launch(recipe: Path, runs: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Two processes of the Mac user's command."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [
        sys.executable,
        "mlx_impl/train.py",
        "rerank",
        "--config",
        str(recipe),
        "--runs",
        str(runs),
        *flags,
    ]
    return subprocess.run(
        [str(LAUNCH), "-n", "2", "--starting-port", str(port), "--", *words],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )


def log_of(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read_metrics(run)]


def test_two_processes_end_where_one_does(world: World, tmp_path: Path) -> None:
    config = recipe(world, batch_size=8, micro_batches=2)
    command(config, tmp_path)
    file = tmp_path / "recipe.py"
    done = launch(file, tmp_path / "two", "--no-evaluate-test")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 x Device(cpu") == done.stdout.count("checkpoint: ") == 1  # the leader alone
    mac.main(["rerank", "--config", str(file), "--runs", str(tmp_path / "one"), "--no-evaluate-test"])
    runs = [tmp_path / name / "tiny" for name in ("one", "two")]
    logs = [log_of(run) for run in runs]
    assert len(logs[0]) == len(logs[1]) == 4
    for one, two in zip(*logs, strict=True):
        assert one.keys() == two.keys() and (one["step"], one["kind"]) == (two["step"], two["kind"])
        values = [[line[key] for key in one if key not in ("step", "kind")] for line in (two, one)]
        label = f"two processes, {one['kind']} of step {one['step']}"
        check(label, "mlx with one process", *values, TOLERANCE)
    start = read_tensors(world.base)
    for name in ("model.safetensors", "resonance.safetensors"):
        tensors = [read_tensors(run / "final" / name) for run in runs]
        tensors = [{key: x for key, x in t.items() if not key.endswith(WITHOUT_GRADIENT)} for t in tensors]
        check_all(f"two processes, {name}", "mlx with one process", tensors[1], tensors[0], TOLERANCE)
    moved = read_tensors(runs[0] / "final")["bert.embeddings.word_embeddings.weight"]
    assert np.abs(moved - start["embeddings.word_embeddings.weight"]).max() > 1e-4


@pytest.mark.slow
def test_two_processes_go_on_where_they_stopped(world: World, tmp_path: Path) -> None:
    command(recipe(world, batch_size=8), tmp_path)
    file, run = tmp_path / "recipe.py", tmp_path / "runs" / "tiny"
    assert launch(file, run.parent).returncode == 0
    expected = (run / "final" / "model.safetensors").read_bytes()
    again = launch(file, run.parent)  # the leader only shows its table, and the other ends with it
    assert again.returncode == 0 and "is finished" in again.stdout, again.stderr
    (run / "results.json").unlink()
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "state" / "4")
    resumed = launch(file, run.parent)
    assert "resumed at step 2 of 4" in resumed.stdout, resumed.stderr
    assert (run / "final" / "model.safetensors").read_bytes() == expected


def test_a_step_that_cannot_be_shared_is_refused(world: World, tmp_path: Path) -> None:
    command(recipe(world, batch_size=3), tmp_path)
    done = launch(tmp_path / "recipe.py", tmp_path / "runs")
    assert "train.batch_size 3 / micro_batches 1 does not divide over 2 devices" in done.stderr


def test_unknown_commands_and_backends_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    from common.errors import UserError

    with pytest.raises(UserError, match=r"no command 'sing'; there is rerank"):
        mac.main(["sing"])
    with pytest.raises(UserError, match=r"did you mean 'rerank'\?"):
        mac.main(["rernak"])
    with pytest.raises(UserError, match=r"leave out --backend, or use scripts/train\.py"):
        mac.main(["rerank", "--backend", "jax"])
    for name, other in (
        ("rerank", "configs/infinito_small.py"),
        ("language", "configs/quantum_resonance.py"),
    ):
        with pytest.raises(UserError, match="this command is for another kind"):
            mac.main([name, "--config", other])
    mac.main([])
    assert "example: python mlx_impl/train.py rerank --config" in capsys.readouterr().out
