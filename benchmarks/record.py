"""The results of a benchmark, benchmarks/results/<name>.<device>.json: written row by row, continued later.

A row compares two numbers, {"what", "ours", "peer", "peer_name", "unit", "ratio", "runs"}; a ratio above 1
means that ours is better, whatever the unit. The file also says the command, commit, device, versions and
workload.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from common.checkpoint import check_writable, read_json, to_json, write_file
from common.errors import UserError
from common.runs import environment, git_commit, package_versions

Row = dict[str, Any]

RESULTS = Path(__file__).resolve().parent / "results"
PEERS = ("torch", "sentence-transformers", "transformers", "onnxruntime")


class Record:
    """The file of one benchmark on one device. A row is known by its `what` and `peer_name`."""

    def __init__(
        self,
        name: str,
        workload: Mapping[str, Any],
        *,
        device: str | None = None,
        folder: Path = RESULTS,
    ) -> None:
        """Go on with the file where there is one. UserError when it is broken, of another workload, or cannot
        be written."""
        self.name, self.workload, self.device = (
            name,
            json.loads(json.dumps(workload)),
            device or device_name(),
        )
        self.path = folder / f"{name}.{self.device}.json"
        check_writable(self.path)
        folder.mkdir(parents=True, exist_ok=True)
        self._read()

    @property
    def rows(self) -> list[Row]:
        """The rows in the file now, in the order they were first written."""
        return self._read()

    def has(self, what: str, peer_name: str) -> bool:
        """Whether this row was measured already: a benchmark that goes on skips it."""
        return any(_key(row) == (what, peer_name) for row in self._read())

    def add(self, *rows: Row, replace: bool = False) -> None:
        """Write rows; those that are there already are kept, or replaced in place.

        The file is written whole or not at all; several processes may add to it.
        """
        commit = git_commit()
        with _locked(self.path.parent):
            found = {_key(row): row for row in self._read()}
            for row in rows:
                if replace or _key(row) not in found:
                    found[_key(row)] = {**row, "commit": commit}
            write_file(self.path, to_json({**self._heading(commit), "rows": list(found.values())}))

    def _heading(self, commit: str | None) -> dict[str, Any]:
        here = environment()
        return {
            "name": self.name,
            "command": command_line(),
            "commit": commit,
            "device": self.device,
            "machine": here["device"],
            "versions": here["versions"] | {"python": here["python"]} | package_versions(PEERS),
            "workload": self.workload,
        }

    def _read(self) -> list[Row]:
        if not self.path.exists():
            return []
        stored = read_json(self.path)
        if stored.get("workload") != self.workload:
            raise UserError(
                f"{self.path}: measured on another workload ({json.dumps(stored.get('workload'))}); rows of "
                "the two do not mix. Move the file away to start anew."
            )
        rows: list[Row] = stored["rows"]
        return rows


def compared(
    what: str,
    ours: Sequence[float],
    peer: Sequence[float],
    peer_name: str,
    unit: str,
    *,
    higher_is_better: bool = True,
    **more: Any,
) -> Row:
    """A row of repeated measurements: the medians, their ratio, and in `runs` every value and the spread.

    The spread is (largest - smallest) / median.
    """
    a, b = median(ours), median(peer)
    ratio = a / b if higher_is_better else b / a
    spread = {
        side: (max(values) - min(values)) / median(values)
        for side, values in (("ours", ours), ("peer", peer))
    }
    runs = {"ours": list(ours), "peer": list(peer), "spread": spread}
    return {
        "what": what,
        "ours": a,
        "peer": b,
        "peer_name": peer_name,
        "unit": unit,
        "ratio": ratio,
        "runs": runs,
        **more,
    }


_BESIDE = re.compile(r"\d+gb|hbm\d*e?|pcie|sxm\d*|nvl")


def device_name() -> str:
    """A short name of what JAX computes on, as it stands in file names: cpu, h200, ..."""
    import jax

    device = jax.devices()[0]
    return "cpu" if device.platform == "cpu" else short_name(device.device_kind)


def short_name(kind: str) -> str:
    """The last word that is not of memory or socket: h100 of "NVIDIA H100 80GB HBM3"."""
    words = kind.lower().split()
    return next((word for word in reversed(words) if not _BESIDE.fullmatch(word)), words[-1])


def command_line() -> str:
    """The command as a user at the root of a clone types it."""
    script = Path(sys.argv[0]).resolve()
    root = Path(__file__).resolve().parents[1]
    name = str(script.relative_to(root)) if script.is_relative_to(root) else script.name
    return shlex.join(["python", name, *sys.argv[1:]])


def _key(row: Row) -> tuple[str, str]:
    return row["what"], row["peer_name"]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time between reading and writing; the system lets go when the process ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
