"""How good an expansion looks: QMD's score to the point, its form of January 2026, and a strict one.

Source: tobi/qmd finetune/reward.py (HEAD of 2026-08, and eb1b77c for January). It judges form, not retrieval:
a template without a model passes 90 %, so every score is shown beside `template_expansion`'s.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import combinations

RATINGS = ((80.0, "Excellent"), (60.0, "Good"), (40.0, "Acceptable"), (20.0, "Poor"), (0.0, "Failed"))
_PREFIXES = ("lex:", "vec:", "hyde:")
_ONLY = re.compile(r"\s+/only:(lex|vec|hyde)\s*$", re.IGNORECASE)
_CONTROL = ("<|im_start|>", "<|endoftext|>", "\nassistant\n", "\nuser\n")
_THINK = re.compile(r"<think>.*?</think>", re.DOTALL)
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")  # of languages without spaces each letter
_EDGES = ".,!?:;()[]\"'"  # stripped off a word before it is looked at as an entity

STOP = frozenset("a an and are as be by for in is it of on or that the this to with".split())
FILLER = frozenset(("basics", "overview"))
GENERIC = (
    *("details about", "find information about", "find out about", "get information", "guide to"),
    *("help with", "how to", "information on", "learn about", "look up", "search for", "what is"),
)
KEY = frozenset(
    "a about after all also an and any asked at been before being between both but by call can "
    "conversation discussion do does during each email every few find for from get had has have here "
    "how i if in into is its just like me meeting more most my no not notes of on only or other out "
    "said same show so some such tell than that the their then there this through to up very was we "
    "were what when where which who why with your".split()
)
KEY_JANUARY = frozenset(
    "what is how to the a an in on for of and or with my your do does can i me we who where when why "
    "which find get show tell".split()
)
VERB = frozenset(
    "about add alternative best between build change check common compare comparing configure "
    "connecting convert could create debug define delete deploy deploying describe difference disable "
    "enable example explain fix good help implement implementing install introduction latest list make "
    "manage managing migrate migrating monitor monitoring need new old optimize optimizing overview "
    "performance please possible read recent recommended remove resolve resolving review run search set "
    "setting settings setup should start stop test troubleshoot troubleshooting tutorial typical "
    "understand understanding update use using want would write".split()
)


# words that any query could be given: with these and its own words alone a line finds nothing new
BOILERPLATE = frozenset(
    "advanced answer answers article basic basics best beginner beginners complete comprehensive cover "
    "covers covering definition describe describes detail detailed details document documentation "
    "documents essential everything example examples explain explained explains explanation facts full "
    "general good guide guides help ideas important info information introduction know learn learning "
    "list meaning method methods need needs notes overview page pages practical practice practices "
    "problem question questions reference related resource resources simple solution solutions step "
    "steps summary text tips topic topics tutorial tutorials understand understanding use used useful "
    "user users using way ways work works".split()
)


@dataclass(frozen=True)
class ExpansionScore:
    """A score in its parts (points). `percentage` is in [0, 100]; `reward` in [0, 1] is for training."""

    parts: Mapping[str, int]  # format, diversity, hyde, quality, entity, think
    total: int
    maximum: int
    percentage: float
    reward: float
    only: str | None = None  # the type that an /only query asks for
    entities: frozenset[str] = frozenset()
    faults: tuple[str, ...] = field(default=())  # why it fails or, in the strict form, what it loses

    @property
    def rating(self) -> str:
        return next(name for least, name in RATINGS if self.percentage >= least)


Scorer = Callable[[str, str], ExpansionScore]  # of a query and a model's raw text


def score(query: str, text: str) -> ExpansionScore:
    """The score of today's reward.py for a model's text, which may hold control tokens and think blocks."""
    cleaned, thought = clean(text)
    query = query.strip()
    only = _ONLY.search(query)
    fault = _hard_fault(cleaned)
    if fault:
        return _failed(fault)
    lines = split_lines(cleaned)
    if only:
        return _score_only(query[: only.start()].strip(), only[1].lower(), lines, thought)
    return _score_all(query, lines, thought)


def score_january(query: str, text: str) -> ExpansionScore:
    """The score that the published 92 % were measured with: no /only, milder on entities and on echoes."""
    cleaned, thought = clean(text)
    query, fault = query.strip(), _hard_fault(cleaned)
    if fault:
        return _failed(fault)
    lines = split_lines(cleaned)
    lex, vec, hyde = lines["lex"], lines["vec"], lines["hyde"]
    found = entities(query, january=True)
    echoes = sum(_echoes(line, query) for line in (*lex, *vec))
    parts = {
        "format": _format(lex, vec),
        "diversity": _both(lex, vec) + _pairs(lex, 2) + _pairs(vec, 3) + max(0, 5 - 3 * echoes),
        "hyde": _hyde(hyde),
        "quality": _quality_base(query, lex, vec, KEY_JANUARY),
        "entity": _entity(found, lex, vec, dropped=False),
        "think": 0 if thought else 20,
    }
    return _summed(parts, 140 if hyde else 120, cap=100.0, found=found)


def score_strict(query: str, text: str) -> ExpansionScore:
    """Today's score times the share of lines that can help a search; 0 without a line.

    A line helps if QMD keeps it (it has a word of the query), it is no echo and no repetition, it has a
    word that is neither the query's nor boilerplate, and it is in the query's script. A lex echo caps the
    reward at 0.5, as it caps the percentage. `faults` names each line that does not help.
    """
    found = score(query, text)
    if found.faults:
        return found
    lines = split_lines(clean(text)[0])
    count = sum(map(len, lines.values()))
    if not count:
        return _failed("no line", found.only)
    faults = tuple(useless_lines(query, text))
    asked = _ONLY.sub("", query.strip())
    most = 0.5 if any(_echoes(line, asked) for line in lines["lex"]) else 1.0
    reward = min(found.reward, most) * (1 - len(faults) / count)
    return replace(found, reward=reward, percentage=round(100 * reward, 1), faults=faults)


def useless_lines(query: str, text: str) -> Iterator[str]:
    """What is wrong with each line that cannot help a search for the query: one entry a line."""
    query = _ONLY.sub("", query.strip())
    seen: set[str] = set()
    for kind, texts in split_lines(clean(text)[0]).items():
        for line in texts:
            fault = "repeats another line" if line.lower() in seen else _useless(line, query)
            seen.add(line.lower())
            if fault:
                yield f"{kind} line {line[:40]!r} {fault}"


def _useless(line: str, query: str) -> str:
    """Why a line cannot help a search for the query; empty if it can."""
    words = _words(line)
    if not words:
        return "is blank"
    if _echoes(line, query):
        return "echoes the query"
    if is_cjk(query) and not re.search(f"[{_CJK}]", line):
        return "is in another script"
    if not keeps_term(line, query):
        return "has no word of the query: QMD drops it"
    asked = _stems(query)
    return "" if any(_brings(word, asked) for word in words) else "says nothing that the query does not"


def keeps_term(line: str, query: str) -> bool:
    """Whether QMD's parser keeps a line: it contains a term of the query, or the query has none (CJK)."""
    terms = re.sub(r"[^a-z0-9]+", " ", query.lower()).split()
    return not terms or any(term in line.lower() for term in terms)


def has_key_term(line: str, query: str, key: frozenset[str] = KEY) -> bool:
    """Whether a lex line has a word of the query that is one to search by; True if the query has none."""
    terms = set(query.lower().split()) - key
    return not terms or bool(terms & set(line.lower().split()))


def is_cjk(query: str) -> bool:
    """Whether most letters of a query are Chinese, Japanese or Korean."""
    return len(re.findall(f"[{_CJK}]", query)) * 2 > len(re.findall(r"[^\W\d_]", query))


def template_expansion(query: str) -> str:
    """An expansion by no model: the query in fixed phrases. What any model has to be better than."""
    only = _ONLY.search(query)
    asked = query[: only.start()].strip() if only else query.strip()
    lines = (
        ("hyde", f"This document explains {asked}: what it is, how it works and which steps it takes."),
        ("lex", f"{asked} guide examples"),
        ("lex", f"{asked} reference documentation"),
        ("vec", f"where to find detailed documentation about {asked}"),
        ("vec", f"step by step explanation of {asked} with examples"),
    )
    wanted = [f"{kind}: {text}" for kind, text in lines if not only or kind == only[1].lower()]
    return "\n".join(wanted)


def clean(text: str) -> tuple[str, bool]:
    """The text without `<|im_end|>` and think blocks, and whether it had a think block."""
    text = text.strip().replace("<|im_end|>", "")
    thought = "<think>" in text and "</think>" in text
    return (_THINK.sub("", text) if thought else text).strip(), thought


def split_lines(text: str) -> dict[str, list[str]]:
    """Type -> texts of its lines, in order; blank lines and other lines are left out."""
    found: dict[str, list[str]] = {"lex": [], "vec": [], "hyde": []}
    for line in map(str.strip, text.split("\n")):
        if line.startswith(_PREFIXES):
            kind, _, content = line.partition(":")
            found[kind].append(content.strip())
    return found


def entities(query: str, *, january: bool = False) -> frozenset[str]:
    """Words of a query that an expansion must keep, in lower case: names, abbreviations, C++."""
    key = KEY_JANUARY if january else KEY
    found, chained = set(), False  # chained: the word before was caught by a rule of its own
    for place, word in enumerate(query.split()):
        word = word.strip(_EDGES)
        if not word:
            chained = False
            continue
        named = _is_entity(word, place, january)
        if named or (chained and word.lower() not in key):
            found.add(word.lower())
            named = named or january  # in January names went on without an end
        chained = named
    return frozenset(found)


def _is_entity(word: str, place: int, january: bool) -> bool:
    if word.isupper() and len(word) >= 2:
        return True
    named = word[0].isupper() and word.lower() not in (KEY_JANUARY if january else KEY)
    if named and (place or not january):
        return place > 0 or word.lower() not in VERB
    if len(word) >= 2 and any(mark in word for mark in ".+-#@"):
        return True
    return word[0].isupper() and any(letter.isupper() for letter in word[1:])


@cache
def _stemmer() -> Callable[[str], str]:
    import Stemmer

    stem: Callable[[str], str] = Stemmer.Stemmer("english").stemWord
    return stem


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _stems(text: str) -> frozenset[str]:
    return frozenset(map(_stemmer(), _words(text)))


def _brings(word: str, asked: frozenset[str]) -> bool:
    """Whether a word is one to search by that the query lacks."""
    cjk = re.fullmatch(f"[{_CJK}]", word) is not None
    known = word in STOP or word in KEY or word in BOILERPLATE or (len(word) < 2 and not cjk)
    return not known and _stemmer()(word) not in asked


# --- today's form ---


def _score_all(query: str, lines: Mapping[str, Sequence[str]], thought: bool) -> ExpansionScore:
    lex, vec, hyde = lines["lex"], lines["vec"], lines["hyde"]
    apart = 3 if len(query.split()) >= 5 else 2
    echoes = [sum(_echoes(line, query) for line in part) for part in (lex, vec)]
    found = entities(query)
    parts = {
        "format": _format(lex, vec),
        "diversity": _both(lex, vec)
        + _pairs(lex, apart)
        + _pairs(vec, apart)
        + max(-10, 5 - 10 * echoes[0] - 3 * echoes[1]),
        "hyde": _hyde(hyde),
        "quality": _quality(query, lex, vec),
        "entity": _entity(found, lex, vec, dropped=True),
        "think": 0 if thought else 20,
    }
    return _summed(parts, 140 if hyde else 120, cap=50.0 if echoes[0] else 100.0, found=found)


def _score_only(query: str, only: str, lines: Mapping[str, Sequence[str]], thought: bool) -> ExpansionScore:
    wanted, others = lines[only], sum(len(part) for kind, part in lines.items() if kind != only)
    if not wanted:
        return _failed(f"no {only} line", only)
    apart = 3 if len(query.split()) >= 5 else 2
    found = entities(query)
    diversity = 15 if len(wanted) == 1 else 15 + max(0, 15 - 5 * _alike(wanted, apart))
    parts = {
        "format": max(0, 30 - 10 * others),
        "diversity": max(0, diversity - 5 * sum(_echoes(line, query) for line in wanted)),
        "hyde": 0,
        "quality": 10 + _QUALITY_ONLY[only](query, wanted),
        "entity": _entity_only(found, wanted),
        "think": 0 if thought else 20,
    }
    return _summed(parts, 120, cap=100.0, found=found, only=only)


def _summed(
    parts: dict[str, int], maximum: int, *, cap: float, found: frozenset[str], only: str | None = None
) -> ExpansionScore:
    total = sum(parts.values())
    share = min(1.0, max(0.0, total / maximum))
    parts["entity"] = max(0, parts["entity"])
    return ExpansionScore(parts, max(0, total), maximum, min(cap, round(100 * share, 1)), share, only, found)


def _failed(fault: str, only: str | None = None) -> ExpansionScore:
    parts = dict.fromkeys(("format", "diversity", "hyde", "quality", "entity", "think"), 0)
    return ExpansionScore(parts, 0, 100, 0.0, 0.0, only, faults=(fault,))


def _hard_fault(text: str) -> str:
    for control in _CONTROL:
        if control in text:
            return f"control text {control!r}"
    for line in map(str.strip, text.split("\n")):
        if line and not line.startswith(_PREFIXES):
            return f"a line without a type: {line[:40]!r}"
    return ""


def _format(lex: Sequence[str], vec: Sequence[str]) -> int:
    return 10 + 10 * bool(lex) + 10 * bool(vec)


def _both(lex: Sequence[str], vec: Sequence[str]) -> int:
    return 10 * bool(lex and vec) + 5 * (len(lex) + len(vec) >= 2)


def _pairs(lines: Sequence[str], apart: int) -> int:
    return max(0, 5 - 2 * _alike(lines, apart))


def _alike(lines: Sequence[str], apart: int) -> int:
    """Pairs of lines that are nearly the same: one holds the other, or they differ in few words."""
    lower = [line.lower().strip() for line in lines]
    return sum(
        a in b or b in a or len(set(a.split()) ^ set(b.split())) < apart for a, b in combinations(lower, 2)
    )


def _echoes(line: str, query: str) -> bool:
    line, query = line.lower().strip(), query.lower().strip()
    return line == query or (query in line and len(line) < len(query) + 10)


def _hyde(hyde: Sequence[str]) -> int:
    if not hyde:
        return 0
    text = hyde[0]
    length = 5 if 50 <= len(text) <= 200 else 2 if len(text) < 50 else 0
    counts = Counter(re.findall(r"\w+", text.lower()))
    repeated = sum(
        2 * (count - 2) for word, count in counts.items() if count >= 3 and len(word) > 2 and word not in STOP
    )
    return 5 + length + 5 + max(0, 5 - repeated)


def _quality_base(query: str, lex: Sequence[str], vec: Sequence[str], key: frozenset[str] = KEY) -> int:
    points = 5
    if lex and vec and sum(map(len, lex)) / len(lex) <= sum(map(len, vec)) / len(vec):
        points += 5
    if vec:
        points += 5 if all(" " in line and len(line) > 15 for line in vec) else 2
    if lex:
        kept = [has_key_term(line, query, key) for line in lex]
        points += 5 if all(kept) else 2 * any(kept)
    return points


def _quality(query: str, lex: Sequence[str], vec: Sequence[str]) -> int:
    points = _quality_base(query, lex, vec) - 3 * _fillers(lex, query)
    return points + 3 * (any('"' in line for line in lex) and len(query.split()) >= 2)


def _fillers(lex: Sequence[str], query: str) -> int:
    filler = FILLER - set(query.lower().split())
    return sum(bool(filler & set(line.lower().split())) for line in lex)


def _is_generic(line: str) -> bool:
    line = line.lower().strip()
    for phrase in GENERIC:
        words = phrase.split()
        if phrase in line or line.startswith(words[0]):
            rest = line
            for word in words:
                rest = rest.replace(word, "", 1).strip()
            if len(rest) < 3:
                return True
    return False


def _holds(line: str, found: frozenset[str]) -> bool:
    return any(entity in line.lower() for entity in found)


def _entity(found: frozenset[str], lex: Sequence[str], vec: Sequence[str], *, dropped: bool) -> int:
    if not found:
        return 10
    if not lex:
        return 0
    kept = [_holds(line, found) for line in lex]
    points = 15 if all(kept) else 5 if any(kept) else -30
    if dropped:
        text = "\n".join((*lex, *vec)).lower()
        points -= 20 * sum(entity not in text for entity in found)
    points -= 15 * sum(map(_is_generic, lex))
    return points + 5 * any(_holds(line, found) for line in vec)


def _entity_only(found: frozenset[str], wanted: Sequence[str]) -> int:
    kept = [_holds(line, found) for line in wanted]
    if not found:
        return 10
    return 20 if all(kept) else 15 if any(kept) else 0


def _quality_lex(query: str, lex: Sequence[str]) -> int:
    kept = all(has_key_term(line, query) for line in lex)
    return 5 * kept + 5 * (not any(map(_is_generic, lex))) - 3 * _fillers(lex, query)


def _quality_vec(_query: str, vec: Sequence[str]) -> int:
    return 10 if all(" " in line and len(line) > 15 for line in vec) else 5


def _quality_hyde(_query: str, hyde: Sequence[str]) -> int:
    size = len(hyde[0])
    return 10 if 50 <= size <= 200 else 5 * (30 <= size <= 300)


_QUALITY_ONLY = {"lex": _quality_lex, "vec": _quality_vec, "hyde": _quality_hyde}


SCORERS: dict[str, Scorer] = {"qmd": score, "january": score_january, "strict": score_strict}
