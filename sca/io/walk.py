"""Walking folders that contain links to folders."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path


def walk_files(
    folder: str | Path,
    onerror: Callable[[OSError], None] | None = None,
    enter: Callable[[str], bool] = lambda name: True,
) -> Iterator[Path]:
    """Yield the files below a folder, also those below links to folders; each folder is entered once.

    Folders come before the links to them, so that a file has the same path wherever a link is.

    Args:
        folder: Where to start.
        onerror: Called with the error of a folder that cannot be listed.
        enter: Whether to enter a subfolder of this name.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [str(folder)]
    while waiting:
        links: list[str] = []
        for parent, folders, names in os.walk(waiting.pop(0), onerror=onerror):
            found = os.stat(parent)
            if (found.st_dev, found.st_ino) in seen:
                folders.clear()
                continue
            seen.add((found.st_dev, found.st_ino))
            folders[:] = sorted(name for name in folders if enter(name))
            links += [path for name in folders if os.path.islink(path := os.path.join(parent, name))]
            yield from (Path(parent, name) for name in names)
        waiting += links
