"""A run's folder: what survives a kill, what is refused, what the report shows."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import common.runs as runs
from common.config import RerankerConfig, to_dict
from common.errors import UserError
from common.report import write_report
from common.runs import RunFolder, environment, read_metrics

CONFIG: dict[str, Any] = {"train": {"learning_rate": 5e-5, "seed": 0}, "data": {"name": "pydocs"}}


def make(root: Path, config: dict[str, Any] = CONFIG, **options: Any) -> RunFolder:
    return RunFolder.create(root, "first", config, **options)


def test_a_run_keeps_its_resolved_config_and_what_its_result_depends_on(tmp_path: Path) -> None:
    with make(tmp_path, data_fingerprint="abc123", device="one big GPU") as run:
        saved = json.loads((run.path / "config.json").read_text())
    assert saved["config"] == CONFIG
    assert saved["data_fingerprint"] == "abc123"
    here = saved["environments"][0]
    assert here["device"] == "one big GPU" and here["versions"]["numpy"] and here["python"]


def test_metrics_read_back_in_order_and_by_kind(tmp_path: Path) -> None:
    with make(tmp_path) as run:
        run.log(0, "dev", {"nDCG@10": 0.5})
        run.log(1, "train", {"loss": 1.25})
        assert [line["step"] for line in run.read_metrics()] == [0, 1]
        assert run.read_metrics("train")[0]["loss"] == 1.25
        assert any(run.path.joinpath("tb").iterdir())


def test_a_value_that_is_not_a_number_is_null_and_the_file_stays_json(tmp_path: Path) -> None:
    with make(tmp_path) as run:
        run.log(1, "train", {"loss": float("nan"), "norm": float("inf")})
        line = json.loads(run.metrics_file.read_text(), parse_constant=pytest.fail)
    assert line["loss"] is None and line["norm"] is None


def test_a_resumed_run_forgets_what_came_after_the_restored_step(tmp_path: Path) -> None:
    with make(tmp_path) as run:
        for step in range(1, 6):
            run.log(step, "train", {"loss": step})
    with make(tmp_path) as run:
        assert run.resumed
        run.rewind(3)
        run.log(4, "train", {"loss": 40})
        assert [(line["step"], line["loss"]) for line in run.read_metrics()] == [
            (1, 1),
            (2, 2),
            (3, 3),
            (4, 40),
        ]


def test_a_line_torn_by_a_kill_is_dropped(tmp_path: Path) -> None:
    with make(tmp_path) as run:
        run.log(1, "train", {"loss": 1})
    with open(run.metrics_file, "a") as file:
        file.write('{"step": 2, "kind": "tr')
    assert len(read_metrics(run.path)) == 1
    with make(tmp_path) as run:
        run.log(2, "train", {"loss": 2})
        assert [line["step"] for line in run.read_metrics()] == [1, 2]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    with make(tmp_path) as run:
        run.log(1, "train", {"loss": 1})
        run.metrics_file.write_text("nonsense\n" + run.metrics_file.read_text())
        with pytest.raises(UserError, match=r"metrics\.jsonl:1: not valid JSON"):
            run.read_metrics()


def test_resuming_with_other_settings_or_data_is_refused_and_they_are_named(tmp_path: Path) -> None:
    make(tmp_path, data_fingerprint="old").close()
    other = {**CONFIG, "train": {"learning_rate": 1e-4, "seed": 0}}
    with pytest.raises(UserError) as caught:
        make(tmp_path, other, data_fingerprint="new")
    message = str(caught.value)
    assert "train.learning_rate: 5e-05 before, 0.0001 now" in message
    assert "data_fingerprint: 'old' before, 'new' now" in message
    assert "--fresh" in message and "seed" not in message


def test_a_run_goes_on_only_from_the_same_base_on_the_same_backend(tmp_path: Path) -> None:
    make(tmp_path, inputs={"backend": "jax", "base": "a"}).close()
    make(tmp_path, inputs={"backend": "jax", "base": "a"}).close()
    with pytest.raises(
        UserError, match=r"(?s)inputs\.backend: 'jax' before, 'mlx' now.*inputs\.base: 'a' bef"
    ):
        make(tmp_path, inputs={"backend": "mlx", "base": "b"})
    make(tmp_path / "older").close()  # as runs of commands that did not note any
    make(tmp_path / "older", inputs={"backend": "mlx"}).close()


def test_a_setting_that_is_newer_than_a_run_had_its_default_then(tmp_path: Path) -> None:
    config = to_dict(RerankerConfig())
    before = {**config, "model": {key: value for key, value in config["model"].items() if key != "head"}}
    RunFolder.create(tmp_path, "run", before).close()
    RunFolder.create(tmp_path, "run", config).close()
    other = {**config, "model": {**config["model"], "head": "cls"}}
    with pytest.raises(UserError, match=r"model\.head: 'resonance' before, 'cls' now"):
        RunFolder.create(tmp_path, "run", other)


def test_a_refused_resume_does_not_keep_the_folder_locked(tmp_path: Path) -> None:
    make(tmp_path).close()
    try:
        make(tmp_path, {"data": {"name": "other"}})
    except UserError as error:
        kept = error  # its traceback keeps the frames alive
    make(tmp_path).close()
    assert kept


def test_starting_over_deletes_the_old_run(tmp_path: Path) -> None:
    with make(tmp_path) as run:
        run.log(1, "train", {"loss": 1})
        run.best.mkdir()
    with make(tmp_path, {"data": {"name": "other"}}, resume=False) as run:
        assert not run.resumed and not run.best.exists() and run.read_metrics() == []


def test_a_start_over_that_was_killed_can_start_over_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make(tmp_path) as run:
        run.write_json("a.json", {})
        (run.path / "z.txt").write_text("")

    def killed(path: Path) -> None:
        if path.name == "z.txt":
            raise KeyboardInterrupt
        os.remove(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, resume=False)
    make(tmp_path, resume=False).close()


def test_a_folder_with_other_files_is_never_taken(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "thesis.tex").write_text("years of work")
    for resume in (True, False):
        with pytest.raises(UserError, match="other files"):
            make(tmp_path, resume=resume)
    assert (tmp_path / "first" / "thesis.tex").exists()


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden"])
def test_a_name_that_leaves_the_folder_of_runs_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot be named"):
        RunFolder.create(tmp_path, name, CONFIG)


def test_a_second_process_cannot_use_the_run_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    program = (
        "import sys, time; from common.runs import RunFolder\n"
        f"run = RunFolder.create({str(tmp_path)!r}, 'first', {CONFIG!r})\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        with pytest.raises(UserError, match="another process"):
            make(tmp_path)
        other.kill()
    make(tmp_path).close()


def test_a_full_disk_while_logging_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with make(tmp_path) as run:
        run.write_json("results.json", {"tables": []})
        monkeypatch.setattr(runs, "_append", full)
        with pytest.raises(UserError, match=r"metrics\.jsonl: No space left.*Free some space.*resumes"):
            run.log(1, "train", {"loss": 1})


def test_the_environment_names_commit_and_versions() -> None:
    here = environment()
    assert "cores" in here["device"]
    assert {"git_commit", "python", "platform", "versions"} <= here.keys()


def test_the_report_is_one_file_that_loads_nothing_and_shows_every_quantity(tmp_path: Path) -> None:
    with make(tmp_path, data_fingerprint="abc123") as run:
        for step in range(60):
            run.log(
                step,
                "train",
                {"loss": 2 / (step + 1), "loss_rank": 0.1, "temperature": 2, "active_pairs": step},
            )
        for step in (0, 30, 59):
            run.log(step, "dev", {"nDCG@10": 0.5 + step / 1000, "nDCG@10 fused": 0.6})
        table = {
            "title": "pydocs <test>",
            "columns": ["system", "nDCG@10", "p"],
            "rows": [["RRF", 0.5123, None], ["reranked", 0.6789, 0.0004]],
            "note": "300 queries, depth 50",
        }
        run.write_json("results.json", {"tables": [table]})
    page = write_report(run.path).read_text()
    wanted = ["0.512", '<td class="best">0.679</td>', "0.0004", "300 queries, depth 50", "+0.059"]
    wanted += ["Loss terms", "loss_rank", "Temperature", "Ranking on dev", "nDCG@10 fused", "active pairs"]
    wanted += ["abc123", "train.learning_rate", "5e-05", "versions.numpy"]
    for shown in wanted:
        assert shown in page, shown
    assert "pydocs &lt;test&gt;" in page and "<test>" not in page
    assert "<script" not in page and "src=" not in page and "@import" not in page and "<link" not in page


def test_a_run_without_metrics_still_has_a_report(tmp_path: Path) -> None:
    with make(tmp_path) as run:
        assert "Nothing was logged yet" in write_report(run.path).read_text()
