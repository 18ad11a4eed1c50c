"""The evaluation table: what is reranked, compared, cached and refused."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from common.backends import Scores
from common.data.records import Qrels, RankingData, Run
from common.errors import UserError
from common.metrics.ranking import evaluate_run, mean
from common.reranker.evaluation import Row, Table, evaluate, score_pairs

OnBatch = Callable[[int], None] | None


class Oracle:
    """Knows the relevant passage with a chance of `skill`; portable scores know nothing."""

    def __init__(self, name: str, skill: float, omega: float = 0.0, identity: str | None = None) -> None:
        self.name, self.fusion_weight, self.identity = (
            name,
            omega,
            f"{name}-id" if identity is None else identity,
        )
        self._skill, self.pairs = skill, 0

    def score(self, queries: Sequence[str], passages: Sequence[str], on_batch: OnBatch = None) -> Scores:
        self.pairs += len(queries)
        if on_batch is not None:
            on_batch(len(queries))
        known = [hash_share(query) < self._skill for query in queries]
        score = [
            float(k and q.split()[1] == p.split()[1])
            for k, q, p in zip(known, queries, passages, strict=True)
        ]
        noise = np.array([hash_share(p) for p in passages], np.float32)
        full = np.array(score, np.float32) + 0.1 * noise
        return Scores(full, noise, noise, noise, noise)


def hash_share(text: str) -> float:
    return np.random.default_rng(list(text.encode())).random()


QUERIES = 40


@pytest.fixture
def data() -> RankingData:
    corpus = {f"p{i}": f"passage {i} text" for i in range(QUERIES)}
    queries = {f"q{i}": f"query {i}" for i in range(QUERIES)}
    qrels: Qrels = {f"q{i}": {f"p{i}": 1} for i in range(QUERIES)}
    return RankingData("toy", corpus, queries, {"test": qrels})


@pytest.fixture
def stages() -> dict[str, Run]:
    """ "near" has the relevant passage third of ten, "far" fifth."""

    def run(place: int) -> Run:
        return {
            f"q{i}": {f"p{(i + j - place) % QUERIES}": 10.0 - j for j in range(10)} for i in range(QUERIES)
        }

    return {"near": run(2), "far": run(4)}


def row(table: Table, pool: str, model: str, kind: str) -> Row:
    (found,) = [r for r in table.rows if (r.pool, r.model, r.kind) == (pool, model, kind)]
    return found


def test_the_note_says_which_tests_are_exact(data: RankingData, stages: dict[str, Run]) -> None:
    for queries, said in ((7, "paired randomisation, all 128 signs; seed 3"), (40, "10,000 draws; seed 3")):
        some = {query: data.split("test")[query] for query in list(data.queries)[:queries]}
        table = evaluate(data, "test", stages, [Oracle("good", 1.0)], pools=("near",), qrels=some, seed=3)
        assert said in " ".join(table.text(10_000).split())


def test_rows_and_values(data: RankingData, stages: dict[str, Run]) -> None:
    metrics = ("RR@10", "nDCG@10")
    scorers = [Oracle("good", 1.0, omega=0.3), Oracle("fair", 0.7)]
    table = evaluate(data, "test", stages, scorers, depth=6, pools=("near", "far"), metrics=metrics)
    assert [(r.pool, r.model, r.kind) for r in table.rows[:2]] == [
        ("near", "", "first stage"),
        ("far", "", "first stage"),
    ]
    assert len(table.rows) == 2 + 2 * 2 * 3 and table.queries == QUERIES
    assert row(table, "near", "", "first stage").means["RR@10"] == pytest.approx(1 / 3)
    good = row(table, "far", "good", "alone")
    assert good.means == {"RR@10": 1.0, "nDCG@10": 1.0}
    assert good.versus_first["RR@10"].difference == pytest.approx(1 - 1 / 5)
    assert good.versus_first["RR@10"].p == pytest.approx(1 / 10_001)
    assert (good.versus_first["RR@10"].better, good.versus_first["RR@10"].worse) == (1.0, 0.0)
    assert table.best_first_stage == "near"
    assert good.versus_stage["near"].difference == pytest.approx(2 / 3)
    assert good.versus_stage["far"] == good.versus_first["RR@10"]
    assert set(row(table, "far", "", "first stage").versus_stage) == {"near"}
    fair = row(table, "near", "fair", "alone")
    assert 0 < fair.versus_first["RR@10"].worse < 0.5
    low, high = fair.intervals["RR@10"]
    assert low < fair.means["RR@10"] < high


def test_fusion_uses_the_checkpoints_omega(data: RankingData, stages: dict[str, Run]) -> None:
    nothing = Oracle("nothing", 0.0, omega=100.0)
    table = evaluate(data, "test", stages, [nothing], depth=10, pools=("near",), metrics=("RR@10",))
    first = row(table, "near", "", "first stage")
    assert row(table, "near", "nothing", "fused").means == first.means
    assert row(table, "near", "nothing", "fused").omega == 100.0
    assert row(table, "near", "nothing", "alone").means != first.means


def test_recall_and_hit_rate_beyond_the_depth_are_named_by_it(
    data: RankingData, stages: dict[str, Run]
) -> None:
    table = evaluate(data, "test", stages, depth=4, pools=("near",))
    assert table.metrics == ("nDCG@10", "RR@10", "AP", "Success@4", "R@4")
    assert evaluate(data, "test", stages, depth=50, pools=("near",)).metrics[-2:] == ("Success@10", "R@50")


def test_only_the_top_depth_is_reranked(data: RankingData, stages: dict[str, Run]) -> None:
    scorer = Oracle("good", 1.0)
    table = evaluate(data, "test", stages, [scorer], depth=4, pools=("far",), metrics=("R@3", "RR@10"))
    assert row(table, "far", "good", "alone").means == {"R@3": 0.0, "RR@10": 0.0}
    assert scorer.pairs == 4 * QUERIES


def test_checkpoints_are_compared_with_each_other(data: RankingData, stages: dict[str, Run]) -> None:
    scorers = [Oracle("good", 1.0), Oracle("fair", 0.5), Oracle("fair", 0.5, identity="other")]
    table = evaluate(data, "test", stages, scorers, depth=10, pools=("near",), metrics=("RR@10",))
    pairs = {(p.a, p.b): p.comparison for p in table.pairs if p.kind == "alone"}
    assert set(pairs) == {("good", "fair fair-i"), ("good", "fair other"), ("fair fair-i", "fair other")}
    assert pairs["good", "fair other"].p < 0.01 and pairs["good", "fair other"].difference > 0
    assert pairs["fair fair-i", "fair other"].p == 1.0


def test_a_pair_is_scored_once_over_pools_and_runs(
    data: RankingData, stages: dict[str, Run], tmp_path: Path
) -> None:
    first, again, other = Oracle("a", 0.5), Oracle("a", 0.5), Oracle("b", 0.5)
    args = {"depth": 10, "cache_dir": tmp_path, "metrics": ("RR@10",)}
    evaluate(data, "test", stages, [first], pools=("near",), **args)
    table = evaluate(data, "test", stages, [again, other], pools=("near", "far"), **args)
    # the two lists of ten share eight passages
    assert (first.pairs, again.pairs, other.pairs) == (10 * QUERIES, 2 * QUERIES, 12 * QUERIES)
    fresh = evaluate(data, "test", stages, [Oracle("a", 0.5)], pools=("far",), depth=10, metrics=("RR@10",))
    cached, computed = (row(t, "far", "a", "alone").values for t in (table, fresh))
    assert cached == computed


def test_what_was_scored_before_an_interruption_is_kept(
    data: RankingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.reranker.evaluation._CHUNK", 5)

    class Interrupted(Oracle):
        def score(self, queries: Sequence[str], passages: Sequence[str], on_batch: OnBatch = None) -> Scores:
            if self.pairs >= 10:
                raise KeyboardInterrupt
            return super().score(queries, passages)

    pairs = {"q1": [f"p{i}" for i in range(20)]}
    with pytest.raises(KeyboardInterrupt):
        score_pairs(Interrupted("a", 1.0), data, pairs, tmp_path)
    rest = Oracle("a", 1.0)
    runs = score_pairs(rest, data, pairs, tmp_path)
    assert rest.pairs == 10
    assert max(runs["score"]["q1"], key=lambda p: runs["score"]["q1"][p]) == "p1"


def test_a_model_that_is_only_in_memory_is_not_cached(data: RankingData, tmp_path: Path) -> None:
    for _ in range(2):
        scorer = Oracle("training", 1.0, identity="")
        score_pairs(scorer, data, {"q1": ["p1", "p2"]}, tmp_path)
        assert scorer.pairs == 2
    assert list(tmp_path.iterdir()) == []


def test_the_official_judgements_set_the_ideal(data: RankingData, stages: dict[str, Run]) -> None:
    full = {query: {**grades, "outside": 3} for query, grades in data.split("test").items()}
    table = evaluate(data, "test", stages, depth=10, pools=(), metrics=("nDCG@10",), qrels=full)
    expected = mean(evaluate_run(stages["near"], full, ("nDCG@10",))["nDCG@10"])
    assert row(table, "near", "", "first stage").means["nDCG@10"] == pytest.approx(expected)
    assert expected < 0.2


def test_text_json_and_tsv(data: RankingData, stages: dict[str, Run]) -> None:
    scorers = [Oracle("[good]", 1.0, omega=0.3), Oracle("fair", 0.7)]
    table = evaluate(data, "test", stages, scorers, depth=6, pools=("near",), metrics=("RR@10", "AP"))
    text = table.text()
    for part in ("40 queries", "top 6", "p far", "near → [good], fused ω=0.3", "0.333", "near is the best"):
        assert part in text
    stored = json.loads(json.dumps(table.json(), allow_nan=False))
    assert stored["rows"][2]["versus_first"]["AP"]["p"] < 0.001 and "values" not in stored["rows"][2]
    header, *lines = table.per_query()
    assert header[0] == "query" and len(lines) == len(table.rows) * 2 * QUERIES
    assert all(len(line) == len(header) for line in lines)


def test_what_cannot_be_evaluated_is_refused(data: RankingData, stages: dict[str, Run]) -> None:
    with pytest.raises(UserError, match="unknown pool 'rrf'; the first stages are near, far"):
        evaluate(data, "test", stages, pools=("rrf",))
    stages["near"]["q0"] = {"elsewhere": 1.0}
    with pytest.raises(UserError, match="pool near, query q0: passage elsewhere is not in toy"):
        evaluate(data, "test", stages, pools=("near",))
    with pytest.raises(UserError, match="no candidates for any of the 40 queries"):
        evaluate(data, "test", {"near": {"other": {"p1": 1.0}}}, pools=("near",))


def test_scores_that_are_not_finite_are_refused(data: RankingData) -> None:
    class Broken(Oracle):
        def score(self, queries: Sequence[str], passages: Sequence[str], on_batch: OnBatch = None) -> Scores:
            scores = super().score(queries, passages)
            scores.score[1] = np.nan
            return scores

    with pytest.raises(UserError, match="broken: 1 of 3 scores are not finite"):
        score_pairs(Broken("broken", 1.0), data, {"q1": ["p1", "p2", "p3"]})


def test_a_table_of_one_checkpoint_names_it_once(data: RankingData, stages: dict[str, Run]) -> None:
    table = evaluate(data, "test", stages, [Oracle("a/long/name", 1.0, omega=0.3)], depth=6, pools=("near",))
    lines = table.text().splitlines()
    assert [line for line in lines if "a/long/name" in line and "reranked by" in line]
    assert any(line.startswith("near → fused ω=0.3 ") for line in lines)
