"""Errors for unknown names, with suggestions."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import catalogue


class RegistryError(catalogue.RegistryError):
    """Invalid name, option or combination of components, or a component that fails. The message contains the fix."""


def suggest_name(requested: str, names: Iterable[str]) -> str:
    """Suggest the closest name, ignoring case and treating underscores as hyphens.

    Args:
        requested: The unknown name.
        names: All valid names.

    Returns:
        A sentence with a leading space, such as " Did you mean 'query'?"; "" if no name is close.
    """
    import difflib  # imported here because it is slow and only errors need it

    names_by_key = {_normalize_name(name): name for name in names}
    matches = difflib.get_close_matches(_normalize_name(requested), names_by_key, n=1)
    return f" Did you mean {names_by_key[matches[0]]!r}?" if matches else ""


def format_choices(names: Collection[str]) -> str:
    """Format names as a sentence with a leading space, such as " Choose from: box, sam.", in their order."""
    return f" Choose from: {', '.join(names)}." if names else " None are available."


def make_unknown_name_error(problem: str, requested: str, names: Iterable[str]) -> RegistryError:
    """Return an error with the problem, the closest name and all valid names.

    Args:
        problem: Start of the message, without a period.
        requested: The unknown name.
        names: All valid names.

    Returns:
        The error, to be raised by the caller.
    """
    names = list(names)
    return RegistryError(f"{problem}.{suggest_name(requested, names)}{format_choices(names)}")


def _normalize_name(name: str) -> str:
    return name.lower().replace("_", "-")
