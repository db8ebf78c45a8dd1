"""API keys: reading from a file and comparison in constant time."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from pathlib import Path


def read_keys(path: Path) -> tuple[str, ...]:
    """Read API keys from a file.

    Args:
        path: Text file with one key per line; empty lines and lines that start with # are ignored.

    Returns:
        The keys, in the order of the file.

    Raises:
        ValueError: The file cannot be read, contains no key, or contains a key that is not printable ASCII.
    """
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ValueError(f"cannot read API keys from {path}: {reason}; write one key per line") from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ValueError(f"{path} contains no API key; write one key per line")
    if not all(key.isascii() and key.isprintable() for key in keys):  # limit of HTTP headers
        raise ValueError(f"{path} contains an API key that is not printable ASCII; use another key")
    return keys


def find_key_index(candidate: str, keys: Sequence[str]) -> int | None:
    """Return the index of a key, or None. The time does not depend on how many characters match.

    Args:
        candidate: Key of a client.
        keys: Valid keys.

    Returns:
        The index, or None.
    """
    matching_index = None
    for index, key in enumerate(keys):
        if hmac.compare_digest(candidate.encode(), key.encode()):
            matching_index = index
    return matching_index
