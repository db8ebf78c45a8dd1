"""Records of a large JSON file by the image they belong to, kept on disk and not in memory."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from typing import Any

from sca.data.fields import field

OF_IMAGE = "SELECT record, place FROM annotations WHERE image = ? ORDER BY rowid"


class Grouped:
    """Images and the annotations of each. ValueError for an id that is given twice, or an image that is not there."""

    def __init__(self) -> None:
        self.base = sqlite3.connect("")  # a file of SQLite's own, gone when it is closed
        self.base.execute("PRAGMA synchronous=OFF")
        self.base.execute("CREATE TABLE images (id INTEGER UNIQUE, place TEXT, record TEXT)")
        self.base.execute("CREATE TABLE annotations (id INTEGER UNIQUE, image INTEGER, place TEXT, record TEXT)")

    def add_images(self, records: Iterable[tuple[dict[str, Any], str]]) -> None:
        self._add("INSERT INTO images VALUES (?, ?, ?)", ((field(r, "id", int, at), at, r) for r, at in records))

    def add_annotations(self, records: Iterable[tuple[dict[str, Any], str]]) -> None:
        rows = ((field(r, "id", int, at), field(r, "image_id", int, at), at, r) for r, at in records)
        self._add("INSERT INTO annotations VALUES (?, ?, ?, ?)", rows)
        self.base.execute("CREATE INDEX of_image ON annotations (image)")
        lost = self.base.execute(
            "SELECT place, image FROM annotations WHERE image NOT IN (SELECT id FROM images) LIMIT 1"
        ).fetchone()
        if lost:
            raise ValueError(f"{lost[0]}: image_id {lost[1]} is not among the images")

    def _add(self, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
        place = ""

        def written() -> Iterator[tuple[Any, ...]]:
            nonlocal place
            for *keys, at, record in rows:
                place = f"{at} (id {keys[0]})"
                yield (*keys, place, json.dumps(record))

        try:
            self.base.executemany(statement, written())
        except sqlite3.IntegrityError:
            raise ValueError(f"{place}: this id was given before") from None

    def __iter__(self) -> Iterator[tuple[tuple[dict[str, Any], str], list[tuple[dict[str, Any], str]]]]:
        """Each image and its annotations, in the order of the file, with the words that name them."""
        for identity, place, record in self.base.execute("SELECT id, place, record FROM images ORDER BY rowid"):
            found = self.base.execute(
                "SELECT record, place FROM annotations WHERE image = ? ORDER BY rowid", (identity,)
            )
            yield (json.loads(record), place), [(json.loads(text), at) for text, at in found]

    def close(self) -> None:
        self.base.close()
