"""Commands of `sca` that installed distributions add through the entry-point group `sca_commands`.

An entry point names a typer app or function, or a card file with the help line of each command. Nothing is imported
before a command is used, so that a broken one affects no other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import typer
from sca_registry.plugins import Offer, find_plugin_offers
from typer.core import TyperCommand, TyperGroup

COMMAND_GROUP = "sca_commands"


class PluginCommand(TyperCommand):
    """Help line of a command that is not imported yet."""


class CommandGroup(TyperGroup):
    """Commands of this package, followed by those of other distributions under other names."""

    def list_commands(self, ctx: Any) -> list[str]:
        self._add_plugins()
        return super().list_commands(ctx)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        if args and args[0] not in self.commands:
            self._add_plugins()  # also for "Did you mean"
        name, command, remaining_args = super().resolve_command(ctx, args)
        return name, load_plugin_command(name) if isinstance(command, PluginCommand) else command, remaining_args

    def _add_plugins(self) -> None:
        for name, offers in find_plugin_commands().items():
            if name not in self.commands:
                self.commands[name] = PluginCommand(
                    name, help=find_command_problem(name, offers) or offers[0].card.summary
                )


def find_plugin_commands() -> Mapping[str, Sequence[Offer]]:
    """Find the offers of each command, sorted by name; several if distributions clash. Nothing is imported."""
    offers_by_name: dict[str, list[Offer]] = {}
    for offer in find_plugin_offers(COMMAND_GROUP):
        offers_by_name.setdefault(offer.card.name, []).append(offer)
    return dict(sorted(offers_by_name.items()))


def find_command_problem(name: str, offers: Sequence[Offer]) -> str:
    """Return why a command cannot be used, as far as its metadata show, or ""."""
    if len(offers) > 1:
        return f"the command {name!r} is offered by {' and '.join(str(each.origin) for each in offers)}; uninstall one"
    (offer,) = offers
    return f"the command {name!r} of {offer.origin} cannot be used: {offer.problem}" if offer.problem else ""


def load_plugin_command(name: str) -> Any:
    """Import a command of another distribution.

    Args:
        name: Name of the command.

    Returns:
        The Typer command or group.

    Raises:
        ValueError: The command cannot be used or imported; the message names the distribution.
    """
    offers = find_plugin_commands()[name]
    if problem := find_command_problem(name, offers):
        raise ValueError(problem)
    (offer,) = offers
    module, _, attribute = offer.card.factory.partition(":")
    try:
        command = getattr(import_module(module), attribute)
        return _make_command(name, command)
    except (Exception, SystemExit) as error:  # third-party code may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"the command {name!r} of {offer.origin} cannot be loaded: {reason}; update it") from error


def _make_command(name: str, command: typer.Typer | Callable[..., Any]) -> Any:
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=name)
        return typer.main.get_command(app).commands[name]
    if not callable(command):
        raise TypeError(f"{type(command).__name__} is not a typer app or a function")
    app.command(name)(command)
    return typer.main.get_command(app)
