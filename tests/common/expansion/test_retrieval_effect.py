"""The effect of expansions on a collection: which searches are compared, and what the table says."""

from __future__ import annotations

import pytest

from common.data.generated import generated_collection, generated_rows
from common.errors import UserError
from common.expansion.retrieval_effect import (
    NO_EXPANSION,
    RM3,
    TEMPLATE,
    golden_lines,
    retrieval_effect,
    template_lines,
)


def test_golden_lines_are_significantly_better_than_every_baseline() -> None:
    rows = [row for part in generated_rows() for row in part]
    effect = retrieval_effect(generated_collection(), "test", {"golden": golden_lines(rows)})
    assert [row.name for row in effect.rows] == [NO_EXPANSION, RM3, TEMPLATE, "golden"]
    golden = effect.rows[-1]
    assert set(golden.versus) == {NO_EXPANSION, RM3, TEMPLATE}
    assert all(versus.difference > 0.2 and versus.p < 0.01 for versus in golden.versus.values())
    assert golden.versus[NO_EXPANSION].worse <= 0.1 < golden.versus[NO_EXPANSION].better
    table = effect.table()
    assert table["rows"][0][3:] == [None] * 4
    assert table["rows"][-1][1] == golden.means["nDCG@10"] and table["rows"][-1][3].startswith("+0.")
    assert "golden − RM3" in table["note"] and "BM25 alone" in table["note"]


def test_an_expander_that_gives_nothing_changes_nothing_and_queries_can_be_few() -> None:
    asked: list[str] = []

    def expand(query: str) -> tuple[tuple[str, str], ...]:
        asked.append(query)
        return ()

    effect = retrieval_effect(generated_collection(), "test", {"nothing": expand}, max_queries=7)
    assert effect.queries == len(asked) == 7
    versus = effect.rows[-1].versus[NO_EXPANSION]
    assert (versus.difference, versus.p, versus.worse) == (0.0, 1.0, 0.0)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(UserError, match="no split 'dev'"):
        retrieval_effect(generated_collection(), "dev", {})


def test_the_template_is_searched_as_qmd_reads_it() -> None:
    assert [kind for kind, _ in template_lines("ssh keys")] == ["hyde", "lex", "lex", "vec", "vec"]
