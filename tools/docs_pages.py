"""mkdocs hook that completes the pages of the site: `make docs`.

The pages are the files of docs/. A marker `<!-- generated: NAME -->` is replaced by a reference that is generated from
the help texts, the component cards or the docstrings. Links to files outside docs/ become plain text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import typer
from sca_registry import get_registry
from sca_registry.contracts import COMPONENT_KINDS
from sca_registry.plugins import BUILTIN_DISTRIBUTION

import sca
from sca.cli import build_app

MARKER_PATTERN = re.compile(r"<!-- generated: ([a-z]+) -->")
OUTSIDE_LINK_PATTERN = re.compile(r"\[([^\]]*)\]\(\.\./[^)]*\)")


def on_page_markdown(markdown: str, **context: Any) -> str:
    """Complete the Markdown of a page; called by mkdocs."""
    completed = MARKER_PATTERN.sub(lambda match: REFERENCES[match[1]](), markdown)
    return OUTSIDE_LINK_PATTERN.sub(r"\1", completed)


def render_help() -> str:
    """Render the help text of every command."""
    lines: list[str] = []

    def add_command(command: Any, name: str) -> None:
        context = command.make_context(name, [], resilient_parsing=True)
        if hasattr(command, "commands"):
            for subcommand in sorted(command.commands):
                add_command(command.commands[subcommand], f"{name} {subcommand}")
        else:
            lines.extend([f"## {name}", "", "```text", command.get_help(context).rstrip(), "```", ""])

    add_command(typer.main.get_command(build_app()), "sca")
    return "\n".join(lines)


def render_cards() -> str:
    """Render the cards of all bundled components."""
    lines: list[str] = []
    for kind in COMPONENT_KINDS:
        lines += [f"## {kind.replace('_', ' ').capitalize()}", ""]
        lines += ["| name | summary | source | license |", "| --- | --- | --- | --- |"]
        for name in get_registry(kind).list_names():
            entry = get_registry(kind).load_entry(name)
            if entry.distribution == BUILTIN_DISTRIBUTION:
                cells = (f"`{name}`", entry.summary, entry.source, entry.license)
                lines.append(f"| {' | '.join((cell or '').replace('|', '/') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


def render_api() -> str:
    """Render the directives for the docstrings of the package's public names."""
    return "\n\n".join(
        f"::: {sca._LAZY_IMPORTS[name]}.{name}\n    options:\n      heading: sca.{name}\n      toc_label: sca.{name}"
        for name in sca.__all__
    )


def render_contracts() -> str:
    """Render the directive for the docstrings of the contracts."""
    return "::: sca_registry.contracts\n    options:\n      show_root_heading: false"


REFERENCES: dict[str, Callable[[], str]] = {
    "help": render_help,
    "cards": render_cards,
    "api": render_api,
    "contracts": render_contracts,
}
