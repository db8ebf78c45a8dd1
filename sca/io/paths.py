"""Path conversions: expanded, normalized, relative, without parents, shortened."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def expand_user(path: str | Path) -> Path:
    """Expand `~` in a path that a person wrote; unchanged without a home directory."""
    return Path(os.path.expanduser(path))


def normalize_name(name: str) -> str:
    """Return a path without empty and `.` parts; `..` is kept, because it may follow a link."""
    root = "/" if name.startswith("/") else ""
    return root + "/".join(part for part in name.split("/") if part not in ("", ".")) or "."


def make_relative_path(path: str | Path, folder: str | Path) -> str:
    """Return the path of a file relative to a folder, as the system resolves it even if either is below a link."""
    parent, name = os.path.split(path)
    return os.path.join(os.path.relpath(os.path.realpath(parent), os.path.realpath(folder)), name)


def remove_parents(path: Path) -> Path:
    """Return a path without `..`; unchanged if that would change its target, because a part is a link."""
    normalized = Path(os.path.normpath(path))
    is_same = os.path.samefile(normalized, path) if normalized.exists() and path.exists() else not path.exists()
    return normalized if is_same else path


def distinguish_paths(paths: Sequence[str | Path]) -> list[str]:
    """Return the shortest distinct form of each path: the path without the folders that all share.

    Equal paths are numbered.
    """
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    start = _count_shared_prefix(parts)
    end = _count_shared_prefix([each[start:][::-1] for each in parts])
    names = ["/".join(each[start : len(each) - end]) or each[-1] for each in parts]
    return names if len(set(names)) == len(names) else [str(number) for number in range(1, len(names) + 1)]


def _count_shared_prefix(sequences: Sequence[Sequence[str]]) -> int:
    """Return the number of elements that all sequences share at the start."""
    return next(
        (index for index, column in enumerate(zip(*sequences, strict=False)) if len(set(column)) > 1),
        min(map(len, sequences)),
    )
