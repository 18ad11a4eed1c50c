"""scripts/registry.py as a user types it."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import UserError
from scripts import registry
from tests.common.service.test_registry import model


def test_add_promote_roll_back_list_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*argv: object) -> str:
        registry.main([*map(str, argv), "--root", str(tmp_path / "models")])
        return capsys.readouterr().out

    for number in (1, 2):
        said = run("add", "ranker", model(tmp_path / f"run{number}", bytes([number])), "--promote")
        assert f"ranker {number} is current" in said
    assert "ranker 1 is current" in run("rollback", "ranker")
    assert "ranker 2 is current" in run("promote", "ranker", "2")
    lines = [line.split() for line in run("list").splitlines() if line.startswith("ranker")]
    assert [line[1] for line in lines] == ["1", "2"] and [line[2] == "*" for line in lines] == [False, True]
    assert run("current", "ranker").strip().endswith("ranker/2/ranker-2")
    assert run("verify").count("whole") == 2
    (tmp_path / "models" / "ranker" / "1" / "ranker-1" / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json: missing"):
        run("verify", "ranker")
