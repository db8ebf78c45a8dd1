"""Folders that are written whole or not at all. Imports no torch."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FolderError(ValueError):
    """A folder that is in the way or cannot be written; the message says which and why."""


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which has its name when all is written and is gone when anything fails.

    Raises FolderError if there is something in its place, or it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FolderError(f"{folder} is not a new or empty folder")
    draft = folder.parent / f".{folder.name}.{secrets.token_hex(8)}"
    try:
        draft.mkdir(parents=True)
        yield draft
        for path in [*draft.rglob("*"), draft]:
            sync(path)
        if folder.exists():
            folder.rmdir()
        os.rename(draft, folder)
    except OSError as error:
        raise FolderError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def sync(path: Path) -> None:
    """Sees to it that what was written to a file or a folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
