"""Checkpoint directories: whole or not at all, and strict about every tensor."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import common.checkpoint as checkpoint
from common.checkpoint import (
    check_keys,
    check_writable,
    read_config,
    read_tensors,
    surviving,
    write_checkpoint,
)
from common.errors import UserError


def save(directory: Path, value: float = 1.0, **change: object) -> None:
    parts: dict[str, object] = {
        "config": {"model_type": "bert", "value": value},
        "tensors": {"a.weight": np.full((64, 32), value, np.float32)},
        "resonance": {"gamma": np.asarray(20.0, np.float32)},
        "training": {"ndcg": np.float32(0.5)},
        "tokenizer_save": lambda place: (place / "tokenizer.json").write_text("{}"),
        "card": "# card\n",
    }
    write_checkpoint(directory, **(parts | change))  # type: ignore[arg-type]


def siblings(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.parent.iterdir())


def test_a_checkpoint_reads_back_as_it_was_written(tmp_path: Path) -> None:
    import ml_dtypes

    rng = np.random.default_rng(7)
    tensors = {
        "f32": rng.normal(size=(3, 5)).astype(np.float32),
        "f16": rng.normal(size=4).astype(np.float16),
        "bf16": rng.normal(size=(2, 2)).astype(ml_dtypes.bfloat16),
        "transposed view": rng.normal(size=(3, 5)).astype(np.float32).T,
        "scalar": np.asarray(2.5, np.float32),
    }
    save(tmp_path / "model", tensors=tensors)
    found = read_tensors(tmp_path / "model")
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.dtype
        np.testing.assert_array_equal(found[key], tensor)
    assert read_tensors(tmp_path / "model" / "resonance.safetensors")["gamma"] == 20
    assert json.loads((tmp_path / "model" / "training.json").read_text()) == {"ndcg": 0.5}
    assert (tmp_path / "model" / "tokenizer.json").exists()


def test_a_folder_in_place_of_the_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match=r"config\.json: cannot be read \(Is a directory\)"):
        read_config(tmp_path)


def test_a_place_that_cannot_be_written_is_known_before_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("kept")
    for good in (tmp_path / "file", tmp_path / "new" / "folder" / "file"):
        check_writable(good)
    with pytest.raises(UserError, match=r"cannot be written \(Is a directory\)"):
        check_writable(tmp_path)
    with pytest.raises(UserError, match=r"file/below/it: cannot be written \(Not a directory\)"):
        check_writable(tmp_path / "file" / "below" / "it")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def refuse(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint.tempfile, "TemporaryFile", refuse)  # root may write everywhere
    with pytest.raises(UserError, match=r"new: cannot be written \(Permission denied\)"):
        check_writable(tmp_path / "new")


def test_saving_again_replaces_the_checkpoint_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    for value in (1.0, 2.0, 3.0):
        save(tmp_path / "model", value)
    assert read_config(tmp_path / "model")["value"] == 3
    assert siblings(tmp_path / "model") == ["model"]


@pytest.mark.parametrize("failing", ["model.safetensors", "training.json", "config.json"])
def test_a_full_disk_keeps_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    save(tmp_path / "model", 1.0)
    write = checkpoint._write

    def half(path: Path, data: bytes) -> None:
        if path.name != failing:
            return write(path, data)
        write(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write", half)
    with pytest.raises(UserError, match=r"(?s)model: No space left.*untouched.*MiB free.*free some space"):
        save(tmp_path / "model", 2.0)
    assert read_config(tmp_path / "model")["value"] == 1
    assert (read_tensors(tmp_path / "model")["a.weight"] == 1).all()
    assert siblings(tmp_path / "model") == ["model"]


def test_a_tokenizer_that_meets_a_full_disk_is_the_same_error(tmp_path: Path) -> None:
    def full(_: Path) -> None:
        raise Exception("No space left on device (os error 28)")  # as the tokenizers library words it

    save(tmp_path / "model", 1.0)
    with pytest.raises(UserError, match="No space left on device"):
        save(tmp_path / "model", 2.0, tokenizer_save=full)
    assert read_config(tmp_path / "model")["value"] == 1


def test_a_real_write_limit_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    save(tmp_path / "model", 1.0)
    program = f"""
import resource
import numpy as np
from common.checkpoint import write_checkpoint
from common.errors import run_command
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
run_command(lambda: write_checkpoint({str(tmp_path / "model")!r}, config={{"value": 2}},
    tensors={{"a.weight": np.zeros((64, 64), np.float32)}}, resonance=None, training={{}},
    tokenizer_save=lambda place: None, card=""))
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: could not save the checkpoint")
    assert "Traceback" not in done.stderr
    assert (read_tensors(tmp_path / "model")["a.weight"] == 1).all()
    assert siblings(tmp_path / "model") == ["model"]


@pytest.mark.parametrize("renames_done", [0, 1, 2])
def test_a_kill_at_any_rename_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames_done: int
) -> None:
    class Killed(BaseException):
        pass

    save(tmp_path / "model", 1.0)
    rename, done = Path.rename, []

    def stop(self: Path, target: Path) -> Path:
        if len(done) == renames_done:
            raise Killed
        done.append(target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stop)
    if renames_done == 2:
        monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *a, **k: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        save(tmp_path / "model", 2.0)
    monkeypatch.undo()
    value = 2 if renames_done == 2 else 1
    assert read_config(tmp_path / "model")["value"] == value
    assert (read_tensors(tmp_path / "model")["a.weight"] == value).all()
    assert surviving(tmp_path / "model").is_dir()
    save(tmp_path / "model", 3.0)
    assert read_config(tmp_path / "model")["value"] == 3
    assert siblings(tmp_path / "model") == ["model"]


def test_a_partial_save_of_a_dead_process_is_removed_and_a_live_one_left(tmp_path: Path) -> None:
    for process in ("999999999", "1"):
        (tmp_path / f".model.tmp-{process}").mkdir()
    save(tmp_path / "model")
    assert siblings(tmp_path / "model") == [".model.tmp-1", "model"]


def test_a_directory_with_other_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(UserError, match="not replaced"):
        save(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.tex").exists()


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    save(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors: truncated or corrupt"):
        read_tensors(tmp_path / "model")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.safetensors: there is no such file"):
        read_tensors(tmp_path)
    with pytest.raises(UserError, match=r"config\.json: there is no such file"):
        read_config(tmp_path)


def test_shards_are_read_as_one_model(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"a": np.ones(2, np.float32)}, tmp_path / "model-1.safetensors")
    save_file({"b": np.ones(3, np.float32)}, tmp_path / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_tensors(tmp_path).keys() == {"a", "b"}


def test_every_missing_unexpected_and_misshaped_tensor_is_listed() -> None:
    expected = {"a": (2, 3), "b": (4,), "pooler.weight": (1,), "classifier.weight": (1, 8)}
    found = {"a": (3, 2), "extra": (1,), "cls.bias": (7,), "classifier.weight": (2, 8)}
    rules = {"optional": [r"pooler\..*", r"classifier\..*"], "droppable": [r"cls\..*"]}
    with pytest.raises(UserError) as caught:
        check_keys(expected, found, **rules, where="some/model")
    message = str(caught.value)
    assert "missing: b [4]" in message
    assert "unexpected: extra [1]" in message
    assert "wrong shape: a is [3, 2], the model needs [2, 3]" in message
    assert "wrong shape: classifier.weight is [2, 8]" in message  # optional may be absent, never misshaped
    assert "pooler" not in message and "cls.bias" not in message and "some/model" in message


def test_matching_tensors_pass() -> None:
    check_keys(
        {"a": (1,), "new.b": (2,)},
        {"a": (1,), "cls.x": (3,)},
        optional=[r"new\..*"],
        droppable=[r"cls\..*"],
        where="",
    )
