"""The resolver: which backend loads a model, and what to install when none does."""

import sys
import types
from pathlib import Path

import pytest

from common import backends
from common.backends import checkpoint_identity, checkpoint_name, load_encoder, load_scorer
from common.errors import UserError
from common.hub import packaged_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "README.md").write_text("card")
    return tmp_path


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("fake_scoring")
    module.load_encoder = lambda directory: ("encoder", directory)  # type: ignore[attr-defined]
    module.load_scorer = lambda directory, recipe: ("scorer", directory)  # type: ignore[attr-defined]
    module.__spec__ = types.SimpleNamespace(name="fake_scoring")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "fake_scoring", module)
    monkeypatch.setattr(
        backends,
        "_BACKENDS",
        {"jax": ("json", "fake_scoring", "pip a"), "mlx": ("no_such_framework", "fake_scoring", "pip b")},
    )
    return module


@pytest.mark.usefixtures("fake")
def test_auto_takes_the_installed_backend(model: Path) -> None:
    said: list[str] = []
    assert load_encoder(model, say=said.append) == ("encoder", model)
    assert load_scorer(str(model), backend="jax", say=said.append) == ("scorer", model)
    assert len(said) == 2


@pytest.mark.usefixtures("fake")
def test_a_backend_that_is_not_installed_names_the_command(model: Path) -> None:
    with pytest.raises(UserError, match="'mlx' is not installed here; install it with `pip b`"):
        load_scorer(model, backend="mlx")
    with pytest.raises(UserError, match="unknown backend 'torch'; allowed: auto, jax, mlx"):
        load_encoder(model, backend="torch")


def test_without_any_backend_every_choice_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {name: ("no_such_framework", "none", f"pip {name}") for name in ("jax", "mlx")}
    monkeypatch.setattr(backends, "_BACKENDS", table)
    with pytest.raises(UserError, match=r"no backend is installed.*pip jax.*pip mlx"):
        load_scorer(model)


def test_a_table_calls_a_checkpoint_by_its_folder_and_only_the_packaged_one_by_its_model() -> None:
    assert checkpoint_name(Path("/x/model")) == "model"
    assert checkpoint_name(Path("/x/run/best")) == "run/best"
    assert checkpoint_name(Path("/x/mine/int8")) == "mine/int8"
    packaged = packaged_model()
    assert packaged is None or checkpoint_name(packaged) == "all-MiniLM-L6-v2"


def test_identity_follows_the_content_and_the_settings(model: Path) -> None:
    identity = checkpoint_identity(model)
    (model / "README.md").write_text("another card")
    (model / "training.json").write_text('{"steps": 3}')
    copy = model.parent / "copy"
    copy.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        (copy / name).write_bytes((model / name).read_bytes())
    assert checkpoint_identity(model) == identity == checkpoint_identity(copy)
    assert checkpoint_identity(model, 192) != identity
    (model / "model.safetensors").write_bytes(b"Weights")
    assert checkpoint_identity(model) != identity
