"""Patterns of the files that a run writes into its folder.

Patterns are relative to the folder, such as `captions.jsonl`, `*.captions.png` and `checkpoint-#/*`, where `#` matches
a decimal number.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from fnmatch import translate
from functools import cache
from glob import escape, glob
from pathlib import Path

NUMBER_WILDCARD = re.compile(r"(?<!\[)#")


def find_outputs(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Return the existing files that match patterns, sorted, without following links."""
    return [path for path in _find_matches(folder, patterns) if path.is_symlink() or not path.is_dir()]


def find_output_folders(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Return the run folder and its existing subfolders that contain files of the patterns, without following links."""
    parents = {str(Path(pattern).parent) for pattern in patterns} - {"."}
    return [folder, *(path for path in _find_matches(folder, parents) if path.is_dir() and not path.is_symlink())]


def _find_matches(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Return the existing files and folders that match patterns, sorted, without following links."""
    patterns = tuple(patterns)
    names = (glob(NUMBER_WILDCARD.sub("[0-9]*", each), root_dir=folder, include_hidden=True) for each in patterns)
    candidates = {folder / name for each in names for name in each}
    matches = [path for path in sorted(candidates) if is_output(path, folder, patterns)]
    return [path for path in matches if not any(parent.is_symlink() for parent in iter_parents_between(path, folder))]


def iter_parents_between(path: Path, folder: Path) -> Iterator[Path]:
    """Yield the folders between a path and a folder above it, innermost first."""
    for parent in path.parents:
        if parent == folder:
            return
        yield parent


def is_output(path: Path, folder: Path, patterns: Iterable[str]) -> bool:
    """Return whether a pattern matches a file, segment by segment as in `Path.glob`."""
    return _matches_any_pattern(path.relative_to(folder).parts, patterns)


def _matches_any_pattern(parts: tuple[str, ...], patterns: Iterable[str]) -> bool:
    return any(
        len(pattern_parts) == len(parts) and all(map(re.fullmatch, map(_translate_to_regex, pattern_parts), parts))
        for pattern_parts in (Path(pattern).parts for pattern in patterns)
    )


def make_exact_pattern(name: str) -> str:
    """Return the pattern that matches exactly one name."""
    return escape(name).replace("#", "[#]")


def is_declared_pattern(pattern: str, patterns: Collection[str]) -> bool:
    """Return whether a pattern is one of `patterns`, or an exact name that matches one of them."""
    path = Path(re.sub(r"\[([*?[#])\]", r"\1", pattern))
    is_exact = make_exact_pattern(str(path)) == pattern and not path.is_absolute() and ".." not in path.parts
    return pattern in patterns or (is_exact and _matches_any_pattern(path.parts, patterns))


@cache
def _translate_to_regex(pattern: str) -> str:
    return translate(pattern).replace(re.escape("#"), "[0-9]+")
