"""The commands as a user types them: prepare, train, evaluate, rerank, and what they refuse."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from common.config import DataConfig, load_recipe
from common.data.sources import load_ranking_data, write_trec_run
from common.errors import UserError
from common.reranker.prepare import load_data
from common.runs import read_metrics
from tests.tiny import FILLER, World, command, write_collection

ROOT = Path(__file__).parents[2]
RERANKING = ("prepare_data", "train", "evaluate", "analyze", "ablate", "rerank", "mine_negatives")
COMMANDS = (*RERANKING, "evaluate_lm")


def run(name: str, *argv: object) -> str:
    """What a command prints; its errors are raised."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        importlib.import_module(f"scripts.{name}").main([str(word) for word in argv])
    return out.getvalue()


@dataclass(frozen=True)
class Project:
    """A recipe over the tiny world, trained by the commands, and what they said."""

    world: World
    recipe: Path
    runs: Path
    prepared: str
    trained: str

    @property
    def run(self) -> Path:
        return self.runs / "tiny"

    def train(self, *argv: object) -> str:
        return run("train", "--config", self.recipe, "--runs", self.runs, *argv)

    def evaluate(self, *argv: object) -> str:
        return run("evaluate", *argv, "--data", self.world.data, "--encoder", self.world.base)


@pytest.fixture(scope="module")
def project(world: World, tmp_path_factory: pytest.TempPathFactory) -> Project:
    root = tmp_path_factory.mktemp("project")
    config = world.config(max_steps=6, evaluations=1)
    config = replace(
        config,
        data=replace(config.data, encoder=str(world.base)),
        evaluation=replace(config.evaluation, first_stage="rrf"),
    )
    command(config, root)
    untrained = Project(world, root / "recipe.py", root / "runs", "", "")
    prepared = run("prepare_data", "--config", untrained.recipe)
    return replace(untrained, prepared=prepared, trained=untrained.train())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example(name: str) -> None:
    shown = subprocess.run(
        [sys.executable, ROOT / "scripts" / f"{name}.py", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
    )
    assert shown.returncode == 0, shown.stderr
    assert f"example: python scripts/{name}.py" in shown.stdout


def test_an_error_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    argv = ["--model", tmp_path, "--query", "q", "--passages", tmp_path / "none.txt"]
    failed = subprocess.run(
        [sys.executable, ROOT / "scripts" / "rerank.py", *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr == f"error: no file {tmp_path / 'none.txt'}.\n"


def test_preparing_says_sizes_fingerprint_truncation_and_where_it_lies(project: Project) -> None:
    fingerprint = load_ranking_data(str(project.world.data)).fingerprint
    for part in (fingerprint, "60 passages", "train 48", "training lists: 48", "truncated: 0.0%", "cache"):
        assert part in project.prepared


def test_training_ends_with_the_test_table_and_what_to_type_next(project: Project) -> None:
    for part in ("bm25 ", "dense ", "rrf ", "rrf → alone", "fused ω=", "portable", "p bm25"):
        assert part in project.trained
    assert f"--data {project.world.data} --first-stage rrf" in project.trained
    for part in ("environment: ", "jax ", f"checkpoint: {project.run / 'best'}", "scripts/rerank.py --model"):
        assert part in project.trained
    results = json.loads((project.run / "results.json").read_text())
    assert len(results["tables"][0]["rows"]) == 6 and results["training"]["steps"] == 6
    assert "reranked by tiny/best" in (project.run / "report.html").read_text()


def test_a_finished_run_only_shows_its_result_again(project: Project) -> None:
    files = {path: path.stat().st_mtime_ns for path in project.run.rglob("*") if path.is_file()}
    said = project.train()
    assert "is finished; --fresh starts it over" in said and "dev at step" not in said
    table = said[: said.index("Brackets")]
    assert table in project.trained
    assert {path: path.stat().st_mtime_ns for path in project.run.rglob("*") if path.is_file()} == files


def test_a_finished_run_of_other_data_is_refused(project: Project, tmp_path: Path) -> None:
    changed = tmp_path / "data.jsonl"
    changed.write_text(project.world.data.read_text().replace("positive", "positive", 1))
    config = tmp_path / "recipe.py"
    config.write_text(project.recipe.read_text().replace(str(project.world.data), str(changed)))
    other = replace(project, recipe=config, runs=tmp_path / "runs")
    other.train()
    changed.write_text(changed.read_text().replace(FILLER[0], FILLER[1]))
    with pytest.raises(UserError, match=r"data_fingerprint: '\w+' before, '\w+' now"):
        other.train()


def test_other_settings_under_the_name_of_a_finished_run_are_refused(project: Project) -> None:
    with pytest.raises(UserError, match=r"train\.seed: 0 before, 1 now"):
        project.train("--train.seed", 1)


def test_a_run_trained_without_its_test_is_evaluated_by_the_same_command(
    project: Project, tmp_path: Path
) -> None:
    elsewhere = replace(project, runs=tmp_path)
    shutil.copytree(project.run, elsewhere.run)
    for name in ("results.json", "report.html"):
        (elsewhere.run / name).unlink()
    steps = [line["step"] for line in read_metrics(elsewhere.run)]
    assert "Brackets: bootstrap" not in elsewhere.train("--no-evaluate-test").split("environment:")[1]
    assert not (elsewhere.run / "results.json").exists() and (elsewhere.run / "report.html").exists()
    said = elsewhere.train("--evaluate-start")
    assert "rrf → base, alone" in said and "rrf → tiny/best, alone" in said
    assert [line["step"] for line in read_metrics(elsewhere.run)] == steps


def test_evaluating_several_checkpoints_over_several_pools(project: Project, tmp_path: Path) -> None:
    said = project.evaluate(
        project.run / "best",
        project.world.base,
        "--first-stage",
        "bm25",
        "rrf",
        "--metrics",
        "RR@10",
        "--per-query",
        tmp_path / "new" / "q.tsv",
        "--json",
        tmp_path / "t.json",
    )
    assert "bm25 → tiny/best, alone" in said and "rrf → base, portable" in said
    assert "rrf, alone: tiny/best − base" in said
    stored = json.loads((tmp_path / "t.json").read_text())
    assert len(stored["rows"]) == 3 + 2 * 2 * 3 and stored["environment"]["versions"]
    lines = (tmp_path / "new" / "q.tsv").read_text().splitlines()
    assert len(lines) == 1 + len(stored["rows"]) * stored["queries"]


def test_json_alone_goes_to_standard_output(project: Project) -> None:
    stored = json.loads(project.evaluate("--json", "-", "--max-queries", 3, "--split", "dev"))
    assert (stored["queries"], stored["split"], len(stored["rows"])) == (3, "dev", 3)


def test_judged_candidates_are_exactly_the_judged(project: Project, tmp_path: Path) -> None:
    stored = json.loads(project.evaluate("--json", "-", "--judged"))
    assert all(row["means"]["nDCG@10"] == 1.0 for row in stored["rows"])  # one judged passage a query
    folder = tmp_path / "many"  # more judged than --depth: all of them stay
    (folder / "qrels").mkdir(parents=True)
    passages = [f"{word} {FILLER[0]}" for word in FILLER[:12]]
    rows = [json.dumps({"_id": f"d{i}", "text": text}) for i, text in enumerate(passages)]
    (folder / "corpus.jsonl").write_text("\n".join(rows))
    (folder / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": passages[3]}))
    judged = "".join(f"q\td{i}\t{int(i > 8)}\n" for i in range(12))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    stored = json.loads(
        run("evaluate", "--data", folder, "--encoder", project.world.base, "--judged", "--depth", 2,
            "--metrics", "R@12", "--json", "-")
    )  # fmt: skip
    assert stored["rows"] and all(row["means"]["R@12"] == 1.0 for row in stored["rows"])


def test_a_whole_file_is_evaluated_as_the_split_all(project: Project, tmp_path: Path) -> None:
    stored = json.loads(project.evaluate("--json", "-", "--split", "all", "--first-stage", "bm25"))
    assert (stored["split"], stored["queries"]) == ("all", 60)


def test_judged_queries_that_the_data_lacks_are_counted(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    qrels = load_ranking_data(str(project.world.data)).split("test")
    lines = [f"{query} 0 {passage} 1\n" for query, grades in qrels.items() for passage in grades]
    (tmp_path / "full.qrels").write_text("".join([*lines, "q_elsewhere 0 p 1\n"]))
    project.evaluate("--qrels", tmp_path / "full.qrels", "--json", "-")
    assert f"1 of its {len(qrels) + 1} queries are not in data and left out" in capsys.readouterr().err


def test_a_trec_run_and_official_judgements(project: Project, tmp_path: Path) -> None:
    data = load_ranking_data(str(project.world.data))
    qrels = data.split("test")
    others = sorted(data.corpus)[:3]
    write_trec_run(
        {
            query: {**dict.fromkeys(grades, 1.0), **dict.fromkeys(others, 0.5)}
            for query, grades in qrels.items()
        },
        tmp_path / "first.trec.gz",
        "mine",
    )
    judged = [f"{query} 0 {passage} 1" for query, grades in qrels.items() for passage in (*grades, "far")]
    (tmp_path / "full.qrels").write_text("\n".join(judged) + "\n")
    said = run(
        "evaluate",
        *("--data", project.world.data, "--run", tmp_path / "first.trec.gz", "--json", "-"),
        *("--qrels", tmp_path / "full.qrels", "--metrics", "R@10"),
    )
    assert [row["means"]["R@10"] for row in json.loads(said)["rows"]] == [0.5]


def test_reranking_prints_ranked_lines_and_json(project: Project, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n".join([*FILLER[:3], "bolum banosh"]))
    argv = ["--model", project.run / "best", "--query", "bolum bano", "--passages", tmp_path / "p.txt"]
    lines = run("rerank", *argv, "--top", 2).splitlines()
    assert lines[0].split() == ["rank", "score", "resonance", "p", "passage"] and len(lines) == 4
    assert lines[-1].startswith("confidence that the first is relevant: none was fitted: a base, or a run")
    ranking = json.loads(run("rerank", *argv, "--json"))
    assert len(ranking["passages"]) == 4 and ranking["confidence"] is None
    assert lines[1].split()[1] == f"{ranking['passages'][0]['score']:.3f}"


def test_a_checkpoint_is_evaluated_over_what_it_was_trained_to_rerank(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = tmp_path / "best"
    shutil.copytree(project.run / "best", best)
    config = json.loads((best / "config.json").read_text())
    trained = load_recipe(project.recipe).evaluation
    assert (config["resonance"]["first_stage"], config["resonance"]["depth"]) == ("rrf", trained.depth)
    config["resonance"] |= {"first_stage": "bm25", "depth": 3}
    (best / "config.json").write_text(json.dumps(config))
    stored = json.loads(project.evaluate(best, "--json", "-"))
    assert {row["pool"] for row in stored["rows"] if row["model"]} == {"bm25"} and stored["depth"] == 3
    stored = json.loads(project.evaluate(best, "--json", "-", "--first-stage", "dense", "--depth", 4))
    assert {row["pool"] for row in stored["rows"] if row["model"]} == {"dense"} and stored["depth"] == 4
    assert "was chosen over bm25, not over dense" in capsys.readouterr().err


def test_the_table_says_whether_the_confidence_is_right(project: Project) -> None:
    stored = json.loads(project.evaluate(project.run / "best", "--json", "-", "--first-stage", "bm25", "rrf"))
    rows = [(row["pool"], row["result"]["what"]) for row in stored["confidence"]]
    assert rows.count(("bm25", "top score alone")) == rows.count(("rrf", "entropy alone")) == 1
    assert all(0 <= row["result"]["ece"] <= 1 for row in stored["confidence"])
    assert "Confidence that the top passage is relevant" in project.trained


def test_analysing_a_run_writes_into_its_folder_and_its_report(project: Project, tmp_path: Path) -> None:
    elsewhere = replace(project, runs=tmp_path)
    shutil.copytree(project.run, elsewhere.run)
    said = run("analyze", elsewhere.run, "--data", project.world.data, "--encoder", project.world.base)
    for part in ("relevant and other pairs", "AUROC", "The hardest queries", "analysis-test.png", "report: "):
        assert part in said
    stored = json.loads((elsewhere.run / "analysis-test.json").read_text())
    assert stored["model"] == "tiny/best" and set(stored["quantities"]) == {
        *("score", "resonance", "overlap", "coherence")
    }
    report = (elsewhere.run / "report.html").read_text()
    assert "Analysis of tiny/best on data test" in report and "reranked by tiny/best" in report
    assert "Loss terms" in report


def test_a_model_that_is_no_run_s_is_analysed_into_a_named_folder(project: Project, tmp_path: Path) -> None:
    argv = [project.world.base, "--data", project.world.data, "--encoder", "none", "--first-stage", "bm25"]
    with pytest.raises(UserError, match=r"is no run's checkpoint.*name one with --out"):
        run("analyze", *argv)
    run("analyze", *argv, "--out", tmp_path / "there", "--split", "dev")
    with pytest.raises(UserError, match="none of 7 pairs of 7 queries is a pair that is not relevant"):
        run("analyze", *argv, "--out", tmp_path / "there", "--judged")
    assert {file.suffix for file in (tmp_path / "there").glob("analysis-dev.*")} == {".json", ".png", ".html"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--split", "tset"], r"no split 'tset'; it has dev, test, train"),
        (["--depth", "0"], "--depth is 0; allowed: >= 1"),
        (["--encoder", "none", "--first-stage", "rrf"], "leave out --first-stage"),
    ],
)
def test_analyze_refuses_nonsense(project: Project, tmp_path: Path, argv: list[str], message: str) -> None:
    flags = ["--data", project.world.data, "--encoder", project.world.base, "--out", tmp_path]
    with pytest.raises(UserError, match=message):
        run("analyze", project.run / "best", *flags, *argv)
    with pytest.raises(UserError, match=r"not a checkpoint directory, it has no config\.json"):
        run("analyze", project.runs, *flags)
    bare = tmp_path / "bare"  # a split that judges nothing relevant
    (bare / "qrels").mkdir(parents=True)
    (bare / "corpus.jsonl").write_text('{"_id": "d", "text": "a"}\n')
    (bare / "queries.jsonl").write_text('{"_id": "q", "text": "a"}\n')
    (bare / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t0\n")
    with pytest.raises(UserError, match="split 'test': no query has a passage with a grade above 0"):
        run("analyze", project.run / "best", *flags, "--data", bare)


def test_retraining_analyses_the_original_first_and_once(project: Project, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.py"
    text = project.recipe.read_text()
    assert text.count("name='tiny'") == 1
    recipe.write_text(text.replace("name='tiny'", "name='again'"))
    flags = ["--model.base", project.run, "--quantum.mode", "adaptation", "--train.max-steps", 2]
    flags += ["--retrain.preserve-knowledge", 0.3, "--retrain.analyze-existing", "--evaluate-start"]
    retrained = replace(project, recipe=recipe, runs=tmp_path / "runs")
    said = retrained.train(
        *flags, "--retrain.old-data", project.world.data, "--retrain.resonance-alignment", 0.1
    )
    folder = retrained.runs / "again"
    assert said.index("tiny/best on data dev: relevant and other pairs") < said.index("dev at step 0")
    assert "48 unlabelled lists by rrf" in said and "rrf → tiny/best, alone" in said
    stored = json.loads((folder / "analysis-original.json").read_text())
    assert (stored["model"], stored["split"]) == ("tiny/best", "dev")
    assert "Analysis of tiny/best on data dev" in (folder / "report.html").read_text()
    again = retrained.train(
        *flags, "--retrain.old-data", project.world.data, "--retrain.resonance-alignment", 0.1
    )
    assert "is finished" in again and "relevant and other pairs" not in again


def test_starting_over_with_what_cannot_work_keeps_the_old_run(project: Project) -> None:
    before = sorted(path.name for path in project.run.iterdir())
    with pytest.raises(UserError, match="1000"):
        project.train("--fresh", "--train.batch-size", 1000)
    assert sorted(path.name for path in project.run.iterdir()) == before


def test_a_retraining_never_writes_over_its_own_base(project: Project) -> None:
    before = (project.run / "best" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"lies in this run's own folder .* choose another --name"):
        project.train("--model.base", project.run / "best", "--fresh")
    assert (project.run / "best" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--split", "tset"], r"no split 'tset'; it has dev, test, train"),
        (["nowhere/best"], "model 'nowhere/best' was not found"),
        (["--depth", "0"], "--depth is 0; allowed: >= 1"),
        (["--seed", "-1"], "--seed is -1; allowed: >= 0"),
        (["--metrics", "nDGC@10"], "unknown metric 'nDGC@10'; use an ir-measures name"),
        (["--run", "r.trec", "--judged"], "leave out --first-stage and --judged"),
        (["--run", "no.trec"], r"no file no\.trec"),
    ],
)
def test_evaluate_refuses_nonsense(project: Project, argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        project.evaluate(*argv)


@pytest.mark.parametrize("flag", ["--json", "--per-query"])
def test_evaluate_checks_where_it_writes_before_the_work(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.setattr("scripts.evaluate.load_split_data", refuse_work)
    with pytest.raises(UserError, match=r"cannot be written \(Is a directory\)"):
        project.evaluate(flag, tmp_path)


def refuse_work(*_: object, **__: object) -> None:
    raise AssertionError("work before the check")


@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
def test_train_checks_its_runs_folder_before_the_work(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: list[str]
) -> None:
    monkeypatch.setattr("common.reranker.workflow.load_data", refuse_work)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/tiny/.*: cannot be written \(Not a directory\)"):
        replace(project, runs=tmp_path / "file").train(*fresh)
    with pytest.raises(AssertionError):  # and makes none where it may
        replace(project, runs=tmp_path / "new").train(*fresh)
    assert not (tmp_path / "new").exists()


def test_preparing_checks_the_splits_first_and_does_without_a_test(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_collection(tmp_path / "collection", FILLER[:9], queries=32)
    (data / "qrels" / "test.tsv").rename(data / "qrels" / "dev.tsv")
    argv = ["--config", project.recipe, "--data", data]
    said = run("prepare_data", *argv, "--no-evaluate-test")
    assert "candidates: dev by bm25, dense, rrf" in said and "candidates: test" not in said
    monkeypatch.setattr("scripts.prepare_data.prepare", refuse_work)
    with pytest.raises(UserError, match=r"no split 'test'; it has dev, train.*--no-evaluate-test"):
        run("prepare_data", *argv)


def test_without_an_encoder_there_is_bm25_only(project: Project) -> None:
    argv = ["--data", project.world.data, "--encoder", "none", "--json", "-"]
    with pytest.raises(UserError, match="leave out --first-stage"):
        run("evaluate", *argv, "--first-stage", "rrf")
    stored = json.loads(run("evaluate", *argv))
    assert [row["pool"] for row in stored["rows"]] == ["bm25"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model.base", "./nowhere"], r"nowhere.*Check the path"),
        (["--quantum.mode", "adaptation"], r"has no resonance\.safetensors.*Train one first"),
        (
            ["--retrain.preserve-knowledge", "1", "--retrain.old-data", "./no"],
            r"data '\./no': no file or folder",
        ),
        (["--data", "./no.jsonl"], r"data '\./no\.jsonl': no file or folder"),
        (["--data.test-split", "tset"], "no split 'tset'; it has dev, test, train.*--no-evaluate-test"),
        (["--data.dev-split", "vde"], r"no split 'vde'; it has dev, test, train[^!]*of this name\.$"),
        (["--trian.epochs", "3"], "did you mean --train.epochs"),
    ],
)
def test_train_refuses_before_it_makes_a_run(
    project: Project, tmp_path: Path, argv: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=f"(?s){message}"):
        replace(project, runs=tmp_path).train(*argv)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("by", ["bm25", "dense", "cross-encoder"])
def test_mined_negatives_are_training_data(project: Project, tmp_path: Path, by: str) -> None:
    out, best = tmp_path / "mined.jsonl", project.run / "best"
    flags: list[object] = ["--data", project.world.data, "--out", out, "--encoder", project.world.base]
    flags += ["--count", 3, "--relative-margin", "None", "--by", by]
    said = run("mine_negatives", *flags, *(["--model", best] if by == "cross-encoder" else []))
    assert "48 rows, 144 negatives of 48 queries" in said
    config = replace(DataConfig(), name=str(project.world.data), mined=str(out))
    mined, whole = load_data(config), load_ranking_data(str(project.world.data))
    assert (mined.corpus, mined.qrels) == (whole.corpus, whole.qrels)  # all splits, the whole corpus
    assert all(len(passages) == 3 for passages in mined.negatives.values())
    relevant = {(q, p) for q, grades in mined.split("train").items() for p in grades}
    assert not relevant & {(q, p) for q, passages in mined.negatives.items() for p in passages}
    assert all(len(scores) == 4 for scores in mined.teacher.values())
    taught = run(
        "mine_negatives", *flags, "--teacher", best, *(["--model", best] if by == "cross-encoder" else [])
    )
    assert "relevant by the teacher" in taught or "48 rows" in taught


def test_mining_refuses_what_cannot_be(project: Project, tmp_path: Path) -> None:
    flags = ["--data", project.world.data, "--out", tmp_path / "mined.jsonl", "--encoder", project.world.base]
    for more, message in (
        (["--by", "cross-encoder"], "--by cross-encoder and --model MODEL go together"),
        (["--teacher-margin", 1], "--teacher-margin needs --teacher"),
        (["--choose", "random", "--seed", -1], "--seed is -1; allowed: >= 0"),
        (["--max-score", -5], "no negative fits the rules"),
        (["--split", "nowhere"], "no split 'nowhere'"),
    ):
        with pytest.raises(UserError, match=message):
            run("mine_negatives", *flags, *more)


def test_negatives_are_mined_for_every_query_of_a_file(project: Project, tmp_path: Path) -> None:
    flags = ["--data", project.world.data, "--by", "bm25", "--relative-margin", "None", "--split", "all"]
    assert "60 rows" in run("mine_negatives", *flags, "--out", tmp_path / "new" / "mined.jsonl")


@pytest.mark.parametrize(("name", "argv"), [("mine_negatives", ["--by", "bm25"]), ("analyze", ["best"])])
def test_where_a_command_writes_is_checked_before_the_work(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, argv: list[str]
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("work was done")

    command = importlib.import_module(f"scripts.{name}")
    for part in ("load_split_data", "load_scorer", "load_encoder"):
        monkeypatch.setattr(command, part, work)
    words = [project.run / "best" if word == "best" else word for word in argv]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(
        UserError, match=r"file.*cannot be written \(Not a directory\)\. Choose another place"
    ):
        run(name, *words, "--data", project.world.data, "--out", tmp_path / "file" / "x")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(AssertionError, match="work was done"):
        run(name, *words, "--data", project.world.data, "--out", tmp_path / "new" / "x")


@pytest.mark.parametrize(("name", "flag"), [("analyze", "--metric"), ("evaluate", "--metrics")])
def test_a_metric_is_checked_before_the_work(project: Project, name: str, flag: str) -> None:
    with pytest.raises(UserError, match="unknown metric 'ndgc@10'"):
        run(name, project.run / "nowhere", "--data", "./nowhere.jsonl", flag, "ndgc@10")
