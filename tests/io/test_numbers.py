import decimal
import fractions
import math

import numpy as np
import pytest

from sca.io.numbers import is_finite_number, is_int64


@pytest.mark.parametrize("value", [0, -1, 1.5, 10**300, np.float32(2), np.int64(3), fractions.Fraction(1, 3)])
def test_is_finite_number_accepts_what_a_float_can_hold(value):
    assert is_finite_number(value)


@pytest.mark.parametrize("value", [10**400, -(10**400), math.nan, math.inf, True, "1", None, [1], decimal.Decimal(1)])
def test_is_finite_number_rejects_everything_else_without_an_error(value):
    assert not is_finite_number(value)


def test_is_int64_rejects_what_does_not_fit():
    assert all(map(is_int64, (0, 2**63 - 1, -(2**63))))
    assert not any(map(is_int64, (2**63, -(2**63) - 1, 10**400, 1.0, True, "1", None)))
