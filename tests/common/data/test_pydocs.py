"""pydocs: queries and passages from docstrings, read without running any package's code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.data import pydocs
from common.data.pydocs import Docstring, build_pydocs, split_docstring
from common.data.records import RankingData
from common.errors import UserError

REST = (
    "It goes on with enough plain words to be a passage of its own, "
    "which a reader would want to find, again and again."
)


def words(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def function(name: str, sentence: str, rest: str) -> str:
    return f'def {name}(left, *, right: int = 3) -> int:\n    """{sentence}\n\n    {rest}\n    """\n\n\n'


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with one package of 30 modules whose code cannot be run, and an empty standard library."""
    package = tmp_path / "site" / "tinydocs"
    for n in range(30):
        (package / f"part{n}").mkdir(parents=True)
        body = "".join(
            function(f"do_{m}", f"Compute the number {n} times value {m}.", f"Case {n} of {m}. {REST}")
            for m in range(4)
        )
        (package / f"part{n}" / "code.py").write_text(f"raise RuntimeError('imported')\n{body}")
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (tmp_path / "stdlib").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(pydocs, "PACKAGES", ("tinydocs",))
    monkeypatch.setattr(pydocs, "C_MODULES", ())
    monkeypatch.setattr(pydocs, "FEWEST", {"train": 1, "dev": 1, "test": 1})
    monkeypatch.setattr(pydocs.sysconfig, "get_path", lambda _: str(tmp_path / "stdlib"))
    return package


def test_first_sentence_is_the_query_and_the_rest_the_passage() -> None:
    text = f"Solve the linear system, e.g. by LU. Then :func:`numpy.dot` helps.\n\n{REST}\n\n>>> f(1)\n----\n"
    query, signature, rest = split_docstring(Docstring("m.solve", "solve(a, b)", text)) or ("", "", "")
    assert query == "Solve the linear system, e.g. by LU."
    assert signature == "solve(a, b)"
    assert rest == f"Then numpy.dot helps. {REST} f(1)"


def test_signature_at_the_head_of_a_c_docstring_is_no_sentence() -> None:
    text = f"get(key, default=None) -> value\n\nReturn the value for this key.\n\n{REST}"
    parts = split_docstring(Docstring("m.get", "get", text))
    assert parts is not None
    assert parts[:2] == ("Return the value for this key.", "get(key, default=None) -> value")


@pytest.mark.parametrize(
    "text",
    [
        "Return the value of this key.",
        f"Return it.\n\n{REST}",
        f"See the other function for how this is done.\n\n{REST}",
        f"Return the value of this key.\n\nIt will return the value of this key. {REST}",
    ],
    ids=["no rest", "short sentence", "only a reference", "rest repeats the sentence"],
)
def test_docstring_that_makes_no_honest_pair_is_left_out(text: str) -> None:
    assert split_docstring(Docstring("m.f", "f()", text)) is None


def test_packages_are_read_without_running_them(machine: Path) -> None:
    data = build_pydocs()
    assert len(data.corpus) == 120
    name = "tinydocs.part3.code.do_2"
    assert data.queries[f"q:{name}"] == "Compute the number 3 times value 2."
    assert data.corpus[name] == f"do_2(left, right) Case 3 of 2. {REST}"
    assert "tinydocs" not in sys.modules


def test_a_module_lies_in_one_split(machine: Path) -> None:
    splits: dict[str, set[str]] = {}
    for split, qrels in build_pydocs().qrels.items():
        for query in qrels:
            splits.setdefault(query.split(".")[1], set()).add(split)
    assert len(splits) == 30
    assert all(len(found) == 1 for found in splits.values())


def test_duplicates_are_removed_wherever_they_lie(machine: Path) -> None:
    before = build_pydocs()
    (machine / "part7" / "more.py").write_text(
        function("same_query", "Compute the NUMBER 3 times value 2!", f"Other words here. {REST}")
        + function("same_rest", "Give back another number altogether.", f"Case 3 of 2. {REST}")
    )
    after = build_pydocs()
    assert after.fingerprint == before.fingerprint
    assert before.dropped.get("duplicate", 0) == 0 and after.dropped["duplicate"] == 2


def test_private_objects_and_tests_are_not_documentation(machine: Path) -> None:
    before = build_pydocs().fingerprint
    (machine / "tests").mkdir()
    (machine / "tests" / "code.py").write_text(function("f", "Check that the thing works well.", REST))
    (machine / "part1" / "more.py").write_text(function("_f", "Hide this thing from the public.", REST))
    assert build_pydocs().fingerprint == before


def test_machine_without_docstrings_says_what_to_do(machine: Path) -> None:
    for path in machine.rglob("code.py"):
        path.write_text("x = 1\n")
    with pytest.raises(UserError, match=r"too few docstrings.*train: 0 < 1.*name other data"):
        build_pydocs()


@pytest.fixture(scope="module")
def real() -> RankingData:
    return build_pydocs()


@pytest.mark.slow
def test_this_machine_has_enough_of_each_split(real: RankingData) -> None:
    sizes = {split: len(qrels) for split, qrels in real.qrels.items()}
    assert sizes["train"] >= 1200 and 150 <= sizes["dev"] <= 300 and sizes["test"] >= 300
    assert 3000 <= len(real.corpus) <= 6000


@pytest.mark.slow
def test_no_passage_holds_its_query_and_no_text_is_repeated(real: RankingData) -> None:
    for query, text in real.queries.items():
        assert words(text) not in words(real.corpus[query.removeprefix("q:")])
    assert len({words(text) for text in real.queries.values()}) == len(real.queries)
    assert len({words(text) for text in real.corpus.values()}) == len(real.corpus)


@pytest.mark.slow
def test_no_module_group_is_in_two_splits(real: RankingData) -> None:
    groups = {
        split: {pydocs._group(name) for grades in qrels.values() for name in grades}
        for split, qrels in real.qrels.items()
    }
    assert not groups["train"] & (groups["dev"] | groups["test"]) and not groups["dev"] & groups["test"]
    for group in ("numpy.fft.helper.fftfreq", "scipy.fft.basic.rfft", "jax.numpy.fft.fft"):
        assert pydocs._group(group) == "fft"


@pytest.mark.slow
def test_another_process_builds_the_same_data_and_loads_no_framework(real: RankingData) -> None:
    code = (
        "import sys; from common.data.pydocs import build_pydocs; print(build_pydocs().fingerprint); "
        "sys.exit(any(name in sys.modules for name in ('numpy', 'jax', 'scipy', 'flax')))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == real.fingerprint
