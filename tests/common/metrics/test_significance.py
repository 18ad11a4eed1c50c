"""Paired tests: error rates on made-up queries, and agreement with the exact answer."""

import itertools

import numpy as np
import pytest

from common.metrics.significance import bootstrap_interval, paired_randomisation, randomisation_draws


def test_the_p_value_is_the_share_of_sign_flips_at_least_as_extreme() -> None:
    rng = np.random.default_rng(3)
    for queries, tolerance in ((1, 0.0), (5, 0.0), (13, 0.0), (14, 0.015)):  # beyond 13 a sample of the flips
        a, b = rng.normal(0.4, 1, queries), np.zeros(queries)
        sums = np.array(list(itertools.product((-1, 1), repeat=queries))) @ a
        exact = np.mean(np.abs(sums) >= abs(a.sum()) - 1e-12)
        assert paired_randomisation(a, b, n=20_000, seed=1) == pytest.approx(exact, abs=tolerance)


def test_few_queries_never_give_less_than_two_of_all_flips() -> None:
    for queries in (1, 2, 5, 13):
        better = np.linspace(0.1, 0.7, queries)
        assert paired_randomisation(better, np.zeros(queries)) == 2 / 2**queries


@pytest.mark.parametrize("queries", [1, 7, 13, 14, 300])
def test_the_words_for_a_table_say_whether_the_test_is_exact(queries: int) -> None:
    a, b = np.random.default_rng(queries).normal(size=(2, queries))
    exact = len({paired_randomisation(a, b, n=99, seed=seed) for seed in range(20)}) == 1
    assert randomisation_draws(queries, 99) == (f"all {2**queries:,} signs" if exact else "99 draws")


def test_equal_systems_give_one_and_the_order_does_not_matter() -> None:
    a = np.linspace(0, 1, 30)
    b = a[::-1] + np.linspace(0, 0.2, 30)
    assert paired_randomisation(a, a) == 1.0
    assert paired_randomisation(a, b, seed=5) == paired_randomisation(b, a, seed=5)


def test_a_clear_gain_reaches_the_smallest_p_and_not_zero() -> None:
    assert paired_randomisation(np.full(60, 0.7), np.full(60, 0.5), n=1000) == pytest.approx(1 / 1001)


def test_false_alarms_come_at_the_stated_rate() -> None:
    rng = np.random.default_rng(11)
    p = [paired_randomisation(rng.normal(size=25), rng.normal(size=25), n=400, seed=i) for i in range(300)]
    assert 0.02 <= np.mean(np.array(p) < 0.05) <= 0.09


def test_the_interval_covers_the_mean_and_shrinks_with_queries() -> None:
    rng = np.random.default_rng(2)
    few, many = rng.normal(0.5, 0.2, 50), rng.normal(0.5, 0.2, 5000)
    low, high = bootstrap_interval(few, n=2000)
    assert low < few.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * few.std() / np.sqrt(50), rel=0.15)
    narrow = bootstrap_interval(many, n=500)
    assert narrow[1] - narrow[0] < (high - low) / 5


def test_the_interval_of_a_difference_is_paired() -> None:
    rng = np.random.default_rng(4)
    hard = rng.normal(size=80)
    low, high = bootstrap_interval(hard + 0.1, hard, n=500)
    assert low == pytest.approx(0.1) and high == pytest.approx(0.1)


def test_a_seed_repeats_and_lengths_must_agree() -> None:
    a, b = np.arange(9.0), np.arange(9.0)[::-1]
    assert bootstrap_interval(a, b, n=100, seed=7) == bootstrap_interval(a, b, n=100, seed=7)
    with pytest.raises(ValueError, match="one shape"):
        paired_randomisation(a, b[:-1])
