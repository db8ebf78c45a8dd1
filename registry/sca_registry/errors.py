"""How a wrong name is answered: what was asked, what there is, what to do."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import catalogue


class RegistryError(catalogue.RegistryError):
    """A person's mistake about names, options or combinations, or a part that does not work; says what to do."""


def suggest_name(requested: str, names: Iterable[str]) -> str:
    """ " Did you mean 'query'?", or nothing when no name is close. Case, hyphens and underscores are forgiven."""
    import difflib  # only a mistake pays for it

    names_by_key = {_normalize_name(name): name for name in names}
    matches = difflib.get_close_matches(_normalize_name(requested), names_by_key, n=1)
    return f" Did you mean {names_by_key[matches[0]]!r}?" if matches else ""


def format_choices(names: Collection[str]) -> str:
    """ " There are: box, sam.", in the order given."""
    return f" There are: {', '.join(names)}." if names else " There are none."


def make_unknown_name_error(problem: str, requested: str, names: Iterable[str]) -> RegistryError:
    """An error that states the problem, the closest name and all the names there are."""
    names = list(names)
    return RegistryError(f"{problem}.{suggest_name(requested, names)}{format_choices(names)}")


def _normalize_name(name: str) -> str:
    return name.lower().replace("_", "-")
