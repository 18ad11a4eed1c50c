"""How QMD reads a model's text."""

from __future__ import annotations

import pytest

from common.expansion.qmd import in_grammar, parse_completion


def test_lines_are_kept_as_qmd_keeps_them() -> None:
    text = "lex: ssh public key\nvec:login secrets\n note \nkex: ssh\nhyde : The SSH pair: two files.\nlex:\n"
    parsed = parse_completion("ssh keys", text)
    assert parsed.lines == (("lex", "ssh public key"), ("hyde", "The SSH pair: two files."))
    assert (parsed.dropped, parsed.fallback) == (4, False)


@pytest.mark.parametrize("text", ["", "nothing typed", "lex: login", "<think>\n</think>"])
def test_without_a_line_qmd_takes_its_own(text: str) -> None:
    parsed = parse_completion("ssh keys", text)
    assert parsed.fallback and parsed.lines == (("hyde", "Information about ssh keys"),)


def test_a_line_equal_to_the_query_is_not_searched_and_others_scripts_pass() -> None:
    parsed = parse_completion("ssh keys", "lex: ssh keys\nvec: ssh keys for servers")
    assert parsed.lines == (("vec", "ssh keys for servers"),) and parsed.dropped == 1
    assert parse_completion("路由器", "lex: gateway<|im_end|>").lines == (("lex", "gateway"),)


@pytest.mark.parametrize(
    "text, follows",
    [
        ("lex: a\n", True),
        ("lex: a: b\nhyde: c\n", True),
        ("lex:  \n", True),
        ("", False),
        ("lex: a", False),
        ("lex:a\n", False),
        ("Lex: a\n", False),
        ("lex: \n", False),
        ("lex: a\n\n", False),
        ("lex: a\n x\n", False),
        ("<think>\n</think>\nlex: a\n", False),
    ],
)
def test_the_grammar(text: str, follows: bool) -> None:
    assert in_grammar(text) is follows
