"""Bounded TOML reading: an untrusted recipe or sweep causes an InputError, never a traceback."""

from __future__ import annotations

import tomllib
from datetime import date, time
from pathlib import Path
from typing import Any

from sca.io.errors import InputError
from sca.io.json import MAX_DEPTH, check_depth, read_regular_file


def read_toml_text(path: Path) -> str:
    """Read the text of a TOML file, or of a pipe that a person typed.

    Args:
        path: TOML file or pipe.

    Returns:
        The text.

    Raises:
        InputError: The file is not a regular file, or not UTF-8.
    """
    try:
        return read_regular_file(path, allow_pipe=True).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML text.

    Args:
        text: TOML document.

    Returns:
        The table.

    Raises:
        ValueError: The text is not TOML, is nested too deeply, or contains dates.
    """
    try:
        table = tomllib.loads(text)
    except RecursionError as error:
        raise InputError(f"nested deeper than {MAX_DEPTH} levels") from error
    check_depth(table)
    _check_no_dates(table)
    return table


def _check_no_dates(value: Any) -> None:
    """Raise InputError for a date or a time, which no option accepts."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            _check_no_dates(each)
    elif isinstance(value, date | time):
        raise InputError(f"{value.isoformat()} is a date or a time; write text in quotes")
