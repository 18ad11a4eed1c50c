"""Ranking data by name or path: folders, triples, hub datasets, splits that are cut, TREC files."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest

from common.data.sources import (
    load_ranking_data,
    load_split_data,
    read_trec_qrels,
    read_trec_run,
    read_tsv_qrels,
    write_trec_run,
)
from common.errors import UserError


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    """40 training queries and one test query over 41 passages; one of these has a title."""
    folder = tmp_path / "beir"
    corpus = [{"_id": f"d{n}", "title": "", "text": f"passage {n}"} for n in range(40)]
    write_jsonl(folder / "corpus.jsonl", [*corpus, {"_id": "t", "title": "A title", "text": "its text"}])
    write_jsonl(folder / "queries.jsonl", [{"_id": f"q{n}", "text": f"query {n}"} for n in range(41)])
    write_qrels(folder, "train", [f"q{n}\td{n}\t1" for n in range(40)])
    write_qrels(folder, "test", ["q40\tt\t2", "q40\td3\t0"])
    return folder


def write_qrels(folder: Path, split: str, rows: list[str]) -> None:
    (folder / "qrels").mkdir(exist_ok=True)
    (folder / "qrels" / f"{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n")


def test_beir_folder_puts_the_title_before_the_text_and_keeps_grades(beir: Path) -> None:
    (beir / "qrels_full.tsv").write_text("q40\telsewhere\t3\n")  # an extra file at the top is ignored
    data = load_ranking_data(str(beir))
    assert data.corpus["t"] == "A title its text"
    assert data.corpus["d3"] == "passage 3"
    assert data.split("test") == {"q40": {"t": 2, "d3": 0}}


def test_a_folder_may_lack_its_judgements_where_labels_are_not_read(beir: Path) -> None:
    labelled = load_ranking_data(str(beir), labels=False)
    assert set(labelled.qrels) == {"train", "dev", "test"}
    for file in (beir / "qrels").iterdir():
        file.unlink()
    data = load_ranking_data(str(beir), labels=False)
    assert data.qrels == {} and data.queries == labelled.queries and data.corpus == labelled.corpus
    with pytest.raises(UserError, match=r"lacks qrels/<split>\.tsv"):
        load_ranking_data(str(beir))


def test_compressed_and_plain_folders_are_the_same_data(beir: Path) -> None:
    before = load_ranking_data(str(beir)).fingerprint
    corpus = beir / "corpus.jsonl"
    (beir / "corpus.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes()))
    corpus.unlink()
    assert load_ranking_data(str(beir)).fingerprint == before


def test_dev_is_cut_from_train_only_when_there_is_none(beir: Path) -> None:
    data = load_ranking_data(str(beir), dev_fraction=0.3)
    dev, train = set(data.split("dev")), set(data.split("train"))
    assert dev and not dev & train and len(dev | train) == 40
    write_qrels(beir, "validation", ["q40\td1\t1"])
    published = load_ranking_data(str(beir))
    assert set(published.split("dev")) == {"q40"} and len(published.split("train")) == 40


def test_a_query_keeps_its_split_when_rows_are_added(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    rows: list[dict[str, object]] = [{"query": f"query {n}", "positive": f"text {n}"} for n in range(200)]
    found = []
    for count in (100, 200):
        path = tmp_path / f"{count}.jsonl"
        write_jsonl(path, rng.sample(rows[:count], count))
        data = load_ranking_data(str(path), dev_fraction=0.2, test_fraction=0.2)
        found.append({data.queries[q]: split for split, qrels in data.qrels.items() for q in qrels})
    assert set(found[1].values()) == {"train", "dev", "test"}
    assert found[0].items() <= found[1].items()


def test_what_is_cut_shares_no_relevant_passage_with_training(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = tmp_path / "rows.jsonl"
    chains = [
        [f"{group}.{n}" for n in range(3)] for group in range(60)
    ]  # of two links: 0 to 2 only through 1
    rows: list[dict[str, object]] = [
        {"query": f"query {one}", "positive": [f"text {one}", f"text {other}"], "negative": "everyone's"}
        for chain in chains
        for one, other in zip(chain, (*chain[1:], chain[0]), strict=True)
    ]
    write_jsonl(path, rng.sample(rows, len(rows)))
    data = load_ranking_data(str(path), dev_fraction=0.2, test_fraction=0.2)
    relevant = [{p for grades in qrels.values() for p in grades} for qrels in data.qrels.values()]
    assert len(relevant) == 3 and all(relevant)
    assert sum(map(len, relevant)) == len(set.union(*relevant))


def test_a_passage_that_most_queries_ask_for_does_not_hinder_the_cut(beir: Path) -> None:
    write_qrels(
        beir, "train", [f"q{n}\td0\t1" for n in range(36)] + [f"q{n}\td{n}\t1" for n in range(36, 40)]
    )
    data = load_ranking_data(str(beir), dev_fraction=0.3)
    assert len(data.split("dev")) > 4 and len(data.split("train")) > 4


def test_another_seed_cuts_other_queries(beir: Path) -> None:
    cuts = [set(load_ranking_data(str(beir), dev_fraction=0.5, seed=seed).split("dev")) for seed in (0, 1)]
    assert cuts[0] != cuts[1]


@pytest.mark.parametrize("rows", [30, 45, 150])
def test_a_small_file_is_always_cut_and_its_splits_have_their_share(tmp_path: Path, rows: int) -> None:
    for attempt in range(30):
        file = tmp_path / f"{attempt}.jsonl"
        write_jsonl(
            file, [{"query": f"q {attempt}.{n}", "positive": f"p {attempt}.{n}"} for n in range(rows)]
        )
        data = load_ranking_data(str(file))
        assert all(len(data.split(split)) >= min(5, rows // 10) for split in ("dev", "test"))
        assert len(data.split("train")) >= rows // 2


def test_too_few_queries_to_cut_from(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "one.jsonl", [{"query": "q", "positive": "p"}])
    with pytest.raises(UserError, match="1 training queries are too few to cut dev, test"):
        load_ranking_data(str(tmp_path / "one.jsonl"))


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_fraction_out_of_range_is_refused(beir: Path, fraction: float) -> None:
    with pytest.raises(UserError, match=r"dev_fraction is .*allowed: 0 <= dev_fraction < 1"):
        load_ranking_data(str(beir), dev_fraction=fraction)


def test_trec_folder_reads_four_column_judgements(beir: Path) -> None:
    for path in (beir / "qrels").iterdir():
        path.unlink()
    (beir / "test.qrels").write_text("q40 0 t 3\nq40 Q0 d1 -1\n")
    assert load_ranking_data(str(beir)).qrels == {"test": {"q40": {"t": 3, "d1": 0}}}
    (beir / "test.qrels").rename(beir / "qrels.txt")
    assert set(load_ranking_data(str(beir)).qrels) == {"test"}


def test_bad_rows_of_all_files_are_in_one_error(beir: Path) -> None:
    with (beir / "corpus.jsonl").open("a") as corpus:
        corpus.write('{"_id": "e", "text": " "}\n{"_id": "d1", "text": "again"}\n{"text": "no id"}\n')
    write_qrels(beir, "test", ["q40\tt", "q40\tt\thigh", "q40\tt\t1", "q40\tt\t2"])
    with pytest.raises(UserError) as caught:
        load_ranking_data(str(beir))
    message = str(caught.value)
    assert "6 bad row(s)" in message
    assert f"{beir}/corpus.jsonl:42: passage 'e' is empty" in message
    assert f"{beir}/corpus.jsonl:43: passage 'd1' appears twice" in message
    assert f"{beir}/corpus.jsonl:44: expected an object" in message
    assert f"{beir}/qrels/test.tsv:2: 2 tab-separated fields, expected 3" in message
    assert f"{beir}/qrels/test.tsv:3: the grade 'high' is not a whole number" in message
    assert f"{beir}/qrels/test.tsv:5: query q40, passage t was judged 1 before, here 2" in message


def test_bad_rows_are_counted_when_skipped(beir: Path) -> None:
    with (beir / "corpus.jsonl").open("a") as corpus:
        corpus.write('{"_id": "e", "text": ""}\n')
    write_qrels(beir, "test", ["q40\tt\t1", "q40\te\t1", "q99\tt\t1"])
    data = load_ranking_data(str(beir), on_bad_row="skip")
    assert data.split("test") == {"q40": {"t": 1}}
    assert data.dropped == {"empty passage": 1, "judgement of an unknown id": 2}


@pytest.mark.parametrize("name, what", [("corpus", "corpus is"), ("queries", "queries are")])
def test_a_file_without_texts_is_said_to_be_empty(beir: Path, name: str, what: str) -> None:
    (beir / f"{name}.jsonl").write_text("\n")
    with pytest.raises(UserError, match=rf"^{beir}/{name}\.jsonl: the {what} empty\.") as caught:
        load_ranking_data(str(beir))
    assert "unknown" not in str(caught.value)
    (beir / f"{name}.jsonl").write_text('{"text": "no id"}\n')  # not empty: what is wrong is in its rows
    with pytest.raises(UserError, match=rf"{name}\.jsonl:1: expected an object"):
        load_ranking_data(str(beir))


def test_two_files_of_one_split_are_refused(beir: Path) -> None:
    for name in ("dev", "valid"):
        write_qrels(beir, name, ["q1\td1\t1"])
    with pytest.raises(UserError, match=r"qrels/dev\.tsv and .*qrels/valid\.tsv: both .* split 'dev'"):
        load_ranking_data(str(beir))
    for path in (beir / "qrels").iterdir():
        path.unlink()
    for name in ("test.qrels", "qrels.txt"):
        (beir / name).write_text("q40 0 t 3\n")
    with pytest.raises(UserError, match=r"/test\.qrels and .*/qrels\.txt: both .* split 'test'"):
        load_ranking_data(str(beir))


def test_judgements_of_unknown_documents_are_refused(beir: Path) -> None:
    write_qrels(beir, "test", ["q40\tt\t1", "q40\tlost\t1", "q99\tt\t1", *["q40\tgone\t1"] * 20])
    with pytest.raises(UserError) as caught:
        load_ranking_data(str(beir))
    message, file = str(caught.value), beir / "qrels" / "test.tsv"
    assert message.startswith("22 bad row(s)") and "and 2 more" in message and " --on-bad-row skip" in message
    assert f"{file}:3: unknown document 'lost'" in message and f"{file}:4: unknown query 'q99'" in message


def test_a_grade_that_trec_eval_cannot_add_up_is_refused(beir: Path) -> None:
    write_qrels(beir, "test", ["q40\tt\t3e9"])
    with pytest.raises(UserError, match=r"test\.tsv:2: the grade '3e9' is not a whole number up to 1000"):
        load_ranking_data(str(beir))


def test_the_split_all_is_every_query_of_data_with_one_split(beir: Path) -> None:
    write_jsonl(beir / "one.jsonl", [{"query": "q", "positive": "p"}])
    data = load_split_data(str(beir / "one.jsonl"), "all")
    assert {data.queries[query] for query in data.split("all")} == {"q"} and set(data.qrels) == {"all"}
    with pytest.raises(UserError, match=r"--split all is for data of one split, and this has test, train"):
        load_split_data(str(beir), "all")
    (beir / "qrels" / "train.tsv").unlink()
    assert set(load_split_data(str(beir), "all").split("all")) == set(
        load_ranking_data(str(beir)).split("test")
    )
    assert load_split_data(str(beir), "test") == load_ranking_data(str(beir))


def test_split_without_positives_is_refused(beir: Path) -> None:
    write_qrels(beir, "test", ["q40\tt\t0"])
    with pytest.raises(UserError, match="split 'test': no query has a passage with a grade above 0"):
        load_ranking_data(str(beir))


def test_incomplete_folder_says_what_it_lacks(beir: Path) -> None:
    (beir / "corpus.jsonl").unlink()
    with pytest.raises(UserError, match=r"not a BEIR or TREC folder, it lacks corpus\.jsonl"):
        load_ranking_data(str(beir))


@pytest.mark.parametrize("name", ["pydoc", "data/rows.jsonl", "./nowhere", "/no/such/folder"])
def test_unknown_name_says_what_was_tried(name: str) -> None:
    with pytest.raises(UserError, match=r"no file or folder .*'pydocs'.*owner/name"):
        load_ranking_data(name)


def test_hub_name_that_cannot_be_had_says_what_was_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(datasets, "get_dataset_config_names", unreachable)
    with pytest.raises(UserError, match=r"Tried the path .*/owner/lost and the hub dataset 'owner/lost'"):
        load_ranking_data("owner/lost", cache_dir=tmp_path)


def test_hub_dataset_of_triples_in_parquet(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "triples" / "data"
    folder.mkdir(parents=True)
    for split, start in (("train", 0), ("validation", 50), ("test", 60)):
        rows = [
            {"anchor": f"q{n}", "positive": f"p{n}", "negative_1": "n1", "negative_2": f"n{n}"}
            for n in range(start, start + 10)
        ]
        datasets.Dataset.from_list(rows).to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    data = load_ranking_data(str(folder.parent), cache_dir=tmp_path / "cache")
    assert {split: len(qrels) for split, qrels in data.qrels.items()} == {"train": 10, "dev": 10, "test": 10}
    query = next(q for q, text in data.queries.items() if text == "q7")
    assert [data.corpus[p] for p in data.qrels["train"][query]] == ["p7"]
    assert [data.corpus[p] for p in data.negatives[query]] == ["n1", "n7"]


def test_hub_dataset_bad_rows_and_columns(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "triples"
    rows: list[dict[str, object]] = [{"query": "q", "positive": "p"}, {"query": "q", "positive": ""}]
    write_jsonl(folder / "train.jsonl", rows)
    with pytest.raises(UserError, match="train:2: 'positive' holds an empty passage"):
        load_ranking_data(str(folder), cache_dir=tmp_path / "cache")
    write_jsonl(folder / "train.jsonl", [{"sentence1": "q", "label": 1}])
    with pytest.raises(UserError, match=r"columns sentence1, label: expected query \(query, anchor"):
        load_ranking_data(str(folder), cache_dir=tmp_path / "cache2")


def test_hub_collection_with_its_judgements_beside_it(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "small"
    write_jsonl(folder / "texts" / "c.jsonl", [{"_id": "d1", "title": "T", "text": "one"}])
    write_jsonl(folder / "asked" / "q.jsonl", [{"_id": "q1", "title": "", "text": "which?"}])
    configs = [("corpus", "texts/c.jsonl"), ("queries", "asked/q.jsonl")]
    lines = [f"- config_name: {c}\n  data_files:\n  - split: {c}\n    path: {p}\n" for c, p in configs]
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(lines)}---\n")
    write_jsonl(tmp_path / "small-qrels" / "test.jsonl", [{"query-id": "q1", "corpus-id": "d1", "score": 1}])
    data = load_ranking_data(str(folder), cache_dir=tmp_path / "cache")
    assert data.corpus == {"d1": "T one"}
    assert data.qrels == {"test": {"q1": {"d1": 1}}}


@pytest.mark.parametrize("name", ["run.txt", "run.txt.gz"])
def test_run_is_read_back_exactly(tmp_path: Path, name: str, seed: int) -> None:
    rng = random.Random(seed)
    run = {f"q{n}": {f"d{m}": rng.uniform(-30, 30) for m in range(5)} for n in range(4)}
    write_trec_run(run, tmp_path / name, "tag")
    assert read_trec_run(tmp_path / name) == run


def test_run_is_written_best_first_with_ties_by_passage_id(tmp_path: Path) -> None:
    write_trec_run({"q": {"b": 1.0, "c": 2.0, "a": 1.0}}, tmp_path / "run", "tag")
    lines = (tmp_path / "run").read_text().splitlines()
    assert lines == ["q Q0 c 1 2.0 tag", "q Q0 a 2 1.0 tag", "q Q0 b 3 1.0 tag"]


def test_run_with_an_id_that_the_format_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the id 'two words' is empty or has white space"):
        write_trec_run({"q": {"two words": 1.0}}, tmp_path / "run", "tag")


def test_bad_run_lines_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.write_text("q Q0 a 1 2.0 tag\nq Q0 b 2 nan tag\nq Q0 c 3\nq Q0 a 4 1.0 tag\n")
    with pytest.raises(UserError) as caught:
        read_trec_run(path)
    message = str(caught.value)
    assert f"{path}:2: expected `query Q0 passage rank score tag`" in message
    assert f"{path}:3: expected" in message
    assert f"{path}:4: passage 'a' twice for query 'q'" in message
    assert "on-bad-row" not in message  # a run is read whole or not at all


def test_judgement_files_of_both_forms(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("q1\td1\t2\r\nq1\td2\t1.0\n")
    (tmp_path / "a.qrels").write_text("q1 0 d1 2\nq1 0 d2 1\n")
    expected = {"q1": {"d1": 2, "d2": 1}}
    assert read_tsv_qrels(tmp_path / "a.tsv") == read_trec_qrels(tmp_path / "a.qrels") == expected
    with pytest.raises(UserError, match=r"a\.tsv:1: 3 fields, expected 4"):
        read_trec_qrels(tmp_path / "a.tsv")


@pytest.mark.parametrize(
    "name, passages, sizes",
    [
        ("scifact", 5183, {"train": 809, "test": 300}),
        ("nfcorpus", 3633, {"train": 2590, "dev": 324, "test": 323}),
        ("trec-dl19", 12788, {"test": 43}),
    ],
)
def test_published_collections_load_whole(
    data_dir: Path, name: str, passages: int, sizes: dict[str, int]
) -> None:
    if not (data_dir / name).is_dir():
        pytest.skip(f"no {name} in {data_dir}")
    data = load_ranking_data(str(data_dir / name), dev_fraction=0)
    assert len(data.corpus) == passages
    assert {split: len(qrels) for split, qrels in data.qrels.items()} == sizes
