"""Remarks on inputs that are read, but perhaps not as they were meant."""

from __future__ import annotations

import logging

_LOGGER = logging.getLogger("sca")
_warned_keys: set[str] = set()


def warn_once(warning_key: str, message: str) -> None:
    """Log a warning, once per process and kind; without a logging configuration it is a line on stderr.

    Args:
        warning_key: Identifies what is remarked on.
        message: One line that names the first input of this kind.
    """
    if warning_key not in _warned_keys:
        _warned_keys.add(warning_key)
        _LOGGER.warning("%s (shown once)", message)
