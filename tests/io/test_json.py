"""Untrusted JSON: limits on type, size, depth and numbers."""

import json
import os

import pytest

from sca.io.json import MAX_DEPTH, parse_json, read_json, read_regular_file

DEEPLY_NESTED_JSON = "[" * 200_000


def test_read_json_returns_the_value_with_and_without_byte_order_mark(tmp_path):
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "a.json").write_text('{"a": [1, "\\ud83d\\ude00", NaN]}', encoding)
        value = read_json(tmp_path / "a.json")["a"]
        assert value[:2] == [1, "\U0001f600"]
        assert value[2] != value[2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (DEEPLY_NESTED_JSON, "deeper than 100"),
        ('{"a":' * 200_000, "deeper than 100"),
        ("[" * 900 + "]" * 900, "deeper than 100"),
        ("9" * 5000, "Exceeds the limit"),
        ('"\\ud800"', "surrogate"),
        ("{", "at column 2"),
        ("", "at column 1"),
        (b"\xff", "not UTF-8"),
        (b"[" + b" " * 2000 + b"]", "larger than 1,000 bytes"),
    ],
)
def test_read_json_rejects_invalid_content_in_one_line_naming_the_file(tmp_path, content, message):
    file = tmp_path / "a.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error_info:
        read_json(file, max_bytes=1000 if isinstance(content, bytes) else None)
    assert str(file) in str(error_info.value)
    assert "\n" not in str(error_info.value)


def test_parse_json_accepts_the_deepest_allowed_nesting():
    json_text = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert json.dumps(parse_json(json_text, "a.json")) == json_text
    with pytest.raises(ValueError, match="deeper"):
        parse_json(f"[{json_text}]", "a.json")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_parse_json_rejects_non_finite_numbers_on_request(number):
    assert isinstance(parse_json(f"[{number}]", "a.json")[0], float)
    with pytest.raises(ValueError, match="not a finite number"):
        parse_json(f"[{number}]", "a.json", require_finite=True)
    assert parse_json("[1.5, 1e300]", "a.json", require_finite=True) == [1.5, 1e300]


def test_parse_json_accepts_half_of_a_surrogate_pair_on_request():
    assert parse_json('"\\ud83d"', "a.json", allow_surrogates=True) == "\ud83d"


def test_read_regular_file_rejects_a_fifo_and_a_folder_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        with pytest.raises(ValueError, match="not a regular file"):
            read_regular_file(path)
    with pytest.raises(FileNotFoundError):
        read_regular_file(tmp_path / "absent")
