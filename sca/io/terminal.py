"""Terminal output. Untrusted text passes `escape_terminal` here, once, and never at its source."""

from __future__ import annotations

import logging
import sys
import textwrap
import threading
import traceback
import unicodedata
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sca.io.text import escape_terminal

if TYPE_CHECKING:
    from rich.table import Table as RichTable

DOCUMENT_WHITESPACE = "\n\t"  # kept in texts of several lines
COLUMN_GAP = "  "
MIN_WRAP_WIDTH = 20  # a wrapped column does not get narrower


@dataclass
class Table:
    """Table for `sca.cli.options.print_table`. Cells, title and notes are plain text without markup.

    Attributes:
        columns: Headings; the header is hidden if all are empty.
        title: Title of a table with a frame.
        right_aligned: Columns that are right-aligned.
        notes: Lines below a table with a frame.
        has_frame: Whether to draw lines, with rich. Tables without a frame do not import it.
        rows: Cells by row.
    """

    columns: Sequence[str]
    title: str = ""
    right_aligned: Collection[str] = ()
    notes: Sequence[str] = ()
    has_frame: bool = True
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add_row(self, *cells: str) -> None:
        """Append a row of cells."""
        self.rows.append(cells)

    def format_lines(self, max_width: int) -> list[str]:
        """Format a table without a frame; the widest column is wrapped to fit.

        Args:
            max_width: Maximum width in cells of a terminal.

        Returns:
            Lines, safe for a terminal.
        """
        header = [self.columns] if any(self.columns) else []
        rows = [[escape_terminal(cell) for cell in row] for row in (*header, *self.rows)]
        widths = [max(map(_measure_width, cells)) for cells in zip(*rows, strict=True)]
        widest = widths.index(max(widths))
        excess = sum(widths) + len(COLUMN_GAP) * (len(widths) - 1) - max_width
        if excess > 0:
            widths[widest] = min(widths[widest], max(MIN_WRAP_WIDTH, widths[widest] - excess))
        return [line for row in rows for line in self._format_row(row, widths, widest)]

    def _format_row(self, row: Sequence[str], widths: Sequence[int], wrapped_column: int) -> list[str]:
        is_right_aligned = [name in self.right_aligned for name in self.columns]
        blank_row = [""] * len(row)
        lines = []
        for index, part in enumerate(_wrap_cell(row[wrapped_column], widths[wrapped_column])):
            cells = [*(blank_row if index else row)]
            cells[wrapped_column] = part
            padded_cells = map(_pad_cell, cells, widths, is_right_aligned)
            lines.append(COLUMN_GAP.join(padded_cells).rstrip())
        return lines

    def __rich__(self) -> RichTable:
        from rich.table import Table as RichTable
        from rich.text import Text

        def make_safe_text(text: str) -> Text:
            return Text(escape_terminal(text))

        table = RichTable(
            title=make_safe_text(self.title) if self.title else None,
            caption=Text("\n").join(map(make_safe_text, self.notes)) if self.notes else None,
            caption_justify="left",
            show_header=any(self.columns),
        )
        for column in self.columns:
            table.add_column(
                make_safe_text(column), justify="right" if column in self.right_aligned else "left", overflow="fold"
            )
        for row in self.rows:
            table.add_row(*map(make_safe_text, row))
        return table


def _measure_width(text: str) -> int:
    """Return the number of cells of a terminal that a text occupies: two per wide character, none per accent."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def _wrap_cell(text: str, width: int) -> list[str]:
    """Wrap a text to a width in cells; a text of wide characters to half as many characters."""
    is_wide = _measure_width(text) > len(text)
    if _measure_width(text) <= width:
        return [text]
    return textwrap.wrap(text, width // 2 if is_wide else width, break_on_hyphens=False) or [""]


def _pad_cell(text: str, width: int, is_right_aligned: bool) -> str:
    padding = " " * (width - _measure_width(text))
    return padding + text if is_right_aligned else text + padding


def guard_terminal() -> None:
    """Make all tracebacks, warnings and log records of this process safe to print."""
    sys.excepthook = _print_traceback
    threading.excepthook = _print_thread_traceback
    sys.unraisablehook = _print_unraisable
    warnings.formatwarning = _format_warning
    logging.setLogRecordFactory(_EscapedLogRecord)


def _print_traceback(error_type: Any, error: BaseException | None, trace: Any) -> None:
    print(_format_traceback(error_type, error, trace), file=sys.stderr, flush=True)


def _print_thread_traceback(failure: threading.ExceptHookArgs) -> None:
    if failure.exc_type is not SystemExit:
        name = failure.thread.name if failure.thread else "?"
        print(escape_terminal(f"Exception in thread {name}:"), file=sys.stderr)
        _print_traceback(failure.exc_type, failure.exc_value, failure.exc_traceback)


def _print_unraisable(failure: sys.UnraisableHookArgs) -> None:
    """Print an exception that cannot be raised, such as one in `__del__`, without the `repr` of its object."""
    name = getattr(failure.object, "__qualname__", type(failure.object).__qualname__)
    print(escape_terminal(f"{failure.err_msg or 'Exception ignored in'}: {name}"), file=sys.stderr)
    _print_traceback(failure.exc_type, failure.exc_value, failure.exc_traceback)


def _format_traceback(error_type: Any, error: Any, trace: Any) -> str:
    return escape_terminal(
        "".join(traceback.format_exception(error_type, error, trace)).rstrip("\n"), DOCUMENT_WHITESPACE
    )


_original_format_warning = warnings.formatwarning


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Return a warning for users in one line, like an error; any other, which is for developers, as Python does."""
    if category is UserWarning and not sys.flags.dev_mode:
        return f"sca: {escape_terminal(str(message))}\n"
    return escape_terminal(_original_format_warning(message, category, filename, lineno, line), DOCUMENT_WHITESPACE)


class _EscapedLogRecord(logging.LogRecord):
    """Log record with an escaped message, arguments and traceback; formatters may add color."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.msg = _escape_log_value(self.msg)
        if isinstance(self.args, tuple):
            self.args = tuple(map(_escape_log_value, self.args))
        elif self.args:
            self.args = {name: _escape_log_value(value) for name, value in self.args.items()}
        if self.exc_info and self.exc_info[0]:
            self.exc_text = _format_traceback(*self.exc_info)


def _escape_log_value(value: Any) -> Any:
    return value if value is None or hasattr(value, "__float__") else escape_terminal(str(value), DOCUMENT_WHITESPACE)
