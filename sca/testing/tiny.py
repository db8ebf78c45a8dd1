"""Tiny components with random weights for conformance checks and tests."""

from __future__ import annotations

import functools
import tomllib
from importlib.resources import files
from typing import Any

from sca_registry import get_registry
from sca_registry.contracts import COMPONENT_KINDS
from sca_registry.plugins import BUILTIN_DISTRIBUTION


def get_tiny_options(kind: str, name: str) -> dict[str, Any]:
    """Return the options that make a component tiny.

    Args:
        kind: Kind of the component, singular or plural.
        name: Registered name. The options of built-in components are in `tiny.toml`, those of others in their cards
            (`tiny_options`).

    Returns:
        Options; empty if there are none.

    Raises:
        RegistryError: The kind or the name is unknown.
    """
    registry = get_registry(kind)
    builtin = _read_builtin_options()[registry.kind.plural].get(name.removeprefix(f"{BUILTIN_DISTRIBUTION}:"), {})
    return {**builtin, **registry.get_card(name).tiny_options}


@functools.cache
def _read_builtin_options() -> dict[str, dict[str, dict[str, Any]]]:
    """Return the content of `tiny.toml` by kind and name."""
    options: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in COMPONENT_KINDS}
    for kind, groups in tomllib.loads((files("sca.testing") / "tiny.toml").read_text("utf-8")).items():
        for group in groups:
            for name in group["names"]:
                options[kind].setdefault(name, {}).update(group["options"])
    return options
