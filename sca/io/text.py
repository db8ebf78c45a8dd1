"""Escape untrusted text for a terminal, a Markdown page or a spreadsheet; format counts and errors."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable

# Control characters (C0, DEL, C1), line separators, bidirectional controls, and lone surrogates.
UNSAFE_PATTERN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff]")
SHORT_ESCAPES = {"\t": r"\t", "\n": r"\n", "\r": r"\r"}
# Includes the full-width forms, which Excel treats as equal.
FORMULA_START_PATTERN = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")


def escape_terminal(text: str, allowed: str = "") -> str:
    r"""Replace characters that a terminal would interpret by visible escapes such as \x1b, \n and \u202e.

    Args:
        text: Untrusted text, for example a caption or a file name.
        allowed: Characters to keep, such as the newlines of a document.

    Returns:
        Text that is safe to print.
    """
    return UNSAFE_PATTERN.sub(lambda match: match[0] if match[0] in allowed else _escape_character(match[0]), text)


def escape_markdown(text: str) -> str:
    """Escape text for Markdown on one line, including tables: no HTML, links, mentions or emphasis."""
    line = " ".join(escape_terminal(" ".join(text.split())).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"[\\`*\[\]|~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", line)
    return line.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode, by question marks."""
    return text.encode("utf-8", "replace").decode()


def format_count(number: int, noun: str) -> str:
    """Format a number with its noun, such as "1 image" and "1,200 images"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def format_csv(rows: Iterable[Iterable[object]]) -> str:
    """Format rows as CSV. Text that looks like a formula is escaped for spreadsheets; numbers stay numbers."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)  # quotes text with a lone \r
    writer.writerows([_escape_formula(cell) for cell in row] for row in rows)
    return buffer.getvalue()


def _escape_character(character: str) -> str:
    code = ord(character)
    return SHORT_ESCAPES.get(character) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def _escape_formula(cell: object) -> object:
    return f"'{cell}" if isinstance(cell, str) and FORMULA_START_PATTERN.match(cell) and not _is_number(cell) else cell


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def describe_error(error: BaseException) -> str:
    """Return the message of an error; for a system error, its reason and the file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def format_bytes(count: int) -> str:
    """Format a number of bytes in MiB or GiB."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
