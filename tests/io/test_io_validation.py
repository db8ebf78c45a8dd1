import decimal
import fractions
import math

import numpy as np
import pytest
from sca_registry import RegistryError

from sca.io.errors import InputError
from sca.io.validation import (
    check_encodable,
    check_numbers,
    check_range,
    is_finite_number,
    is_int64,
    parse_texts,
    read_field,
    read_id,
    read_image_name,
    read_recorded_size,
    require_recorded_size,
    xywh_to_xyxy,
)


@pytest.mark.parametrize("value", [0, -1, 1.5, 10**300, np.float32(2), np.int64(3), fractions.Fraction(1, 3)])
def test_is_finite_number_accepts_numbers_that_fit_a_float(value):
    assert is_finite_number(value)


@pytest.mark.parametrize("value", [10**400, -(10**400), math.nan, math.inf, True, "1", None, [1], decimal.Decimal(1)])
def test_is_finite_number_returns_false_for_other_values(value):
    assert not is_finite_number(value)


def test_is_int64_accepts_only_64_bit_integers():
    assert all(map(is_int64, (0, 2**63 - 1, -(2**63), np.int64(8))))
    assert not any(map(is_int64, (2**63, -(2**63) - 1, 10**400, 1.0, True, "1", None)))


@pytest.mark.parametrize("value", [0, 3, 9.5, 10])
def test_check_range_accepts_values_within_its_limits(value):
    check_range("train.steps", value, float, 0, 10)


@pytest.mark.parametrize("value", [-1, 11, 10.5])
def test_check_range_error_names_the_field_and_its_limits(value):
    with pytest.raises(RegistryError, match=rf"^train\.steps is {value}; expected a number from 0 to 10$"):
        check_range("train.steps", value, float, 0, 10)


@pytest.mark.parametrize("value", [True, math.nan, "3"])
def test_check_range_rejects_booleans_nan_and_text(value):
    with pytest.raises(RegistryError, match=r"^train\.steps is .*; expected a number$"):
        check_range("train.steps", value, float, 0, 10)


@pytest.mark.parametrize("box", [(1e308, 0, 1e308, 1), (0, 10**308, 1, 10**308)])
def test_xywh_to_xyxy_rejects_infinite_corners(box):
    with pytest.raises(InputError, match="box has a corner that is not finite"):
        xywh_to_xyxy("box", *box)


@pytest.mark.parametrize(
    ("read_value", "message"),
    [
        (lambda: read_field({"a": 1}, "b", int, "f, line 1"), "f, line 1: no 'b'; it has: a"),
        (lambda: read_field([], "b", int, "f, line 1"), "f, line 1 is []; expected an object"),
        (lambda: read_field({"b": True}, "b", int, "f"), "f, 'b' is True; expected an integer"),
        (lambda: read_field({"b": 2**63}, "b", int, "f"), f"f, 'b' is {2**63}; expected an integer"),
        (lambda: read_field({"b": "\ud800"}, "b", str, "f"), r"f, 'b' contains '\ud800', half of a surrogate pair"),
        (lambda: read_image_name({"b": " "}, "b", "f"), "f, 'b' is ' '; expected the file name of an image"),
        (lambda: read_image_name({"b": "a\0"}, "b", "f"), "expected the file name of an image"),
        (lambda: read_id({"b": 1.5}, "b", "f"), "f, 'b' is 1.5; expected an integer or a string"),
        (lambda: parse_texts("f, 'b'", ["a", 1]), "f, 'b' is ['a', 1]; expected a string, or a list of strings"),
        (lambda: check_numbers("f, 'b'", [1, math.inf], "x, y"), "f, 'b' is [1, inf]; expected 2 numbers (x, y)"),
        (lambda: check_encodable("f", {"a": ["\udc80"]}), r"f contains '\udc80', half of a surrogate pair"),
        (lambda: require_recorded_size({"width": 1}, "f"), "f: no 'height'; it has: width"),
        (
            lambda: read_recorded_size({"width": 0, "height": 1}, "f"),
            "f: 'width' and 'height' are (0, 1); expected the size",
        ),
        (lambda: read_recorded_size({"width": 10**5, "height": 10**5}, "f"), "at most 178,956,970 pixels are allowed"),
        (
            lambda: xywh_to_xyxy("f, 'b'", 0, 0, -1, 1),
            "f, 'b' has width -1 and height 1; expected values of at least 0",
        ),
    ],
)
def test_record_validators_name_the_file_field_and_invalid_value(read_value, message):
    with pytest.raises(InputError) as error_info:
        read_value()
    assert message in str(error_info.value)


def test_read_recorded_size_returns_none_if_a_side_is_missing():
    assert read_recorded_size({"width": 3}, "f") is None
    assert read_recorded_size({"w": 3, "h": 4}, "f", ("w", "h")) == (3, 4)
