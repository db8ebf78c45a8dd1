"""How a wrong name is answered: what was asked, what there is, what to do."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import catalogue


class RegistryError(catalogue.RegistryError):
    """A person's mistake about names, options or combinations, or a part that does not work; says what to do."""


def suggestion(asked: str, names: Iterable[str]) -> str:
    """ " Did you mean 'query'?", or nothing when no name is close. Case, hyphens and underscores are forgiven."""
    import difflib  # only a mistake pays for it

    plain = {_plain(name): name for name in names}
    close = difflib.get_close_matches(_plain(asked), plain, n=1)
    return f" Did you mean {plain[close[0]]!r}?" if close else ""


def choice(names: Collection[str]) -> str:
    """ " There are: box, sam.", in the order given."""
    return f" There are: {', '.join(names)}." if names else " There are none."


def unknown(problem: str, asked: str, names: Iterable[str]) -> RegistryError:
    """An error that states the problem, the closest name and all the names there are."""
    names = list(names)
    return RegistryError(f"{problem}.{suggestion(asked, names)}{choice(names)}")


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")
