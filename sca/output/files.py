"""Names of files that are written for images."""

from __future__ import annotations

from pathlib import Path


class Names:
    """A file name for each image: its stem, or `STEM-2` where that has been used for another image."""

    def __init__(self) -> None:
        self._used: set[str] = set()

    def of(self, path: str) -> str:
        stem = Path(path).stem.encode("utf-8", "surrogateescape")[:200].decode("utf-8", "ignore") or "image"
        name, copies = stem, 1
        while name.casefold() in self._used:
            copies += 1
            name = f"{stem}-{copies}"
        self._used.add(name.casefold())
        return name
