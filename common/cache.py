"""Files that save work between commands: written whole or not at all, refused when broken."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from common.checkpoint import write_file
from common.errors import UserError

T = TypeVar("T")


def cache_key(*parts: Any) -> str:
    """16 hex digits of the SHA-256 of the parts as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def read_cache(path: Path, parse: Callable[[Path], T]) -> T:
    """`parse(path)`; a file that it cannot read is a UserError that names the file."""
    import zipfile

    try:
        return parse(path)
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        # NumPy's own words advise to load it unsafely
        why = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
        raise UserError(f"{path}: a broken cache file{why}. Delete it; it is computed again.") from error


def write_cache(path: Path, data: bytes) -> None:
    """Write the file whole, with its folder; a full disk or a folder without rights is a UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, data)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}). Free some space or mend the folder, or "
            "name another with $RESONANCE_CACHE."
        ) from error
