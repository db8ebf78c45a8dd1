"""Walk folders that contain links to folders."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path


def walk_files(
    folder: str | Path,
    onerror: Callable[[OSError], None] | None = None,
    should_enter: Callable[[str], bool] = lambda name: True,
) -> Iterator[Path]:
    """Yield the files below a folder, including those below links to folders; each folder is entered once.

    Folders come before the links to them, so that the path of a file does not depend on links elsewhere.

    Args:
        folder: Top folder.
        onerror: Called with the error of a folder that cannot be listed.
        should_enter: Whether to enter a subfolder with this name.

    Yields:
        The path of a file.
    """
    visited: set[tuple[int, int]] = set()
    pending_folders = [str(folder)]
    while pending_folders:
        links: list[str] = []
        for parent, folders, names in os.walk(pending_folders.pop(0), onerror=onerror):
            folder_stat = os.stat(parent)
            if (folder_stat.st_dev, folder_stat.st_ino) in visited:
                folders.clear()
                continue
            visited.add((folder_stat.st_dev, folder_stat.st_ino))
            folders[:] = sorted(name for name in folders if should_enter(name))
            links += [path for name in folders if os.path.islink(path := os.path.join(parent, name))]
            yield from (Path(parent, name) for name in names)
        pending_folders += links
