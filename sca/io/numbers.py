"""Numbers from elsewhere."""

from __future__ import annotations

import math
import numbers
from typing import Any


def is_finite_number(value: Any) -> bool:
    """Whether a value is a number that is finite as a float; a bool, NaN, infinity and 10**400 are not."""
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def is_int64(value: Any) -> bool:
    """Whether a value is an integer, not a bool, that fits into 64 bits, as in an Arrow table."""
    return type(value) is int and -(1 << 63) <= value < 1 << 63
