"""Remarks on inputs that are read, but perhaps not as they were meant."""

from __future__ import annotations

import logging

_LOGGER = logging.getLogger("sca")
_noticed: set[str] = set()


def notice_once(kind: str, message: str) -> None:
    """Log a warning, once per process and kind; without a logging configuration it is a line on stderr.

    Args:
        kind: Identifies what is remarked on.
        message: One line that names the first input of this kind.
    """
    if kind not in _noticed:
        _noticed.add(kind)
        _LOGGER.warning("%s (shown once)", message)
