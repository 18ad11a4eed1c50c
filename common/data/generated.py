"""Expansion rows, a collection and queries made from word lists, the same everywhere: no data is needed.

A query names a thing and what is done to it; the passage about it uses other words for both, which the golden
expansions know. So a model that learns the rows finds more than the query's own words do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from common.data.expansion import EvalQuery, ExpansionRow, Line, in_order
from common.data.records import Qrels, RankingData

_HELD_OUT = 0.15  # share of (thing, action) topics whose rows are validation and whose queries are test


@dataclass(frozen=True)
class _Domain:
    things: tuple[tuple[str, str], ...]  # word of a query, words of the passage
    actions: tuple[tuple[str, str], ...]
    steps: tuple[str, ...]


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    found = (pair.split("=") for pair in text.split(", "))
    return tuple((word.strip(), other.strip()) for word, other in found)


_DOMAINS = {
    "technical": _Domain(
        _pairs(
            "router=gateway, firewall=packet filter, database=sql store, server=host machine, password=login "
            "secret, backup=snapshot, queue=message broker, container=docker image, certificate=tls key, "
            "cluster=node pool, webhook=callback url, compiler=build toolchain"
        ),
        _pairs(
            "configure=set up, debug=diagnose, migrate=move over, secure=protect, monitor=observe, "
            "automate=script"
        ),
        (
            "read the current settings and note each value before anything is changed",
            "check the log for warnings and repeat the step that failed",
            "keep a copy of the old state so that the change can be undone",
            "apply the change to one machine first and wait for an hour",
        ),
    ),
    "home": _Domain(
        _pairs(
            "faucet=tap, sofa=couch, heater=radiator, lawn=grass yard, roof=shingles, carpet=rug, "
            "fridge=icebox, drain=waste pipe, bicycle=two-wheeler, lamp=light fixture, fence=picket row, "
            "mattress=bed pad"
        ),
        _pairs(
            "repair=fix, clean=wash, replace=swap out, choose=pick, paint=coat, insulate=seal against cold"
        ),
        (
            "gather the tools, cover the floor and open a window for fresh air",
            "turn the supply off and let the parts cool down before work begins",
            "take a photo first, since it helps to put everything back",
            "use a mild soap and a soft cloth so that nothing is scratched",
        ),
    ),
    "kitchen": _Domain(
        _pairs(
            "bread=sourdough loaf, coffee=espresso, soup=broth, pasta=noodles, salad=leafy greens, "
            "cake=sponge, rice=basmati grain, pickles=brined cucumbers, cheese=aged curd, jam=fruit preserve"
        ),
        _pairs("bake=cook in the oven, freeze=chill, season=spice up, reheat=warm up, store=keep"),
        (
            "weigh the ingredients and let them reach room temperature",
            "taste after ten minutes and add a pinch of salt when it is flat",
            "use a glass jar with a tight lid and write the date on it",
            "let it rest under a towel before it is served",
        ),
    ),
    "office": _Domain(
        _pairs(
            "invoice=bill, resume=curriculum vitae, contract=agreement, budget=spending plan, "
            "report=findings, calendar=agenda, salary=pay, survey=questionnaire, "
            "presentation=slide deck, deadline=due date"
        ),
        _pairs("write=draft, review=proofread, share=circulate, negotiate=bargain over, archive=file away"),
        (
            "begin with the purpose, the people concerned and the date",
            "ask a colleague to read it with fresh eyes before it goes out",
            "keep one version and name it by the day on which it was made",
            "agree in writing on who does what until when",
        ),
    ),
}
_PEOPLE = ("Maria", "Tomas", "Aiko", "Leila", "Oskar", "Priya")
_SENSES = (  # a word, the sense that is meant, the one to exclude
    *(("jaguar", "car", "animal"), ("mercury", "planet", "metal"), ("crane", "machine", "bird")),
    *(("bass", "guitar", "fish"), ("seal", "animal", "gasket"), ("mouse", "device", "rodent")),
    *(("amazon", "river", "shop"), ("python", "language", "snake"), ("rust", "language", "corrosion")),
)
_ASPECTS = ("maintenance", "history", "prices", "features")
_CJK_THINGS = _pairs("路由器=网关, 数据库=数据存储, 咖啡=浓缩咖啡, 自行车=单车, 合同=协议")
_CJK_ACTIONS = _pairs("修理=维修, 选择=挑选, 更换=替换, 保存=存放")
_CJK_STEPS = "一步一步地完成，最后检查结果是否正确，并记录所做的改动。"


def generated_rows() -> tuple[list[ExpansionRow], list[ExpansionRow]]:
    """Training and validation rows, the same on every machine; no topic has rows in both."""
    train: list[ExpansionRow] = []
    val: list[ExpansionRow] = []
    for topic, row in _rows():
        (val if _share(topic) < _HELD_OUT else train).append(row)
    return train, val


def generated_collection() -> RankingData:
    """Ranking data named "generated": a passage a topic in other words than its queries; split test holds the
    topics of the validation rows, train the others."""
    corpus: dict[str, str] = {}
    queries: dict[str, str] = {}
    qrels: dict[str, Qrels] = {"train": {}, "test": {}}
    for topic, domain, thing, action in _topics():
        corpus[topic] = _passage(topic, domain, thing[1], action[1])
        split = "test" if _share(topic) < _HELD_OUT else "train"
        for number, query in enumerate(_queries(thing[0], action[0])):
            queries[f"{topic}:{number}"] = query
            qrels[split][f"{topic}:{number}"] = {topic: 1}
    return RankingData("generated", corpus, queries, qrels).validate()


def generated_queries() -> list[EvalQuery]:
    """Evaluation queries by group, none of which is trained on: validation topics, and words of no list."""
    val = generated_rows()[1]
    groups = dict.fromkeys(row.category for row in val)
    found = [EvalQuery(r.query, g) for g in groups for r in [r for r in val if r.category == g][:8]]
    return [*found, *(EvalQuery(query, group) for group, texts in _UNSEEN.items() for query in texts)]


_UNSEEN = {
    "unseen words": ("tax return for freelancers", "tent with two rooms", "why do cats purr", "knots"),
    "unseen entities": ("call with Henrik about the Orion launch", "Nakamura's talk on GraphQL", "USB-C hub"),
    "unseen CJK": ("如何学习游泳", "東京の天気", "한국어 문법"),
}


# --- rows ---


def _topics() -> Iterator[tuple[str, str, tuple[str, str], tuple[str, str]]]:
    for name, domain in _DOMAINS.items():
        for thing in domain.things:
            for action in domain.actions:
                yield f"{name}-{thing[0]}-{action[0]}", name, thing, action


def _queries(thing: str, action: str) -> tuple[str, str]:
    return f"{action} {thing}", f"how to {action} the {thing}"


def _rows() -> Iterator[tuple[str, ExpansionRow]]:
    """(topic, row): a topic's rows are trained on or held out together."""
    for topic, domain, thing, action in _topics():
        lines = _lines(topic, domain, thing, action)
        short, long = _queries(thing[0], action[0])
        yield topic, ExpansionRow(short, lines, category=domain)
        yield topic, ExpansionRow(long, lines, category="how-to")
        kind = ("lex", "vec", "hyde")[_pick(topic, "only", 3)]
        if _pick(topic, "has-only", 2):
            own = tuple(line for line in lines if line[0] == kind)
            yield topic, ExpansionRow(f"{short} /only:{kind}", own, category="/only")
        person = _PEOPLE[_pick(topic, "person", len(_PEOPLE))]
        if _pick(topic, "has-person", 2):
            yield topic, _personal(person, thing, action)
    yield from _ambiguous()
    yield from _chinese()


def _lines(topic: str, domain: str, thing: tuple[str, str], action: tuple[str, str]) -> tuple[Line, ...]:
    steps = _DOMAINS[domain].steps
    step = steps[_pick(topic, "hyde", len(steps))]
    return in_order(
        (
            ("hyde", f"To {action[0]} the {thing[0]}, {action[1]} the {thing[1]} in small steps: {step}."),
            ("lex", f"{thing[0]} {action[1]}"),
            ("lex", f"{action[0]} {thing[1]}"),
            ("vec", f"how can I {action[1]} the {thing[1]} or {thing[0]} myself"),
            ("vec", f"steps to {action[0]} and {action[1]} the {thing[1]}"),
        )
    )


def _personal(person: str, thing: tuple[str, str], action: tuple[str, str]) -> ExpansionRow:
    lines: tuple[Line, ...] = (
        (
            "hyde",
            f"{person} and I talked about the {thing[0]} ({thing[1]}) and how to {action[1]} it.",
        ),
        ("lex", f"{person} {thing[0]} {action[1]}"),
        ("lex", f"{person} meeting {thing[1]}"),
        ("vec", f"notes of the meeting with {person} about the {thing[1]}"),
        ("vec", f"what {person} said on how to {action[0]} the {thing[1]}"),
    )
    return ExpansionRow(
        f"meeting with {person} about how to {action[0]} the {thing[0]}", lines, category="entity"
    )


def _ambiguous() -> Iterator[tuple[str, ExpansionRow]]:
    for word, sense, other in _SENSES:
        for aspect in _ASPECTS:
            lines: tuple[Line, ...] = (
                (
                    "hyde",
                    f"The {word} is a {sense}. Its {aspect} can be read up in books and on web pages.",
                ),
                ("lex", f'"{word} {sense}" {aspect} -{other}'),
                ("lex", f"{word} {aspect} facts -{other}"),
                ("vec", f"{aspect} of the {sense} that is called {word}"),
                ("vec", f"{aspect} of a {word} as a {sense} and not as a {other}"),
            )
            row = ExpansionRow(f"{word} {sense} {aspect}", lines, category="negation")
            yield f"sense-{word}-{aspect}", row


def _chinese() -> Iterator[tuple[str, ExpansionRow]]:
    for thing, other in _CJK_THINGS:
        for action, also in _CJK_ACTIONS:
            lines: tuple[Line, ...] = (
                (
                    "hyde",
                    f"{action}{thing}之前，请先阅读说明书。{other}的{also}需要耐心，{_CJK_STEPS}",
                ),
                ("lex", f"{thing} {also}"),
                ("lex", f"{action} {other} 方法"),
                ("vec", f"怎样才能自己动手{also}家里的{other}"),
                ("vec", f"{action}{thing}的详细步骤和注意事项说明"),
            )
            yield f"cjk-{thing}-{action}", ExpansionRow(f"如何{action}{thing}", lines, category="CJK")


def _passage(topic: str, domain: str, thing: str, action: str) -> str:
    steps = _DOMAINS[domain].steps
    first = _pick(topic, "passage", len(steps))
    second = (first + 1) % len(steps)
    return (
        f"How we {action} the {thing}. {steps[first].capitalize()}. Then {steps[second]}. Whoever does this "
        f"once a year will be glad of the {thing}."
    )


def _pick(topic: str, use: str, among: int) -> int:
    return int(hashlib.sha256(f"{use}:{topic}".encode()).hexdigest()[:8], 16) % among


def _share(topic: str) -> float:
    return _pick(topic, "split", 2**32) / 2**32
