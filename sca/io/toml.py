"""Bounded TOML reading: a recipe or a sweep of a stranger is one ValueError, never a traceback."""

from __future__ import annotations

import tomllib
from typing import Any

from sca.io.json import MAX_DEPTH, check_depth


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML text.

    Raises:
        ValueError: If it is not TOML, or nested too deep. One line that says why.
    """
    try:
        table = tomllib.loads(text)
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from error
    check_depth(table)
    return table
