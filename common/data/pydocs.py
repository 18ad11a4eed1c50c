"""`pydocs`: ranking data made from the documentation on this machine, so that no hub is needed.

Query: a docstring's first sentence. Passage: the signature and the rest of the docstring. Source files are
read as text with `ast`; only C-implemented modules of the standard library are imported.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import re
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common.data.records import Qrels, RankingData
from common.errors import UserError

# Core dependencies only: extras must not change the data.
PACKAGES = ("numpy", "scipy", "jax", "flax", "optax", "orbax", "grain", "matplotlib")
C_MODULES = (
    *("builtins", "sys", "math", "cmath", "itertools", "functools", "collections", "operator", "time"),
    *("datetime", "decimal", "posix", "io", "array", "bisect", "heapq", "struct", "zlib", "binascii"),
    *("socket", "select", "signal", "gc", "unicodedata", "mmap", "marshal", "hashlib", "re", "weakref"),
)
SKIPPED_FOLDERS = {
    *("test", "tests", "testing", "benchmarks", "examples", "site-packages", "dist-packages", "__pycache__"),
    *("_lib", "_vendor", "experimental", "f2py", "idlelib", "lib2to3", "distutils", "turtledemo"),
    *("ensurepip", "encodings", "pydoc_data"),
}
# Libraries that document the same functions: one topic lies in one split whichever package it comes from.
SHARED_TOPICS = ("fft", "linalg", "random", "special", "stats", "signal", "ndimage", "optimize", "sparse")
QUERY_WORDS = (5, 40)
BODY_WORDS = (12, 28)  # at least; cut to
GROUP_LIMIT = 60  # passages of one group
# chosen so that standard modules and packages are spread over the splits
SPLIT_SALT = "pydocs-13:"
QUERY_LIMITS = {"test": 300, "dev": 200}  # judged queries; the passages stay in the corpus
FEWEST_CHARACTERS = 200_000  # of running text to train a language model on
FEWEST = {"train": 200, "dev": 30, "test": 60}


@dataclass(frozen=True)
class Docstring:
    """A documented object: qualified name, signature without annotations, raw docstring."""

    name: str
    signature: str
    text: str


def build_pydocs() -> RankingData:
    """Ranking data named "pydocs", the same on every call on one machine.

    All passages of a module group lie in one split. Raises UserError when too few docstrings are installed.
    """
    dropped: Counter[str] = Counter()
    groups = _limit_groups(_unique_pairs(_docstrings(dropped), dropped), dropped)
    corpus: dict[str, str] = {}
    queries: dict[str, str] = {}
    qrels: dict[str, Qrels] = {split: {} for split in ("train", "dev", "test")}
    for group in sorted(groups):
        split = _split(group)
        for name, query, passage in groups[group]:
            corpus[name] = passage
            queries[f"q:{name}"] = query
            qrels[split][f"q:{name}"] = {name: 1}
    for split, limit in QUERY_LIMITS.items():
        kept = sorted(qrels[split], key=_hash)[:limit]
        qrels[split] = {query: qrels[split][query] for query in sorted(kept)}
    judged = {query for split in qrels.values() for query in split}
    _check_sizes(qrels)
    return RankingData(
        name="pydocs",
        corpus=corpus,
        queries={query: text for query, text in queries.items() if query in judged},
        qrels=qrels,
        dropped=dict(dropped),
    ).validate()


def pydocs_texts() -> dict[str, list[str]]:
    """Split -> documentation as running text, one for each group of modules; for language models.

    A docstring stands behind its qualified name and signature, and each stands once. Raises UserError when
    there is too little.
    """
    seen: set[str] = set()
    texts: dict[str, dict[str, list[str]]] = {split: defaultdict(list) for split in ("train", "dev", "test")}
    for docstring in _docstrings(Counter()):
        text = inspect.cleandoc(docstring.text).strip()
        key = _key(text)[:400]
        if len(text.split()) < BODY_WORDS[0] or key in seen:
            continue
        seen.add(key)
        where, group = docstring.name.rpartition(".")[0], _group(docstring.name)
        texts[_split(group)][group].append(f"{where}: {docstring.signature}\n\n{text}\n\n")
    found = {split: ["".join(parts) for _, parts in sorted(items.items())] for split, items in texts.items()}
    if sum(map(len, found["train"])) < FEWEST_CHARACTERS:
        raise UserError(
            f"pydocs: fewer than {FEWEST_CHARACTERS:,} characters of documentation are on this machine. Use "
            "an interpreter with its .py files, or name other data (a .txt file)."
        )
    return found


def _check_sizes(qrels: dict[str, Qrels]) -> None:
    short = [f"{split}: {len(qrels[split])} < {n}" for split, n in FEWEST.items() if len(qrels[split]) < n]
    if short:
        raise UserError(
            f"pydocs: too few docstrings on this machine ({'; '.join(short)} queries). The Python sources or "
            "their docstrings were stripped: use an interpreter with its .py files, or name other data "
            "(a JSONL file of triples or a BEIR folder)."
        )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- finding docstrings ---


def _docstrings(dropped: Counter[str]) -> Iterator[Docstring]:
    """Every public docstring in a fixed order: C modules, standard library, packages."""
    for module in C_MODULES:
        if importlib.util.find_spec(module):  # posix is not everywhere
            yield from _inspected(module)
    roots = [("", Path(sysconfig.get_path("stdlib")))]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None:
            dropped[f"package {package} not installed"] += 1
            continue
        roots += [(package, Path(place)) for place in sorted(spec.submodule_search_locations or ())]
    for package, root in roots:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if SKIPPED_FOLDERS.isdisjoint(parts) and not parts[-1].startswith(("test_", "conftest")):
                yield from _parsed(path, _public_module([*filter(None, [package]), *parts]), dropped)


def _public_module(parts: list[str]) -> str:
    """The public spelling of a module path: private parts lose their underscore, `_src` is dropped."""
    names = [part.strip("_") for part in parts if part not in ("__init__", "_src", "")]
    names[0] = names[0].removeprefix("py") if parts[0].startswith("_py") else names[0]
    return ".".join(names)


def _parsed(path: Path, module: str, dropped: Counter[str]) -> Iterator[Docstring]:
    """Docstrings of the functions and classes in a source file, and of `add_newdoc(...)` calls."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        dropped["file not parsed"] += 1
        return
    yield from _walk(tree, module)


def _walk(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[Docstring]:
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if child.name.startswith("_"):
                continue
            name = f"{prefix}.{child.name}"
            text = ast.get_docstring(child)
            if text:
                arguments = "" if isinstance(child, ast.ClassDef) else _arguments(child.args)
                yield Docstring(name, f"{child.name}({arguments})" if arguments else child.name, text)
            if isinstance(child, ast.ClassDef):
                yield from _walk(child, name)
        elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
            yield from _added(child.value, prefix)


def _arguments(arguments: ast.arguments) -> str:
    """Argument names without types and defaults: what a reader searches by."""
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args) if a.arg not in ("self", "cls")]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    names += [a.arg for a in arguments.kwonlyargs]
    names += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    return ", ".join(names)


def _added(call: ast.Call, prefix: str) -> Iterator[Docstring]:
    """NumPy and SciPy keep the docstrings of C functions as `add_newdoc(place, name, text)`."""
    if not (isinstance(call.func, ast.Name) and call.func.id == "add_newdoc"):
        return
    place = prefix.rpartition(".")[0]  # SciPy: add_newdoc(name, text) beside the functions
    *names, documented = call.args
    if len(names) == 2:  # NumPy: add_newdoc(module, name, text), or (attribute, text) of a class
        place, names = prefix.split(".")[0], names[1:]
        if isinstance(documented, ast.Tuple) and len(documented.elts) == 2:
            names, documented = [*names, documented.elts[0]], documented.elts[1]
    strings = [
        a.value for a in (*names, documented) if isinstance(a, ast.Constant) and isinstance(a.value, str)
    ]
    if len(strings) == len(names) + 1 and not strings[-2].startswith("_"):
        yield Docstring(".".join([place, *strings[:-1]]), strings[-2], inspect.cleandoc(strings[-1]))


def _inspected(module: str) -> Iterator[Docstring]:
    """Docstrings of C functions and of the methods of C classes in a standard module."""
    for name, value in sorted(vars(importlib.import_module(module)).items()):
        if name.startswith("_"):
            continue
        members = [(name, value)]
        if inspect.isclass(value):
            members += [(f"{name}.{n}", m) for n, m in sorted(vars(value).items()) if not n.startswith("_")]
        for qualified, member in members:
            text = inspect.getdoc(member) if _is_c(member) else None
            if text:
                last = qualified.rpartition(".")[2]
                arguments = re.sub(r"\$?\b(self|module|type)\b,? ?|/,? ?", "", _c_signature(member))
                yield Docstring(f"{module}.{qualified}", f"{last}{arguments}", text)


def _is_c(value: object) -> bool:
    if inspect.isclass(value):
        return not any(inspect.isfunction(member) for member in vars(value).values())
    return inspect.isbuiltin(value) or inspect.ismethoddescriptor(value) or inspect.isgetsetdescriptor(value)


def _c_signature(value: object) -> str:
    return getattr(value, "__text_signature__", None) or ""


# --- from docstring to query and passage ---


def _unique_pairs(found: Iterable[Docstring], dropped: Counter[str]) -> dict[str, list[tuple[str, str, str]]]:
    """Group -> (name, query, passage), each query and each passage only once (first in order wins)."""
    groups: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    names: set[str] = set()
    seen: set[str] = set()
    for docstring in found:
        parts = split_docstring(docstring)
        if parts is None:
            dropped["too short or no sentence"] += 1
            continue
        query, signature, body = parts
        keys = {f"query {_key(query)}", f"body {_key(body)}", f"start {' '.join(_key(body).split()[:25])}"}
        if docstring.name in names or keys & seen:
            dropped["duplicate"] += 1
            continue
        names.add(docstring.name)
        seen |= keys
        groups[_group(docstring.name)].append((docstring.name, query, f"{signature} {body}"))
    return dict(groups)


def split_docstring(docstring: Docstring) -> tuple[str, str, str] | None:
    """(first sentence, signature, rest); None when a text is too short or the rest repeats the sentence."""
    signature, text = _leading_signature(docstring)
    paragraph, _, rest = text.partition("\n\n")
    paragraph = _plain(paragraph)
    end = re.search(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)[.!?](?=\s+[A-Z`'\"(]|\s*$)", paragraph)
    query = paragraph[: end.end()] if end else paragraph
    body = " ".join(f"{paragraph[len(query) :]} {_plain(rest)}".split()[: BODY_WORDS[1]])
    words = re.findall(r"[A-Za-z]{2,}", query)
    if not QUERY_WORDS[0] <= len(words) <= QUERY_WORDS[1] or not re.match(r"[A-Z]", query):
        return None
    if re.match(r"(See|Alias|Same as|Deprecated|Like|Equivalent to|Implement)\b", query):
        return None
    if len(re.findall(r"[A-Za-z]{2,}", body)) < BODY_WORDS[0] or _key(query) in _key(body):
        return None
    return re.sub(r":$", ".", query.strip()), signature, body


def _leading_signature(docstring: Docstring) -> tuple[str, str]:
    """C docstrings often open with their own signatures: these lines are not the first sentence."""
    lines = docstring.text.strip().split("\n")
    start = 0
    while start < len(lines) and (
        not lines[start].strip() or re.match(r"[\w.]+\([^)]*\)\s*(->.*|[-=]+>.*|$)", lines[start].strip())
    ):
        start += 1
    own = lines[0].strip() if start else docstring.signature
    return own if len(own) <= 100 else docstring.signature, "\n".join(lines[start:])


def _plain(text: str) -> str:
    """Docstring markup to running text: roles, backticks, prompts and rules of dashes go."""
    text = re.sub(r"(?m)^\s*[-=~^*`#.]{3,}\s*$|^\s*(>>>|\.\.\.) ?|^\s*\.\. \w[\w-]*::", " ", text)
    text = re.sub(r":[\w:]+:`~?([^`<]*?)(?:\s*<[^>]*>)?`", r"\1", text)
    text = re.sub(r"\s*<https?:[^>]*>`_{0,2}|\\(?:mathrm|mathbf|text|operatorname)\b", "", text)
    text = re.sub(r"::(?=\s|$)", ":", text)
    return " ".join(text.replace("`", "").split())


def _key(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


# --- splits ---


def _group(name: str) -> str:
    """What must not be divided: a standard module, or a topic of the array libraries."""
    parts = name.split(".")
    if parts[0] not in PACKAGES:
        return {"posix": "os"}.get(parts[0], parts[0])
    for topic in SHARED_TOPICS:
        if topic in parts[1:-1]:
            return topic
    if parts[0] == "numpy" or "numpy" in parts[1:-1]:
        return "numpy"
    return ".".join(parts[:2]) if len(parts) > 2 else parts[0]


def _limit_groups(
    groups: dict[str, list[tuple[str, str, str]]], dropped: Counter[str]
) -> dict[str, list[tuple[str, str, str]]]:
    """Cut each group to GROUP_LIMIT passages, chosen by the hash of their names."""
    limited = {}
    for group, pairs in groups.items():
        limited[group] = sorted(sorted(pairs, key=lambda pair: _hash(pair[0]))[:GROUP_LIMIT])
        dropped["over the limit of a group"] += len(pairs) - len(limited[group])
    return limited


def _split(group: str) -> str:
    """The split of a group depends on its name alone: it is the same whatever versions are installed."""
    position = int(_hash(SPLIT_SALT + group)[:8], 16) / 2**32
    return "test" if position < 0.2 else "dev" if position < 0.3 else "train"
