"""Run the checks of docs/production.md that a machine can run, and say what to do about each that fails.

example: python scripts/doctor.py --model exports/mine/int8 --index my_index --feedback feedback.sqlite
         python scripts/doctor.py --registry models --url http://127.0.0.1:8080

What is not named is skipped. Exit code 1 when a check fails.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from common.backends import load_encoder, load_scorer
from common.checkpoint import EXPORT_FILE, read_config, read_json
from common.errors import UserError, run_command
from common.export.language_verification import MAX_PERPLEXITY_LOSS
from common.export.verification import MAX_LOSS
from common.hub import resolve_model
from common.language.architectures import LANGUAGE_MODELS
from common.language.samples import load_generator
from common.report import Table, tables_text
from common.reranker.reranking import load_confidence
from common.retrieval.index import PassageIndex
from common.service.feedback import FeedbackStore
from common.service.monitoring import monitor
from common.service.registry import Registry

Status = Literal["ok", "note", "FAIL"]
SERVING = ("onnxruntime", "fastapi", "uvicorn", "prometheus_client")
FREE_DISK, FREE_MEMORY = 2.0, 1.0  # GiB, below which a service is in danger


@dataclasses.dataclass(frozen=True)
class Args:
    model: str | None = None
    """The reranker or the language model that is served: a directory or an export."""
    registry: Path | None = None
    """A folder of scripts/registry.py."""
    index: Path | None = None
    """The index that is served."""
    encoder: str = "default"
    """The retriever that made the index; bm25 for none."""
    feedback: Path | None = None
    """The SQLite file that the service writes."""
    url: str | None = None
    """A running service, asked for /health, /ready and /metrics."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What a check says of its item, and what to do."""

    item: str
    status: Status
    what: str


def main(argv: Sequence[str] | None = None) -> int:
    args = tyro.cli(Args, description=__doc__, args=argv)
    found = examine(args)
    print(tables_text([found_table(found)]), end="")
    failed = [item for item in found if item.status == "FAIL"]
    print(f"\n{len(failed)} of {len(found)} checks failed")
    return int(bool(failed))


def examine(args: Args) -> list[Found]:
    """The checks of everything that is named; an error of one is its failure."""
    checks: list[tuple[str, Callable[[], Iterator[Found]]]] = [("machine", lambda: machine(args))]
    if args.model is not None:
        checks.append(("model", lambda: model(args.model or "")))
    if args.registry is not None:
        checks.append(("registry", lambda: registry(Registry(args.registry or ""))))
    if args.index is not None:
        checks.append(("index", lambda: index(args.index or Path(), args.encoder)))
    if args.feedback is not None:
        checks.append(("feedback", lambda: feedback(args.feedback or Path())))
    if args.url is not None:
        checks.append(("service", lambda: service(args.url or "")))
    found: list[Found] = []
    for name, check in checks:
        try:
            found += check()
        except UserError as error:
            found.append(Found(name, "FAIL", str(error)))
    return found


def found_table(found: Sequence[Found]) -> Table:
    """The checks as a table."""
    rows: list[list[str | float | None]] = [[item.item, item.status, item.what] for item in found]
    return {"title": "Production checks", "columns": ["check", "status", "what"], "rows": rows, "note": ""}


def machine(args: Args) -> Iterator[Found]:
    """Python, packages, cores, memory, disk."""
    version = platform.python_version()
    yield Found(
        "Python", "ok" if sys.version_info >= (3, 11) else "FAIL", f"{version}; 3.11 or later is needed"
    )
    missing = [name for name in SERVING if importlib.util.find_spec(name) is None]
    told = (
        f"missing: {', '.join(missing)}; pip install -e '.[serve]'" if missing else "extra serve is installed"
    )
    yield Found("packages", "FAIL" if missing else "ok", told)
    flags = Path("/proc/cpuinfo")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    vnni = not flags.exists() or "vnni" in flags.read_text()
    advice = "" if vnni else "; no VNNI: export INT8 with --reduce-range"
    yield Found("processor", "ok" if vnni else "note", f"{cores} cores{advice}")
    memory = available_memory()
    if memory is not None:
        status: Status = "ok" if memory >= FREE_MEMORY else "FAIL"
        yield Found("memory", status, f"{memory:.1f} GiB available; {FREE_MEMORY:g} at least")
    place = args.index or Path()
    free = shutil.disk_usage(next(p for p in (place, *place.absolute().parents) if p.exists())).free / 2**30
    yield Found("disk", "ok" if free >= FREE_DISK else "FAIL", f"{free:.1f} GiB free; {FREE_DISK:g} at least")


def available_memory() -> float | None:
    """GiB that can be had without swapping; None where the system does not say."""
    file = Path("/proc/meminfo")
    if not file.exists():
        return None
    fields = dict(line.split(":", 1) for line in file.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) / 2**20


def model(name: str) -> Iterator[Found]:
    """It loads and works, and was verified when it was exported: a reranker or a language model."""
    directory = resolve_model(name, say=lambda _: None)
    language = read_config(directory).get("model_type") in LANGUAGE_MODELS
    yield from language_model(directory) if language else reranker(directory)
    if not (directory / EXPORT_FILE).exists():
        yield Found("export", "note", "no export: scripts/export.py makes one that is smaller and faster")
        return
    report = read_json(directory / EXPORT_FILE)
    try:
        checked, forced = report["verification"], report.get("forced")
        loss = float(checked["loss"])
        if language:
            limit = MAX_PERPLEXITY_LOSS
            told = f"perplexity {loss:+.2%} beside its source on {checked['documents']} documents"
        else:
            limit = MAX_LOSS
            told = f"nDCG@10 {-loss:+.2%} beside its source on {checked['queries']} queries"
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{directory / EXPORT_FILE}: no report of an export ({error!r}). Export it again."
        ) from None
    bad = loss > limit or forced
    yield Found("export", "FAIL" if bad else "ok", told + ("; export another precision" if bad else ""))


def reranker(directory: Path) -> Iterator[Found]:
    """Its scores are finite, and it knows how sure it is."""
    scorer = load_scorer(directory, say=lambda _: None)
    scores = scorer.score(["sort a list"] * 2, ["Sort the list in place.", "Open a file."]).score
    finite = bool(np.isfinite(scores).all())
    yield Found("model scores", "ok" if finite else "FAIL", f"{scorer.name}: {scores.tolist()}")
    sure = load_confidence(directory) is not None
    yield Found(
        "confidence", "ok" if sure else "note", "fitted" if sure else "none: train it on more dev queries"
    )


def language_model(directory: Path) -> Iterator[Found]:
    """Its logits behind a prompt are finite."""
    generator = load_generator(directory, say=lambda _: None)
    ids = generator.tokenizer.encode("sort a list")[None].astype(np.int32)
    length = ids.shape[1]
    state = generator.engine.start(1, length)
    _, logits = generator.engine.read(state, ids, np.array([length], np.int32))
    finite = bool(np.isfinite(logits).all())
    told = f"{generator.name}: logits of {logits.shape[-1]:,} tokens are {'' if finite else 'not '}finite"
    yield Found("model writes", "ok" if finite else "FAIL", told)


def registry(models: Registry) -> Iterator[Found]:
    """Every version is whole, one is promoted, and there is one to go back to."""
    names = models.names()
    if not names:
        raise UserError(f"{models.root}: no models; python scripts/registry.py add NAME DIRECTORY --promote")
    for name in names:
        for version in models.versions(name):
            models.verify(name, version.number)
        yield Found(f"versions of {name}", "ok", f"{len(models.versions(name))} whole")
        now = models.current_version(name)
        told = f"version {now.number}" if now else f"none: scripts/registry.py promote {name}"
        yield Found(f"current {name}", "ok" if now else "FAIL", told)
        back = len({change.number for change in models.history(name)}) > 1
        yield Found(
            f"rollback of {name}", "ok" if back else "note", "possible" if back else "nothing to go back to"
        )


def index(folder: Path, encoder: str) -> Iterator[Found]:
    """It belongs to the retriever, and every byte is as it was written."""
    if not (folder / "index.sqlite").exists():
        raise UserError(f"{folder}: no index there")
    loaded = None if encoder == "bm25" else load_encoder(encoder, say=lambda _: None)
    opened = PassageIndex(folder, loaded, say=lambda _: None)
    opened.verify()
    size = f"{opened.kind}, {opened.bytes / 1e6:.1f} MB"
    told = f"{opened.documents:,} documents, {opened.size:,} passages, {size}"
    yield Found("index", "ok" if opened.size else "FAIL", f"{told}, whole" if opened.size else "it is empty")


def feedback(file: Path) -> Iterator[Found]:
    """It can be read, is written, and its quality has not fallen."""
    if not file.exists():
        raise UserError(f"{file}: there is no such file; start the service with it")
    store = FeedbackStore(file)
    found = monitor(store)
    last = max(search.time for search in store.searches())
    hours = (time.time() - last) / 3600
    yield Found("feedback", "ok" if hours < 24 else "note", f"last search {hours:.1f} hours ago")
    bad = found.verdict.verdict == "retrain"
    yield Found("quality", "FAIL" if bad else "ok", f"{found.verdict.verdict}: {found.verdict.why}")
    share = found.windows[-1].fallbacks or 0.0
    yield Found(
        "fallbacks", "FAIL" if share > 0.01 else "ok", f"{share:.1%} of the last week's searches; at most 1 %"
    )
    drifted = ", ".join(item.what for item in found.drift if item.drifted)
    yield Found("drift", "note" if drifted else "ok", drifted or "none seen")


def service(url: str) -> Iterator[Found]:
    """It answers, is ready, and shows its metrics."""
    for path in ("/health", "/ready", "/metrics"):
        began = time.perf_counter()
        request = urllib.request.Request(url.rstrip("/") + path, headers=_key())
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                seconds = time.perf_counter() - began
                yield Found(path, "ok", f"{answer.status} in {seconds * 1e3:.0f} ms")
        except urllib.error.HTTPError as error:
            yield Found(path, "FAIL", f"{error.code} {error.reason}")
        except (OSError, ValueError) as error:
            yield Found(path, "FAIL", f"{url}: no answer ({error}); start it with scripts/serve.py")


def _key() -> dict[str, str]:
    """The service's key, where there is one."""
    key = os.environ.get("RESONANCE_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


if __name__ == "__main__":
    run_command(main)
