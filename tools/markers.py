"""Replace generated tables between two markers of a page."""

from __future__ import annotations

from pathlib import Path

from sca.io.atomic import write_file


def replace_between(text: str, start: str, end: str, content: str) -> str:
    """Return the text with `content` between the first `start` and the `end` after it.

    Raises:
        ValueError: A marker is missing.
    """
    before, start_found, remainder = text.partition(start)
    _, end_found, after = remainder.partition(end)
    if not start_found or not end_found:
        raise ValueError(f"the page has no {start} with {end} behind it")
    middle = f"\n{content}\n" if content else "\n"
    return f"{before}{start}{middle}{end}{after}"


def write_between(page: Path, start: str, end: str, content: str) -> None:
    """Rewrite a page with `content` between its markers.

    Raises:
        ValueError: A marker is missing.
    """
    try:
        write_file(page, replace_between(page.read_text("utf-8"), start, end, content))
    except ValueError as error:
        raise ValueError(f"{page}: {error}") from error


def read_between(text: str, start: str, end: str) -> str:
    """Return the stripped text between the markers; empty without markers."""
    return text.partition(start)[2].partition(end)[0].strip()
