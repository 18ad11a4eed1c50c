"""The table of `make parity`: a row for each subject, the worst of every column, and where."""

from __future__ import annotations

from tests.parity.backends import Found, table


def test_a_row_holds_the_worst_of_each_pair_and_where_it_is_nearest_to_its_tolerance() -> None:
    found = [
        Found("bert, output 0", "jax with transformers", 2e-6, 1e-4),
        Found("bert, gradient by x", "mlx with transformers", 7e-6, 1e-4),
        Found("bert, output 0", "jax with mlx", 1e-7, 1e-4),
        Found("bert, output 1", "jax with mlx", 3e-7, 1e-4),
        Found("rates, linear", "jax with mlx", 0.0, 1e-6),
    ]
    assert table(found)[2:] == [
        "| bert | transformers | 2.0e-06 | 7.0e-06 | 3.0e-07 | 0.0001 | 4 | gradient by x |",
        "| rates |  |  |  | 0.0e+00 | 1e-06 | 1 | linear |",
    ]
