"""Warnings about inputs that can be read, but perhaps not as intended."""

from __future__ import annotations

import logging

_LOGGER = logging.getLogger("sca")
_warned_keys: set[str] = set()


def warn_once(warning_key: str, message: str) -> None:
    """Log a warning once per process and key; without a logging configuration it is printed on stderr.

    Args:
        warning_key: Identifies the kind of warning.
        message: One line that names the first input of this kind.
    """
    if warning_key not in _warned_keys:
        _warned_keys.add(warning_key)
        _LOGGER.warning("%s (shown once)", message)
