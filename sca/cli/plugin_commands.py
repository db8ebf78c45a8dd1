"""Commands of `sca` that installed distributions add through the entry-point group `sca_commands`.

An entry point names a typer app or function, or a card file with the help line of each command. Nothing is imported
before a command is used, so that a broken one affects no other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import typer
from sca_registry.plugins import Registration, find_plugin_registrations
from typer.core import TyperCommand, TyperGroup

from sca.cli.options import defer_validation
from sca.hints import COMMAND_HINTS

COMMAND_GROUP = "sca_commands"
EVALUATION_PANEL = "Data, training and evaluation"
PLUGIN_PANEL = "Commands of plugins"
SHOW_COMPLETION_HELP = "Print the completion script of the current shell."  # typer's text is longer than a line


class PluginCommand(TyperCommand):
    """Help line of a command that is not imported yet."""


class CommandGroup(TyperGroup):
    """Commands of this package, followed by those of other distributions under other names."""

    def list_commands(self, ctx: Any) -> list[str]:
        self._add_plugins()
        return super().list_commands(ctx)

    def get_params(self, ctx: Any) -> list[Any]:
        parameters: list[Any] = super().get_params(ctx)
        for parameter in parameters:
            if parameter.name == "show_completion":
                parameter.help = SHOW_COMPLETION_HELP
        defer_validation(parameters)
        return parameters

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """List the commands of each panel in a section of its own, in plain text."""
        sections: dict[str, list[tuple[str, Any]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            sections.setdefault(command.rich_help_panel, []).append((name, command))
        name_width = max(map(len, self.commands))
        for title, commands in sections.items():
            with formatter.section(title):
                formatter.write_dl(
                    [
                        (name.ljust(name_width), command.get_short_help_str(formatter.width - name_width - 6))
                        for name, command in commands
                    ]
                )

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        if args and args[0] not in self.commands:
            self._add_plugins()  # also for "Did you mean"
            if args[0] not in self.commands and args[0] in COMMAND_HINTS:
                ctx.fail(f"No such command {args[0]!r}; use {COMMAND_HINTS[args[0]]}.")
        name, command, remaining_args = super().resolve_command(ctx, args)
        if isinstance(command, PluginCommand) and name is not None:
            command = load_plugin_command(name)
        return name, command, remaining_args

    def _add_plugins(self) -> None:
        for name, registrations in find_plugin_commands().items():
            if name not in self.commands:
                self.commands[name] = PluginCommand(
                    name,
                    help=find_command_problem(name, registrations) or registrations[0].card.summary,
                    rich_help_panel=EVALUATION_PANEL if registrations[0].is_builtin else PLUGIN_PANEL,
                )


def find_plugin_commands() -> Mapping[str, Sequence[Registration]]:
    """Find the registrations of each command, sorted by name; several if distributions clash. Nothing is imported."""
    registrations_by_name: dict[str, list[Registration]] = {}
    for registration in find_plugin_registrations(COMMAND_GROUP):
        registrations_by_name.setdefault(registration.card.name, []).append(registration)
    return dict(sorted(registrations_by_name.items()))


def find_command_problem(name: str, registrations: Sequence[Registration]) -> str:
    """Return why a command cannot be used, as far as its metadata show, or ""."""
    if len(registrations) > 1:
        origins = " and ".join(str(each.origin) for each in registrations)
        return f"the command {name!r} is provided by {origins}; uninstall one"
    (registration,) = registrations
    return (
        f"the command {name!r} of {registration.origin} cannot be used: {registration.problem}"
        if registration.problem
        else ""
    )


def load_plugin_command(name: str) -> Any:
    """Import a command of another distribution.

    Args:
        name: Name of the command.

    Returns:
        The Typer command or group.

    Raises:
        ValueError: The command cannot be used or imported; the message names the distribution.
    """
    registrations = find_plugin_commands()[name]
    if problem := find_command_problem(name, registrations):
        raise ValueError(problem)
    (registration,) = registrations
    module, _, attribute = registration.card.factory.partition(":")
    try:
        command = getattr(import_module(module), attribute)
        return _make_command(name, command)
    except (Exception, SystemExit) as error:  # third-party code may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"the command {name!r} of {registration.origin} cannot be loaded: {reason}; update it"
        ) from error


def _make_command(name: str, command: typer.Typer | Callable[..., Any]) -> Any:
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=name)
        group: Any = typer.main.get_command(app)
        return group.commands[name]
    if not callable(command):
        raise TypeError(f"{type(command).__name__} is not a typer app or a function")
    app.command(name)(command)
    return typer.main.get_command(app)
