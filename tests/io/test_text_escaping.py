"""Untrusted text: escaped on display and unchanged in storage."""

import ast
import csv
import gc
import io
import logging
import re
import sys
import threading
import warnings
from pathlib import Path

import pytest
import sca_bench.cli
from rich.console import Console

import sca.cli
from sca.io import terminal
from sca.io.terminal import Table, guard_terminal
from sca.io.text import UNSAFE_PATTERN, escape_markdown, escape_terminal, format_csv

UNSAFE_CHARACTERS = [*map(chr, [*range(32), *range(127, 160)]), *"\u200e\u200f\u2028\u2029\u061c", "\ud800"]
UNSAFE_CHARACTERS += [chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))]


@pytest.mark.parametrize("character", UNSAFE_CHARACTERS, ids=ascii)
def test_escape_terminal_makes_control_characters_visible(character):
    escaped = escape_terminal(f"a{character}b")
    assert escaped.isprintable()
    assert escaped.isascii()
    assert escaped == f"a{character.encode('unicode_escape', 'surrogatepass').decode()}b"


def test_escape_terminal_keeps_every_other_character_and_is_idempotent():
    text = "C:\\dir — “Grüße” 北京 שלום 👩\u200d👧 \u00a0|[bold]"
    assert escape_terminal(text) == text
    assert escape_terminal(escape_terminal("\x1b]0;x\x07")) == escape_terminal("\x1b]0;x\x07") == r"\x1b]0;x\x07"
    assert escape_terminal("a\n\tb\x1b", allowed="\n\t") == "a\n\tb\\x1b"


def test_table_shows_markup_and_control_characters_as_text():
    hostile_text = "[bold red]x[/] [link=http://evil]y[/link] :smile: \x1b[31m\u202e\nz"
    table = Table((hostile_text, "b"), hostile_text, right_aligned=("b",), notes=[hostile_text, "second"])
    table.add_row(hostile_text, "1.0")
    console = Console(file=io.StringIO(), width=300, force_terminal=True, color_system=None)
    console.print(table)
    output = console.file.getvalue()
    assert output.count("[bold red]x[/] [link=http://evil]y[/link] :smile: \\x1b[31m\\u202e\\nz") == 4
    assert not UNSAFE_PATTERN.search(re.sub("\x1b\\[[0-9;]*m|\n", "", output)), "rich's own styles aside"


def test_format_csv_escapes_formulas_and_keeps_numbers():
    formulas = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", " =1", "\n=1", "＝1"]
    csv_text = format_csv([formulas, [-1.5, 2, None, "-1e-3", "+4", "plain", 'a "b", c']])
    formula_row, number_row = csv.reader(io.StringIO(csv_text, newline=""))
    assert formula_row == [f"'{formula}" for formula in formulas]
    assert number_row == ["-1.5", "2", "", "-1e-3", "+4", "plain", 'a "b", c']


def test_escape_markdown_returns_one_line_without_markup():
    text = escape_markdown("a|b\n# c <img src=x> [d](http://e) `f` *g* _h_ i_j www.k @l & \x1b")
    assert text == (
        "a\\|b # c &lt;img src=x&gt; \\[d\\](http&#58;//e) \\`f\\` \\*g\\* \\_h\\_ i_j www&#46;k &#64;l &amp; \\\\x1b"
    )


@pytest.fixture
def guarded_terminal(monkeypatch):
    """Set up the standard streams as `sca` does."""
    for hook in ("sys.excepthook", "sys.unraisablehook", "threading.excepthook"):
        monkeypatch.setattr(hook, None)
    monkeypatch.setattr("warnings.formatwarning", warnings.formatwarning)
    original_factory = logging.getLogRecordFactory()
    guard_terminal()
    yield
    logging.setLogRecordFactory(original_factory)


def test_guard_terminal_escapes_log_records_warnings_and_tracebacks(guarded_terminal, capsys):
    stream = io.StringIO()
    logger = logging.Logger("test")
    logger.addHandler(logging.StreamHandler(stream))
    logger.warning("\x1b[1m %s %5.1f %d %r", "\x1b[31m", 1.25, 3, "a")
    logger.warning("%(name)s", {"name": "\u202e"})
    logger.warning(ValueError("\x9b1m"))
    try:
        raise ValueError("two\nlines \x1b[2J")
    except ValueError as error:
        logger.exception("failed")
        sys.excepthook(type(error), error, error.__traceback__)
    for category in (UserWarning, RuntimeWarning):
        stream.write(warnings.formatwarning("\x1b]0;title\x07", category, "a\x1b.py", 1, ""))
    output = stream.getvalue() + capsys.readouterr().err
    assert not UNSAFE_PATTERN.search(output.replace("\n", ""))
    assert "\\x1b[1m \\x1b[31m   1.2 3 'a'\n\\u202e\n\\x9b1m\nfailed\nTraceback" in output
    assert output.count("ValueError: two\nlines \\x1b[2J") == 2
    assert "\nsca: \\x1b]0;title\\x07\na\\x1b.py:1: RuntimeWarning: \\x1b]0;title\\x07\n" in output


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.slow
def test_guard_terminal_escapes_errors_of_threads_and_finalizers(guarded_terminal, capsys):
    class Broken:
        def __del__(self):
            raise ValueError("two\nlines \x1b[2J")

    def raise_error():
        raise ValueError("two\nlines \x1b[2J")

    for name, target in (("\x1b[31m", raise_error), ("quiet", sys.exit)):
        thread = threading.Thread(target=target, name=name)
        thread.start()
        thread.join()
    Broken()
    gc.collect()
    output = capsys.readouterr().err
    assert not UNSAFE_PATTERN.search(output.replace("\n", ""))
    assert "Exception in thread \\x1b[31m:\nTraceback" in output
    assert "Broken.__del__\nTraceback" in output
    assert output.count("ValueError: two\nlines \\x1b[2J") == 2
    assert "quiet" not in output


def test_commands_print_only_through_the_options_module():
    """Commands print with `sca.cli.options`, which escapes all text."""
    files = [*Path(sca.cli.__file__).parent.glob("*.py"), Path(sca_bench.cli.__file__)]
    calls = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "print",
                "typer.echo",
                "typer.secho",
                "Console",
            ):
                calls.append((file.name, ast.unparse(node)))
    expected_counts = {
        "options.py": 7,  # complain, print_line, print_document, print_json, print_table twice and its console
        "__init__.py": 1,  # typer's own usage
        "image_runs.py": 1,  # progress bars, without text from elsewhere
        "evaluate.py": 1,
        "calibrate.py": 1,
    }
    assert {name: sum(file_name == name for file_name, _ in calls) for name, _ in calls} == expected_counts, calls
    assert terminal.DOCUMENT_WHITESPACE == "\n\t"
