"""Keep the versions of a model: add, promote, roll back, list, verify.

example: python scripts/registry.py add ranker runs/quantum_resonance/best --note "first"
         python scripts/registry.py promote ranker && python scripts/registry.py list

`--model $(python scripts/registry.py current ranker)` gives any command what was promoted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

from common.errors import run_command
from common.report import Table, tables_text
from common.service.registry import Registry, Version


@dataclasses.dataclass(frozen=True)
class Shared:
    root: Path = Path("models")
    """The folder of the registry."""


@dataclasses.dataclass(frozen=True)
class Add(Shared):
    """Take a checkpoint or an export in as the next version, verified by its content."""

    name: tyro.conf.Positional[str] = tyro.MISSING
    source: tyro.conf.Positional[Path] = tyro.MISSING
    """A directory: runs/NAME/best, or one that scripts/export.py wrote."""
    note: str = ""
    """What is new in it, for the list."""
    link: bool = False
    """Hard links instead of a copy."""
    promote: bool = False
    """And make it the current one."""


@dataclasses.dataclass(frozen=True)
class Promote(Shared):
    """Make a version the current one."""

    name: tyro.conf.Positional[str] = tyro.MISSING
    number: tyro.conf.Positional[int | None] = None
    """The newest when absent."""


@dataclasses.dataclass(frozen=True)
class Rollback(Shared):
    """Make the version before the last promotion the current one."""

    name: tyro.conf.Positional[str] = tyro.MISSING


@dataclasses.dataclass(frozen=True)
class List(Shared):
    """Every version of every model, or of one."""

    name: tyro.conf.Positional[str | None] = None


@dataclasses.dataclass(frozen=True)
class Verify(Shared):
    """Read every version and hold it to what was added; fails for a damaged one."""

    name: tyro.conf.Positional[str | None] = None


@dataclasses.dataclass(frozen=True)
class Current(Shared):
    """Print the directory of the current version."""

    name: tyro.conf.Positional[str] = tyro.MISSING


def main(argv: Sequence[str] | None = None) -> None:
    args: Add | Promote | Rollback | List | Verify | Current = tyro.cli(
        Add | Promote | Rollback | List | Verify | Current,  # type: ignore[arg-type]
        description=__doc__,
        args=argv,
    )
    registry = Registry(args.root)
    if isinstance(args, Add):
        version = registry.add(args.name, args.source, note=args.note, link=args.link)
        print(f"{version.name} {version.number}: {version.path}")
        if args.promote:
            registry.promote(args.name, version.number)
            print(f"{version.name} {version.number} is current")
    elif isinstance(args, Promote | Rollback):
        promoting = isinstance(args, Promote)
        version = registry.promote(args.name, args.number) if promoting else registry.rollback(args.name)
        print(f"{version.name} {version.number} is current: {version.path}")
    elif isinstance(args, Current):
        print(registry.current(args.name))
    elif isinstance(args, Verify):
        for version in _wanted(registry, args.name):
            registry.verify(version.name, version.number)
            print(f"{version.name} {version.number}: whole")
    else:
        print(tables_text([listing(registry, args.name)]), end="")


def _wanted(registry: Registry, name: str | None) -> list[Version]:
    return [v for each in ([name] if name else registry.names()) for v in registry.versions(each)]


def listing(registry: Registry, name: str | None = None) -> Table:
    """The versions as a table; `*` marks the current one of each model."""
    rows: list[list[str | float | None]] = []
    for version in _wanted(registry, name):
        now = registry.current_version(version.name)
        mark = "*" if now is not None and now.number == version.number else ""
        size = round(version.bytes / 1e6, 1)
        rows.append([version.name, version.number, mark, size, version.added, version.digest, version.note])
    columns = ["model", "version", "current", "MB", "added", "digest", "note"]
    return {"title": f"Models in {registry.root}", "columns": columns, "rows": rows, "note": ""}


if __name__ == "__main__":
    run_command(main)
