"""Texts for language models, as documents in splits: WikiText, Alpaca, the documentation here, own files.

Source: Merity et al. 2016, arXiv:1609.07843 (WikiText); Taori et al. 2023 (Alpaca and its prompt form).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from common.data.records import hub_library, read_text
from common.errors import UserError, listed

Form = Literal["literal", "detokenised"]
SPLITS = ("train", "dev", "test")
UNKNOWN = "<unk>"
# words of WikiText-2 with an end of line each, as published; split -> (file's name, words)
WIKITEXT_2 = {"train": ("train", 2_088_628), "dev": ("valid", 217_646), "test": ("test", 245_569)}
WIKITEXT_HUB = ("Salesforce/wikitext", "wikitext-2-v1")
ALPACA_HUB = "tatsu-lab/alpaca"
MIXED_WIKITEXT = 22_000  # samples of `mixed`: WikiText paragraphs, Alpaca rows
MIXED_ALPACA = 52_000
_TITLE = re.compile(r"^ = (?!= ).+(?<! =) = $")
_SUMMARISE = "Summarize the text."
_QUESTION = "Answer the question."
_HELD_OUT = 0.03  # share of rows without a published split in dev, and as much in test


@dataclass(frozen=True)
class Document:
    """A text that is read from its beginning: an article, a module's documentation, an instruction row."""

    text: str
    words: int  # of the original, an end of line counted as one
    prompt: int = 0  # characters at its start that ask; 0 for running text

    @property
    def unknown(self) -> int:
        """How many words are `<unk>`."""
        return self.text.count(UNKNOWN)


@dataclass(frozen=True)
class Corpus:
    """Documents by split: train, dev, test. `form` says whether WikiText's tokens stand as in its files."""

    name: str
    splits: Mapping[str, tuple[Document, ...]]
    form: Form = "detokenised"
    notes: tuple[str, ...] = ()  # what stands for what, to be said in the output
    dropped: Mapping[str, int] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the SHA-256 of all texts in order."""
        digest = hashlib.sha256(repr(sorted(self.splits)).encode())
        for split in sorted(self.splits):
            for document in self.splits[split]:
                digest.update(f"{len(document.text)}:{document.prompt}\n{document.text}".encode())
        return digest.hexdigest()[:16]

    def split(self, name: str) -> tuple[Document, ...]:
        """A split's documents; UserError names those that there are."""
        if not self.splits.get(name):
            there = ", ".join(split for split in SPLITS if self.splits.get(split)) or "none"
            raise UserError(
                f"{self.name}: has no documents in split {name!r}; it has: {there}. Choose another split, or "
                "give more text: rows are cut into splits from 10 different ones on."
            )
        return self.splits[name]

    def describe(self) -> str:
        """Documents and words by split, in a line."""
        sizes = (
            f"{name} {len(items):,} documents, {sum(d.words for d in items):,} words"
            for name, items in self.splits.items()
        )
        return f"{self.name} ({self.form}): {'; '.join(sizes)}; fingerprint {self.fingerprint}"


def load_corpus(name: str, form: Form = "detokenised", *, seed: int = 0) -> Corpus:
    """A corpus by name or path. Raises UserError for what is missing, broken or empty.

    `pydocs`: the documentation on this machine. `wikitext-2`: a folder of that name in $RESONANCE_DATA, else
    the hub. `alpaca`, and `mixed` (WikiText paragraphs and Alpaca rows, shuffled with `seed`): the same way.
    Else a path: a folder in WikiText's form, a .txt file, or a .jsonl file of rows (`row_document`).
    `form` concerns WikiText alone.
    """
    if name == "pydocs":
        return pydocs_corpus()
    if name == "wikitext-2":
        return load_wikitext(_data_folder(name), form)
    if name == "alpaca":
        return load_alpaca(_data_folder(name))
    if name == "mixed":
        wikitext = load_wikitext(_data_folder("wikitext-2"), form)
        return mixed_corpus(wikitext, load_alpaca(_data_folder("alpaca")), seed)
    path = Path(name).expanduser()
    if path.is_dir():
        return load_wikitext(path, form)
    if path.suffix in (".jsonl", ".txt") and path.is_file():
        return load_rows(path) if path.suffix == ".jsonl" else load_text(path)
    raise UserError(
        f"data.name {name!r} is no corpus: give pydocs, wikitext-2, alpaca, mixed, a folder with "
        "wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens, a .txt file, or a .jsonl file of rows"
    )


def _data_folder(name: str) -> Path | None:
    """The folder of that name in $RESONANCE_DATA; None where there is none, and the hub is asked."""
    root = os.environ.get("RESONANCE_DATA")
    folder = Path(root, name) if root else None
    return folder if folder is not None and folder.is_dir() else None


# --- WikiText ---


def load_wikitext(folder: Path | None, form: Form = "literal") -> Corpus:
    """WikiText from a folder with wiki.{train,valid,test}.tokens, plain or .gz; None asks the hub.

    A document is an article. UserError where files are missing, or where a folder named wikitext-2 has other
    than the published numbers of words.
    """
    lines = _hub_lines if folder is None else partial(_folder_lines, folder)
    name = "wikitext-2" if folder is None else folder.name
    splits = {}
    for split, (part, published) in WIKITEXT_2.items():
        documents = tuple(wikitext_documents(lines(part), form))
        words = sum(document.words for document in documents)
        if name == "wikitext-2" and words != published:
            raise UserError(
                f"{folder or WIKITEXT_HUB[0]}: the {split} split of WikiText-2 has {words:,} words with end "
                f"of line; published are {published:,}. The file is cut or of another form: copy it again."
            )
        splits[split] = documents
    return Corpus(name, splits, form)


def wikitext_documents(lines: Iterable[str], form: Form) -> Iterator[Document]:
    """Articles of a WikiText file: each begins with a line ` = Title = ` between empty ones."""
    article: list[str] = []
    before, pending = "", list(lines)
    for number, line in enumerate(pending):
        after = pending[number + 1] if number + 1 < len(pending) else ""
        if _TITLE.match(line) and not before.strip() and not after.strip() and any(map(str.strip, article)):
            yield _article(article, form)
            article = []
        article.append(line)
        before = line
    if article:
        yield _article(article, form)


def _article(lines: Sequence[str], form: Form) -> Document:
    shown = lines if form == "literal" else [detokenised(line) for line in lines]
    return Document("".join(f"{line}\n" for line in shown), sum(len(line.split()) + 1 for line in lines))


def detokenised(line: str) -> str:
    """A line of WikiText as it would be typed: joined hyphens, numbers and punctuation; `<unk>` stays."""
    line = re.sub(r" @([-,.])@ ", r"\1", f" {line.strip()} ")
    line = re.sub(r" (n't|'(?:s|t|re|ve|ll|d|m))(?= )", r"\1", line)
    line = re.sub(r'" ([^"]*?) "', r'"\1"', line)
    line = re.sub(r" ([,.;:!?%)\]])", r"\1", line)
    return re.sub(r"([(\[$£€]) ", r"\1", line).strip()


def _folder_lines(folder: Path, part: str) -> list[str]:
    names = [f"wiki.{part}.tokens", f"wiki.{part}.tokens.gz"]
    for name in names:
        if (folder / name).is_file():
            return read_text(folder / name).removesuffix("\n").split("\n")
    raise UserError(f"{folder}: has neither {names[0]} nor {names[1]}, which WikiText's form needs")


def _hub_lines(part: str) -> list[str]:
    repository, config = WIKITEXT_HUB
    rows = _hub_rows(repository, {"valid": "validation"}.get(part, part), config)
    return [row["text"].removesuffix("\n") for row in rows]


def _hub_rows(repository: str, split: str, config: str | None = None) -> Iterable[dict[str, Any]]:
    datasets = hub_library(repository)
    try:
        return datasets.load_dataset(repository, config, split=split)
    except Exception as error:  # a lack of network, a wrong name: the library raises many kinds
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{repository} is neither in $RESONANCE_DATA nor could it be had from the hub "
            f"({reason[0] if reason else type(error).__name__}). Point $RESONANCE_DATA to a folder that "
            "holds it, or use the embedded corpus: --data pydocs"
        ) from error


# --- instructions ---


def instruction_prompt(instruction: str, given: str = "") -> str:
    """Alpaca's form up to where the answer begins; `given` is the optional input."""
    beside = f"### Input:\n{given.strip()}\n\n" if given.strip() else ""
    return f"### Instruction:\n{instruction.strip()}\n\n{beside}### Response:\n"


def row_document(row: Mapping[str, Any]) -> Document:
    """A row of a task file as a document; ValueError for one of no known form or without an answer.

    instruction, input?, output | text, summary | question, context?, answer | prompt, completion | text
    """
    known: tuple[tuple[tuple[str, str], Callable[[Mapping[str, Any]], str]], ...] = (
        (("instruction", "output"), lambda r: instruction_prompt(r["instruction"], r.get("input") or "")),
        (("text", "summary"), lambda r: instruction_prompt(_SUMMARISE, r["text"])),
        (("question", "answer"), lambda r: instruction_prompt(*_asked(r))),
        (("prompt", "completion"), lambda r: r["prompt"]),
    )
    if wrong := [key for key, value in row.items() if key != "from" and not isinstance(value, str | None)]:
        raise ValueError(f"{wrong[0]!r} is not text")
    for (first, answer), prompt in known:
        if isinstance(row.get(first), str) and isinstance(row.get(answer), str):
            if not row[first].strip() or not row[answer].strip():
                raise ValueError(f"{first if not row[first].strip() else answer!r} is empty")
            asked = prompt(row)
            return _document(asked + row[answer].strip(), len(asked))
    if isinstance(row.get("text"), str) and row["text"].strip():
        return _document(row["text"])
    fields = "; ".join(" + ".join(names) for names, _ in known)
    raise ValueError(f"has the fields {', '.join(row) or 'none'}; allowed: {fields}; text")


def _asked(row: Mapping[str, Any]) -> tuple[str, str]:
    context = row.get("context")
    return (_QUESTION, f"{context.strip()}\n\n{row['question']}") if context else (row["question"], "")


def _document(text: str, prompt: int = 0) -> Document:
    return Document(text, sum(len(line.split()) + 1 for line in text.splitlines()), prompt)


def load_alpaca(folder: Path | None) -> Corpus:
    """Alpaca: of a folder the random rows of its subset, all of the hub's without one.

    Rows have no published split: dev and test get 3 % each, by a hash of the row.
    """
    if folder is None:
        rows: Iterable[tuple[str, Mapping[str, Any]]] = (
            (f"{ALPACA_HUB}:{number}", row) for number, row in enumerate(_hub_rows(ALPACA_HUB, "train"), 1)
        )
        notes: tuple[str, ...] = ()
        rows = ((where, {key: row[key] for key in ("instruction", "input", "output")}) for where, row in rows)
    else:
        files = sorted(folder.glob("alpaca_*.jsonl*"))
        if not files:
            raise UserError(f"{folder}: has no alpaca_*.jsonl or alpaca_*.jsonl.gz")
        rows = [(where, row) for where, row in _json_rows(files[0]) if _random(row)]
        notes = (f"Alpaca: the {len(rows):,} random rows of {files[0].name} stand for its 52,002",)
    documents, empty = [], 0
    for _, row in rows:
        if not row["output"].strip():
            empty += 1
            continue
        documents.append(row_document(row))
    return Corpus("alpaca", held_out(documents), notes=notes, dropped={"rows without an output": empty})


def _random(row: Mapping[str, Any]) -> bool:
    """Whether a row of the subset is of an unbiased sample: others were chosen for their rating."""
    return any(source.startswith("random") for source in row.get("from", ["random"]))


def load_rows(path: Path) -> Corpus:
    """A task file of JSON rows, split as Alpaca; UserError lists the bad rows, up to 20."""
    documents, wrong = [], []
    for where, row in _json_rows(path):
        try:
            documents.append(row_document(row))
        except ValueError as error:
            wrong.append(f"{where}: {error}")
    if wrong:
        raise UserError(f"{path}: {len(wrong)} bad rows; nothing is trained on a guess:\n{listed(wrong)}")
    return Corpus(path.stem, held_out(documents))


def load_text(path: Path) -> Corpus:
    """A text file: its paragraphs in ten pieces, of which the last two are dev and test."""
    paragraphs = [part for part in re.split(r"\n\s*\n", read_text(path)) if part.strip()]
    if len(paragraphs) < 10:
        raise UserError(f"{path}: has {len(paragraphs)} paragraphs (between empty lines); needed are 10")
    borders = [0, len(paragraphs) * 8 // 10, len(paragraphs) * 9 // 10, len(paragraphs)]
    pieces = ["\n\n".join(paragraphs[a:b]) + "\n" for a, b in itertools.pairwise(borders)]
    splits = {name: (_document(piece),) for name, piece in zip(SPLITS, pieces, strict=True)}
    return Corpus(path.stem, splits)


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: holds a {type(row).__name__}; a row is a JSON object")
        yield f"{path}:{number}", row


def held_out(documents: Sequence[Document]) -> dict[str, tuple[Document, ...]]:
    """Rows in splits by a hash of their text: 3 % dev, 3 % test; equal prompts lie in one split.

    Of few rows the one with the least hash is dev where none is, the next one test.
    """
    places = [_place(document) for document in documents]
    few = sorted(set(places))[:2] if len(set(places)) >= 10 else []
    least = dict(zip(few, ("dev", "test"), strict=False))
    named = ["dev" if place < _HELD_OUT else "test" if place < 2 * _HELD_OUT else "train" for place in places]
    if not {"dev", "test"} <= set(named):
        named = [least.get(place, name) for place, name in zip(places, named, strict=True)]
    found = list(zip(documents, named, strict=True))
    return {split: tuple(document for document, name in found if name == split) for split in SPLITS}


def _place(document: Document) -> float:
    """A number in [0, 1) that follows from what a row asks, or from its text."""
    asked = document.text[: document.prompt] or document.text
    return int(hashlib.sha256(asked.encode()).hexdigest()[:8], 16) / 2**32


# --- several as one, and the embedded one ---


def mixed_corpus(wikitext: Corpus, alpaca: Corpus, seed: int = 0) -> Corpus:
    """WikiText's paragraphs (22,000 at most) and Alpaca's rows (52,000 at most), shuffled within a split."""
    import numpy as np

    splits, rng = {}, np.random.default_rng(seed)
    counts = []
    for split in SPLITS:
        paragraphs = [p for document in wikitext.splits[split] for p in _paragraphs(document)]
        drawn = [paragraphs[i] for i in sorted(rng.permutation(len(paragraphs))[:MIXED_WIKITEXT])]
        rows = alpaca.splits[split][:MIXED_ALPACA]
        together = [*drawn, *rows]
        splits[split] = tuple(together[i] for i in rng.permutation(len(together)))
        counts.append((len(drawn), len(rows)))
    some, others = counts[0]
    said = f"mixed: {some:,} paragraphs of {wikitext.name} and {others:,} rows of Alpaca to train on"
    stands = f"{wikitext.name} stands for the WikiText subset of the source"
    return Corpus("mixed", splits, wikitext.form, (said, stands, *alpaca.notes), alpaca.dropped)


def _paragraphs(document: Document) -> Iterator[Document]:
    """The running text of an article, a paragraph each; headings and empty lines fall away."""
    for line in document.text.split("\n"):
        if line.strip() and not line.strip().startswith("= "):
            yield _document(line)


def pydocs_corpus() -> Corpus:
    """The documentation of the standard library and of this project's packages, a document for each group of
    modules, in the splits of the ranking data `pydocs`."""
    from common.data.pydocs import pydocs_texts

    texts = pydocs_texts()
    return Corpus("pydocs", {split: tuple(map(_document, texts[split])) for split in SPLITS})
