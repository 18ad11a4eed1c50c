"""ArrayRecord files written by a TFDS builder and read by random access, both without TensorFlow."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.errors import UserError


def write_once(place: Path, builder: Callable[..., Any], what: str) -> Path:
    """Let `builder(data_dir=..., file_format=...)` write to the folder `place`, unless that is there already.

    Several processes may write at the same time. UserError, which says `what`, when it cannot be written.
    """
    if place.exists():
        return place
    try:
        return _write(place, builder)
    except OSError as error:  # TFDS's own for a full disk has neither a number nor a file
        raise UserError(
            f"{place.parent}: {what} cannot be written ({error}). Free some space or mend the folder, or "
            "name another with $RESONANCE_CACHE; the same command then goes on."
        ) from error


def _write(place: Path, builder: Callable[..., Any]) -> Path:
    import tensorflow_datasets as tfds

    place.parent.mkdir(parents=True, exist_ok=True)
    mode = tfds.download.DownloadConfig(download_mode=tfds.GenerateMode.REUSE_CACHE_IF_EXISTS)
    # TFDS narrates downloads that there are none of; the caller says what was written.
    with (
        tempfile.TemporaryDirectory(dir=place.parent) as made,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        built = builder(data_dir=made, file_format="array_record")
        built.download_and_prepare(download_dir=str(Path(made) / "downloads"), download_config=mode)
        try:
            os.rename(built.data_dir, place)
        except OSError:
            if not place.exists():  # by another process in the meantime
                raise
    return place


class Records:
    """Random access to a written split: len(records), records[i]. UserError where a file is unreadable."""

    def __init__(self, directory: str | Path, split: str, what: str) -> None:
        """Open a split of what write_once returned; UserError when it is missing or damaged."""
        import tensorflow_datasets as tfds

        self.directory, self.what = Path(directory), what
        if not (self.directory / "dataset_info.json").is_file():
            raise self.unreadable("there is no dataset_info.json")
        try:
            self._records = tfds.builder_from_directory(self.directory).as_data_source(split)
        except Exception as error:  # TFDS raises many kinds for a damaged description
            raise self.unreadable(str(error)) from error
        if len(self):
            self[len(self) - 1]  # a truncated file lacks its end: say so now

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        try:
            return self._records[index]
        except Exception as error:  # ArrayRecord and TFDS raise RuntimeError, TypeError and others
            raise self.unreadable(f"record {index}: {error}") from error

    def unreadable(self, why: str) -> UserError:
        """The error of a damaged folder: what to do about it."""
        return UserError(
            f"{self.directory}: {self.what} cannot be read ({why}); delete this folder, and the same command "
            "writes them again"
        )
