"""results.jsonl of a sweep: rows that are there once each, whole, and can be read at any instant.

A folder of results has

    results.jsonl     a finished row a line; only appended to, a line at a time, by the one who holds the lock
    rows/KEY/         the log of a row, and what it leaves behind
    lock              held by the runner while it lives
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sca.io.json import IrregularFileError, parse_json, read_regular_file

NAME = "results.jsonl"


class StoreError(ValueError):
    """A folder of results that cannot be used; the message is one line that says why and what to do."""


class Store:
    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.path = self.folder / NAME

    def rows(self) -> list[dict[str, Any]]:
        """Every whole row, in the order in which they were finished. StoreError for a line in between that is none."""
        try:
            content = read_regular_file(self.path)
        except FileNotFoundError:
            return []
        except IrregularFileError as error:
            raise StoreError(str(error)) from error
        except OSError as error:
            raise StoreError(f"cannot read {self.path}: {error.strerror or error}") from error
        whole, _, _ = content.rpartition(b"\n")
        rows: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
            try:
                row = parse_json(line.decode(), surrogates=True)
                rows.setdefault(row["key"], row)
            except (ValueError, TypeError, KeyError) as error:
                raise StoreError(
                    f"{self.path}, line {number} is no row ({error}): move the file away, or take the line out"
                ) from error
        return list(rows.values())

    @contextmanager
    def held(self) -> Iterator[list[str]]:
        """The right to write. Gives what had to be repaired. StoreError if somebody else has it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / "lock", "a+") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise StoreError(
                        f"{self.folder} is being written by another run: wait for it, or give another --out"
                    ) from None
                yield self._repair()
        except OSError as error:
            raise StoreError(f"cannot write {self.folder}: {error.strerror or error}") from error

    def add(self, row: Mapping[str, Any]) -> None:
        """A finished row: on disk when this returns, or not there at all."""
        line = f"{json.dumps(row)}\n".encode()
        with open(self.path, "ab", buffering=0) as file:
            start = file.tell()
            try:
                if file.write(line) != len(line):
                    raise OSError(28, "No space left on device")
                os.fsync(file.fileno())
            except OSError as error:
                file.truncate(start)
                raise StoreError(f"cannot write {self.path}: {error.strerror or error}") from error

    def row_folder(self, key: str) -> Path:
        """Made anew if it is gone."""
        folder = self.folder / "rows" / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def forget(self, keys: set[str]) -> None:
        """Takes rows out, so that they are made again."""
        kept = [row for row in self.rows() if row["key"] not in keys]
        draft = self.path.with_suffix(".draft")
        draft.write_text("".join(f"{json.dumps(row)}\n" for row in kept), "utf-8")
        os.replace(draft, self.path)

    def _repair(self) -> list[str]:
        """Sets a last line aside that was cut off."""
        if not self.path.exists():
            return []
        with open(self.path, "r+b") as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if whole == len(content):
                return []
            aside = self.folder / f"results.broken-{whole}"
            aside.write_bytes(content[whole:])
            file.truncate(whole)
        return [f"{self.path} ended in the middle of a line: that piece is now {aside}, and its row is made again"]
