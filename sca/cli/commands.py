"""Commands of `sca` that installed distributions add through the entry-point group `sca_commands`.

An entry point names a typer app or a function, or a card file with the help line of each. Nothing is imported before a
command is used, so that a broken one affects no other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import typer
from sca_registry.plugins import Offer, plugin_offers
from typer.core import TyperCommand, TyperGroup

GROUP = "sca_commands"


class PluginCommand(TyperCommand):
    """The help line of a command that is not imported yet."""


class CommandGroup(TyperGroup):
    """The commands of this package, and after them those of other distributions under other names."""

    def list_commands(self, ctx: Any) -> list[str]:
        self._add_plugins()
        return super().list_commands(ctx)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        if args and args[0] not in self.commands:
            self._add_plugins()  # also for "Did you mean"
        name, command, rest = super().resolve_command(ctx, args)
        return name, load_command(name) if isinstance(command, PluginCommand) else command, rest

    def _add_plugins(self) -> None:
        for name, offers in find_commands().items():
            if name not in self.commands:
                self.commands[name] = PluginCommand(name, help=find_problem(name, offers) or offers[0].card.summary)


def find_commands() -> Mapping[str, Sequence[Offer]]:
    """Find the offers of each command, sorted by name; several if distributions clash. Nothing is imported."""
    found: dict[str, list[Offer]] = {}
    for offer in plugin_offers(GROUP):
        found.setdefault(offer.card.name, []).append(offer)
    return dict(sorted(found.items()))


def find_problem(name: str, offers: Sequence[Offer]) -> str:
    """Return why a command cannot be used, as far as metadata show it, or ""."""
    if len(offers) > 1:
        return f"the command {name!r} is offered by {' and '.join(str(each.origin) for each in offers)}; uninstall one"
    (offer,) = offers
    return f"the command {name!r} of {offer.origin} cannot be used: {offer.fault}" if offer.fault else ""


def load_command(name: str) -> Any:
    """Import a command of another distribution.

    Raises:
        ValueError: It cannot be used or imported; one line with the distribution.
    """
    offers = find_commands()[name]
    if problem := find_problem(name, offers):
        raise ValueError(problem)
    (offer,) = offers
    module, _, attribute = offer.card.factory.partition(":")
    try:
        found = getattr(import_module(module), attribute)
        return _make_command(name, found)
    except (Exception, SystemExit) as error:  # other people's code may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"the command {name!r} of {offer.origin} cannot be loaded: {reason}; update it") from error


def _make_command(name: str, found: typer.Typer | Callable[..., Any]) -> Any:
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    if isinstance(found, typer.Typer):
        app.add_typer(found, name=name)
        return typer.main.get_command(app).commands[name]
    if not callable(found):
        raise TypeError(f"{type(found).__name__} is not a typer app or a function")
    app.command(name)(found)
    return typer.main.get_command(app)
