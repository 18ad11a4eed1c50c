"""Many devices and processes train as one: evenly spread or not, by jit or pmap, saved here, resumed there.

As a command: `python tests/jax_impl/training/test_parallel.py BASE OUT` makes the steps of `trajectories` on
the devices that XLA_FLAGS asks for, and writes what they gave.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from common.config import RerankerConfig
from common.runs import read_metrics
from tests.tiny import World, environment

ROOT = Path(__file__).resolve().parents[3]
STEPS, DEVICES = 4, 3  # 4 lists, or 2 of a micro-batch, do not divide over 3 devices
CASES = {"one micro-batch": ("entanglement", 1), "two micro-batches": ("resonance", 2)}
WAYS = ("one device", "jit", "pmap")


def recipe(world: World, case: str) -> RerankerConfig:
    """Terms between queries, terms of lists, dropout, in one or two micro-batches."""
    mode, parts = CASES[case]
    config = world.config(batch_size=4, micro_batches=parts, hidden_dropout=0.1)
    return replace(config, quantum=replace(config.quantum, mode=mode, entanglement_weight=0.5))


def trajectories(base: Path) -> dict[str, np.ndarray]:
    """'case/way/what was logged' -> its values in STEPS steps of gradient descent; 'case/way/p<number>' -> a
    parameter after them."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from common.data.pipeline import ListBatch, arranged
    from jax_impl.training.parallel import Devices
    from jax_impl.training.step import Batch, TrainState, make_step
    from tests.jax_impl.training.test_step import MOMENT, load, random_batch

    world, found = World(base.parent), {}
    for case, way in itertools.product(CASES, WAYS):
        config = recipe(world, case)
        graphdef, learned, fixed = nnx.split(load(world, 0.1), nnx.Param, ...)
        devices = Devices("jit", jax.devices()[:1]) if way == "one device" else Devices(way)
        share, optimizer = devices.share(4, config.train.micro_batches), optax.sgd(0.1)
        step = make_step(config, graphdef, optimizer, jax.random.key(5), devices)
        state = TrainState(learned, fixed, optimizer.init(learned), jnp.zeros((), jnp.int32))
        state, logs = devices.replicate(state), []
        for number in range(STEPS):
            batch = ListBatch(**{k: np.array(v) for k, v in random_batch(number)._asdict().items()})
            batch.related[0, 3] = batch.related[3, 0] = 0  # pairs to push apart too, on different devices
            if share is not None:
                assert (share.rows == -1).any()
                batch = arranged(batch, share.rows, share.order, 0)
            state, logged = step(state, devices.place(Batch(**vars(batch))), MOMENT)
            logs.append({name: float(np.asarray(value).flat[0]) for name, value in logged.items()})
        for name in logs[0]:
            found[f"{case}/{way}/{name}"] = np.asarray([log[name] for log in logs])
        for number, leaf in enumerate(jax.tree.leaves(devices.local(state.learned))):
            found[f"{case}/{way}/p{number}"] = np.asarray(leaf)
    return found


@pytest.fixture(scope="module")
def made(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    out = tmp_path_factory.mktemp("devices") / "made.npz"
    command = [sys.executable, __file__, str(world.base), str(out)]
    flags = f"--xla_force_host_platform_device_count={DEVICES}"
    subprocess.run(command, env=environment(XLA_FLAGS=flags), check=True, timeout=900)
    return dict(np.load(out))


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS[1:])
def test_uneven_lists_on_several_devices_train_as_on_one(
    made: dict[str, np.ndarray], case: str, way: str
) -> None:
    """Logged terms to 1e-4 of their size, parameters to 1e-5, after 4 steps at rate 0.1."""
    names = [name for name in made if name.startswith(f"{case}/one device/")]
    if case == "one micro-batch":
        assert all((made[f"{case}/one device/entanglement_{x}"] > 0).any() for x in ("attract", "repel"))
    for name in names:
        ours, one = made[name.replace("one device", way)], made[name]
        if "/p" in name and name.rpartition("/p")[2].isdigit():
            np.testing.assert_allclose(ours, one, atol=1e-5, err_msg=name)
        else:
            np.testing.assert_allclose(ours, one, rtol=1e-4, atol=1e-5, err_msg=name)


def train_config(world: World) -> RerankerConfig:
    """8 steps of 6 lists in two micro-batches, which do not divide over 4 devices; every term and dropout."""
    config = world.config(
        max_steps=8, batch_size=6, micro_batches=2, checkpoint_every=4, evaluations=1, hidden_dropout=0.1
    )
    data = replace(config.data, dev_split="train", encoder=str(world.base))
    evaluation = replace(config.evaluation, dev_queries=8)
    return replace(
        config, data=data, evaluation=evaluation, quantum=replace(config.quantum, mode="resonance")
    )


def start(
    config: RerankerConfig, runs: Path, processes: int = 1, devices: int = 1, *flags: str
) -> list[subprocess.Popen[str]]:
    """`scripts/train.py` in one or several processes of several devices each."""
    runs.mkdir(parents=True, exist_ok=True)
    (runs / "recipe.py").write_text(
        f"from common.config import *\n\n\ndef get_config():\n    return {config!r}\n"
    )
    command = [sys.executable, "-u", str(ROOT / "scripts" / "train.py"), "--config", str(runs / "recipe.py")]
    command += ["--runs", str(runs), "--no-evaluate-test", *flags]
    started = []
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for number in range(processes):
        extra = [
            "--coordinator",
            f"localhost:{port}",
            "--processes",
            str(processes),
            "--process",
            str(number),
        ]
        started.append(
            subprocess.Popen(
                command + (extra if processes > 1 else []),
                env=environment(XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}"),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return started


def end(started: list[subprocess.Popen[str]], code: int = 0) -> list[str]:
    """What each process said, once all have ended with `code`."""
    try:
        said = [process.communicate(timeout=1200)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [code] * len(started), "\n----\n".join(said)
    return said


def losses(runs: Path) -> list[dict[str, Any]]:
    lines = [line for line in read_metrics(runs / "tiny") if line["kind"] == "train"]
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "kind", "real_tokens", "related_pairs")}
        for line in lines
    ]


def assert_same_run(a: Path, b: Path) -> None:
    """Logged terms to 1e-4, final parameters to 1e-5 but for those whose gradient is 0 analytically."""
    for one, two in zip(losses(a), losses(b), strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5)
    for file in ("model", "resonance"):
        ours, theirs = (load_file(runs / "tiny" / "final" / f"{file}.safetensors") for runs in (a, b))
        for name in ours.keys() - {"classifier.bias"}:
            if not name.endswith("key.bias"):  # Adam makes steps of its rounding errors
                np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5, err_msg=name)


def back_to_the_state_before(runs: Path, copy: Path) -> None:
    """A copy of a finished run as if it had been killed after step 4."""
    shutil.copytree(runs, copy)
    shutil.rmtree(copy / "tiny" / "state" / "8")
    shutil.rmtree(copy / "tiny" / "final")


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_two_processes_of_two_devices_train_as_one_and_go_on_where_the_other_stopped(
    world: World, tmp_path: Path
) -> None:
    config = train_config(world)
    one, four = tmp_path / "one", tmp_path / "four"
    end(start(config, one))
    said = end(start(config, four, 2, 2))
    assert "4 cpu device(s)" in said[0] and "2 processes; this one, the first" in said[0]
    assert "leave 1 of 4 places on 4 devices empty" in said[0]
    assert "dev at step" in said[0] and "dev at step" not in said[1]
    assert_same_run(one, four)
    back_to_the_state_before(four, tmp_path / "on one")
    assert "resumed at step 4 of 8" in end(start(config, tmp_path / "on one"))[0]
    assert_same_run(one, tmp_path / "on one")
    back_to_the_state_before(one, tmp_path / "on four")
    assert "resumed at step 4 of 8" in end(start(config, tmp_path / "on four", 2, 2))[0]
    assert_same_run(one, tmp_path / "on four")


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_pmap_in_two_processes_is_the_same_run(world: World, tmp_path: Path) -> None:
    config = train_config(world)
    end(start(config, tmp_path / "one"))
    pmap = replace(config, train=replace(config.train, parallel="pmap"))
    end(start(pmap, tmp_path / "pmap", 2, 2))
    assert_same_run(tmp_path / "one", tmp_path / "pmap")


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ctrl_c_in_one_process_stops_both_with_a_state_and_an_error_in_one_ends_both(
    world: World, tmp_path: Path
) -> None:
    config = train_config(world)
    config = replace(config, train=replace(config.train, max_steps=4000, checkpoint_every=1000))
    started = start(config, tmp_path, 2, 1)
    for line in started[0].stdout or ():
        if line.startswith("dev at step 0"):
            started[1].send_signal(signal.SIGINT)
            break
    said = end(started, 130)
    states = [int(path.name) for path in (tmp_path / "tiny" / "state").iterdir() if path.name.isdigit()]
    assert states and max(states) % 10 == 0 and f"stopped at step {max(states)};" in said[0]
    other = replace(config, train=replace(config.train, learning_rate=0.5))
    said = end(start(other, tmp_path, 2, 1), 2)  # only the first process looks into the folder
    assert "learning_rate: 0.001 before, 0.5 now" in said[0] and "another process" in said[1]


def main() -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    np.savez(sys.argv[2], **trajectories(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
