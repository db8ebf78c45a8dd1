"""Write the table of plugins: `python tools/plugin_index.py [docs/plugin-index.md [docs/plugin-index.toml]]`."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sca_registry.contracts import COMPONENT_KINDS

from markers import write_between

START, END = "<!-- plugins -->", "<!-- /plugins -->"
FIELDS = ("summary", "license", "install")


def render_plugin_table(packages: Mapping[str, Mapping[str, Any]]) -> str:
    """Render the Markdown table of the packages, in their order.

    Raises:
        ValueError: A package lacks a field, or has one that is neither a field nor a kind of component.
    """
    rows = [["package", "summary", "components", "install", "license"], ["---"] * 5]
    for name, package in packages.items():
        _check_package(name, package)
        components = [
            f"{COMPONENT_KINDS[kind].singular.replace('_', ' ')} `{component}`"
            for kind in COMPONENT_KINDS
            for component in package.get(kind, ())
        ]
        install = f"`pip install {package['install']}`"
        rows.append([f"`{name}`", package["summary"], ", ".join(components), install, package["license"]])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _check_package(name: str, package: Mapping[str, Any]) -> None:
    if missing := [field for field in FIELDS if not package.get(field)]:
        raise ValueError(f"{name} has no {missing[0]!r}; add it")
    if unknown := [field for field in package if field not in (*FIELDS, *COMPONENT_KINDS)]:
        raise ValueError(f"{name}: unknown field {unknown[0]!r}; choose from {', '.join((*FIELDS, *COMPONENT_KINDS))}")
    if not any(package.get(kind) for kind in COMPONENT_KINDS):
        raise ValueError(f"{name} has no components; add their names by kind, such as mixers = ['hello']")


def main(page: str = "docs/plugin-index.md", index: str = "docs/plugin-index.toml") -> None:
    try:
        packages = tomllib.loads(Path(index).read_text("utf-8"))
        write_between(Path(page), START, END, render_plugin_table(packages))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
