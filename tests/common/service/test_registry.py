"""The registry of models: versions that are whole, promotions that survive a crash, damage refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import common.service.registry
from common.errors import UserError
from common.service.registry import Registry
from tests.tiny import environment


def model(folder: Path, weight: bytes = b"one") -> Path:
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weight)
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    made = Registry(tmp_path / "models")
    for number in (1, 2, 3):
        made.add("ranker", model(tmp_path / f"run{number}", bytes([number]) * 9), note=f"run {number}")
    return made


def now(registry: Registry) -> int | None:
    version = registry.current_version("ranker")
    return None if version is None else version.number


def test_versions_are_added_whole_and_listed(registry: Registry, tmp_path: Path) -> None:
    versions = registry.versions("ranker")
    assert [(v.number, v.note, v.bytes) for v in versions] == [(n, f"run {n}", 13) for n in (1, 2, 3)]
    assert registry.names() == ["ranker"] and registry.versions("other") == []
    assert (versions[1].path / "model.safetensors").read_bytes() == b"\2" * 9
    assert (versions[1].path / "1_Pooling" / "config.json").exists()
    assert versions[1].path.name == "ranker-2"  # what a table calls it
    assert registry.add("ranker", tmp_path / "run2").number == 2  # known content is no new version
    assert registry.add("encoder", tmp_path / "run2").number == 1


def test_promotions_and_rollbacks_lie_on_each_other(registry: Registry) -> None:
    assert now(registry) is None
    with pytest.raises(UserError, match=r"no version was promoted; .* promote ranker 3"):
        registry.current("ranker")
    for number in (1, 2, 3, 1):
        registry.promote("ranker", number)
    assert now(registry) == 1 and registry.current("ranker") == registry.versions("ranker")[0].path
    assert [registry.rollback("ranker").number for _ in range(2)] == [3, 2]
    assert registry.promote("ranker").number == 3  # the newest
    assert [registry.rollback("ranker").number for _ in range(2)] == [2, 1]
    with pytest.raises(UserError, match="nothing to go back to, version 1 is the only one"):
        registry.rollback("ranker")
    assert now(registry) == 1
    actions = [change.action for change in registry.history("ranker")]
    assert actions == ["promote"] * 4 + ["rollback"] * 2 + ["promote"] + ["rollback"] * 2


@pytest.mark.parametrize("damage", ["changed", "missing", "added"])
def test_a_damaged_version_is_refused_and_the_current_one_stays(registry: Registry, damage: str) -> None:
    registry.promote("ranker", 1)
    folder = registry.versions("ranker")[1].path
    if damage == "changed":
        (folder / "model.safetensors").write_bytes(b"\2" * 8 + b"\3")
    elif damage == "missing":
        (folder / "model.safetensors").unlink()
    else:
        (folder / "new.json").write_text("{}")
    with pytest.raises(UserError, match=r"ranker-2: damaged(?s:.*)(other content|missing|not of this)"):
        registry.promote("ranker", 2)
    assert now(registry) == 1
    (registry.versions("ranker")[0].path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"ranker-1: damaged(?s:.*)config.json: other content"):
        registry.current("ranker")
    registry.promote("ranker", 3)
    with pytest.raises(UserError, match="ranker-1: damaged"):
        registry.rollback("ranker")
    assert now(registry) == 3


@pytest.mark.parametrize("step", ["_take", "sync", "write_file"])
def test_a_failure_in_the_middle_leaves_the_state_before(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    registry.promote("ranker", 1)
    source = model(tmp_path / "run4", b"four")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(common.service.registry, step, full)
        with pytest.raises(UserError, match=r"run4: not added, nothing has changed \(No space left"):
            registry.add("ranker", source)
    assert [v.number for v in registry.versions("ranker")] == [1, 2, 3] and now(registry) == 1
    assert registry.add("ranker", source).number == 4


@pytest.mark.parametrize("renames", [0, 1])
def test_a_killed_writer_leaves_a_whole_state(registry: Registry, tmp_path: Path, renames: int) -> None:
    """Killed before each of the two renames: the manifest's, the version's."""
    registry.promote("ranker", 1)
    program = f"""
import os, pathlib, signal
from common.service.registry import Registry
left, rename, replace = [{renames}], pathlib.Path.rename, pathlib.Path.replace
def dying(real):
    def call(self, target):
        if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return real(self, target)
    return call
pathlib.Path.rename, pathlib.Path.replace = dying(rename), dying(replace)
Registry({str(registry.root)!r}).add("ranker", {str(model(tmp_path / "run4", b"four"))!r})
"""
    killed = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True)
    assert killed.returncode == -9, killed.stderr
    assert list((registry.root / "ranker").glob(".adding-*"))
    assert [v.number for v in registry.versions("ranker")] == [1, 2, 3] and now(registry) == 1
    assert registry.add("ranker", tmp_path / "run4").number == 4  # nothing is locked any more
    assert not list((registry.root / "ranker").glob(".adding-*"))


def test_links_take_no_space_and_are_verified_too(tmp_path: Path) -> None:
    source, registry = model(tmp_path / "run"), Registry(tmp_path / "models")
    version = registry.add("ranker", source, link=True)
    assert os.path.samefile(source / "model.safetensors", version.path / "model.safetensors")
    (source / "model.safetensors").write_bytes(b"two")  # in place, which no command of ours does
    with pytest.raises(UserError, match="damaged"):
        registry.promote("ranker")


def test_a_source_that_changes_meanwhile_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, registry = model(tmp_path / "run"), Registry(tmp_path / "models")
    copy = common.service.registry.shutil.copyfile

    def changing(one: Path, two: Path) -> None:
        one.write_bytes(b"changed")
        copy(one, two)

    monkeypatch.setattr(common.service.registry.shutil, "copyfile", changing)
    with pytest.raises(UserError, match="changed while it was copied"):
        registry.add("ranker", source)
    assert registry.versions("ranker") == []


def test_what_is_no_model_and_no_name_is_refused(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: holds no model; needed are config.json"):
        registry.add("ranker", tmp_path / "empty")
    with pytest.raises(UserError, match="no directory"):
        registry.add("ranker", tmp_path / "nowhere")
    for name in ("", "../ranker", "a/b", ".hidden", "x" * 101):
        with pytest.raises(UserError, match="model name"):
            registry.add(name, tmp_path / "run1")
    with pytest.raises(UserError, match="no version 7; there are 1, 2, 3"):
        registry.promote("ranker", 7)
    with pytest.raises(UserError, match="no model 'other'"):
        registry.promote("other")
    assert registry.names() == ["ranker"]


def test_a_history_that_is_none_is_named(registry: Registry) -> None:
    (registry.root / "ranker" / "history.json").write_text(json.dumps({"changes": [{"number": 1}]}))
    with pytest.raises(UserError, match=r"history.json: not a history"):
        registry.current("ranker")
