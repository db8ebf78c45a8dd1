"""Text of scores for people: times 100, as papers print them. JSON, JSON Lines and CSV contain the raw values."""

from __future__ import annotations

import math

PRINT_FACTOR = 100  # fractions become percentages, and CIDEr-D becomes the value that papers print
PRINT_NOTE = "scores times 100, counts unchanged"
UNDEFINED_SCORE = "–"


def format_score(value: float | None, signed: bool = False) -> str:
    """Format a score for a table.

    Args:
        value: Raw score; an integer is a count.
        signed: Whether a positive value has a plus sign, for differences.

    Returns:
        The score times 100 with one decimal, a count unchanged, a dash for NaN, or "" for None.
    """
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:+}" if signed else str(value)
    return UNDEFINED_SCORE if math.isnan(value) else f"{PRINT_FACTOR * value:{'+' if signed else ''}.1f}"


def format_interval(low: float | None, high: float | None, signed: bool = False) -> str:
    """Format the raw bounds of a confidence interval as "LOW to HIGH", times 100; "" without bounds."""
    return "" if low is None or high is None else f"{format_score(low, signed)} to {format_score(high, signed)}"
