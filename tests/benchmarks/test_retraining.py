"""Forgetting is a number: both domains, before and after, without and with preservation, from one command."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.retraining import main
from common.errors import UserError
from tests.tiny import FILLER, PARTNERS, TOPIC_WORDS, WORDS, World, command, train


@pytest.fixture(scope="module")
def arguments(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A trained base, new data, and the command that compares."""
    root = tmp_path_factory.mktemp("retraining")
    train(world.config(max_steps=6, evaluations=1), root)
    rows = [
        {"query": f"{TOPIC_WORDS[n // 6]} {WORDS[n]}", "positive": f"{PARTNERS[-1 - n]} {FILLER[n % 20]}"}
        for n in range(60)
    ]
    (root / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = world.config(max_steps=4, evaluations=1)
    config = replace(
        config,
        name="retrained",
        model=replace(config.model, base=str(root / "tiny")),
        data=replace(config.data, name=str(root / "new.jsonl"), encoder=str(world.base)),
        quantum=replace(config.quantum, mode="adaptation", phase="resonance"),
        evaluation=replace(config.evaluation, first_stage="rrf"),
        retrain=replace(config.retrain, preserve_knowledge=0.3, resonance_alignment=0.1),
    )
    command(config, root)
    flags = ["--config", root / "recipe.py", "--runs", root / "runs", "--results", root / "results"]
    return [*map(str, flags), "--checkpoint", "final"]


def run(argv: list[str]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main(argv)
    return out.getvalue()


def test_both_domains_are_compared_before_and_after_without_and_with_preservation(
    arguments: list[str], world: World
) -> None:
    said = run([*arguments, "--retrain.old-data", str(world.data)])
    for domain in ("new", "old"):
        for name in (
            "rrf",
            "original",
            "retrained, free",
            "the same without old lists",
            "retrained, preserving",
        ):
            assert f"{domain}: {name}" in said
    root = Path(arguments[1]).parent
    logs = {
        name: (root / "runs" / f"retrained_{name}" / "metrics.jsonl").read_text()
        for name in ("free", "new_lists", "preserving")
    }
    assert all("preserve_query" in logs[name] for name in ("new_lists", "preserving"))
    assert "preserve" not in logs["free"]
    (file,) = (root / "results").glob("retraining-*.json")
    stored = json.loads(file.read_text())
    rows = {
        (row["what"].split()[0], row["what"].split(": ")[1], row["peer_name"]): row for row in stored["rows"]
    }
    assert len(rows) == len(stored["rows"]) == 12
    for row in rows.values():
        assert row["difference"] == pytest.approx(row["ours"] - row["peer"], abs=1e-9)
        assert row["interval"][0] <= row["difference"] <= row["interval"][1]
    old = {name: rows["old", name, "original"] for name in ("retrained, free", "retrained, preserving")}
    assert old["retrained, free"]["peer"] == old["retrained, preserving"]["peer"]
    assert str(world.root) not in json.dumps(stored["workload"])
    again = run([*arguments, "--retrain.old-data", str(world.data)])
    assert again.count("finished before") == 3 and said[said.index("Retraining: ") :] in again


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], r"nothing to compare: name the old domain's data"),
        (["--retrain.old-data", "{data}", "--old-test-split", "tset"], r"no split 'tset'"),
        (["--retrain.old-data", "{data}", "--data.test-split", "tset"], r"no split 'tset'"),
        (["--retrain.old-data", "{data}", "--results", "{data}"], r"cannot be written \(Not a directory\)"),
        (["--retrain.old-data", "{data}", "--evaluation.metric", "ndgc@10"], r"unknown metric 'ndgc@10'"),
        (["--retrain.old-data", "{data}", "--model.base", "{base}"], r"has no resonance\.safetensors"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_training(
    arguments: list[str], world: World, tmp_path: Path, argv: list[str], message: str
) -> None:
    words = [word.format(data=world.data, base=world.base) for word in argv]
    with pytest.raises(UserError, match=message):
        run([*arguments, *words, "--runs", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()
