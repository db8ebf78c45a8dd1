"""Command-line interface: a thin layer over the library that starts fast and reports each mistake in one line.

Exit status: 0 for success, 1 if some images failed, 2 for a user's mistake, 130 if interrupted with finished work kept.
Commands import their dependencies when they run. Listing and help never import torch.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from sca.allocator import keep_freed_memory
from sca.cli.options import PanelCommand, print_line, print_stderr
from sca.cli.plugin_commands import EVALUATION_PANEL, CommandGroup, find_plugin_commands
from sca.io.errors import DifferentRunError
from sca.io.terminal import guard_terminal
from sca.io.text import describe_error
from sca.torchvision_fix import find_torchvision_error

if TYPE_CHECKING:
    import io

# by the panel of `sca --help`: name -> function or typer app, in a module of this package
COMMANDS: dict[str, dict[str, str]] = {
    "Caption and serve": {
        "caption": "caption:caption",
        "find": "find:find",
        "demo": "demo:demo",
        "serve": "serve:serve",
        "convert": "convert:convert",
        "view": "convert:view",
    },
    EVALUATION_PANEL: {
        "data": "data:app",
        "train": "train:train",
        "evaluate": "evaluate:evaluate",
        "score": "evaluate:score",
        "compare": "compare:compare",
        "calibrate": "calibrate:calibrate",
        "report": "compare:report",
    },
    "Models and checkpoints": {
        "list": "listing:list_names",
        "show": "listing:show",
        "plan": "plan:plan",
        "pull": "checkpoints:pull",
        "push": "checkpoints:push",
        "import": "checkpoints:import_",
        "export": "checkpoints:export",
    },
    "Plugins and diagnostics": {"plugin": "plugins:app", "check": "plugins:check", "doctor": "plugins:doctor"},
}
COMMAND_NAMES: frozenset[str] = frozenset(name for commands in COMMANDS.values() for name in commands)
COMPLETION_VARIABLE = "_SCA_COMPLETE"  # set by the shell that requests completions
# Loggers of warnings about GPU kernels when torchao is imported; transformers imports it if it is installed.
IMPORT_LOGGERS = ("torchao", "torch.utils._pytree")
# Shells do not expand ~ in --out=~/x, and programs that call this one expand it in no argument.
HOME_PATTERN = re.compile(r"^(--[\w-]+=|)(~(?=/|$))")
UsageError: Any = typer.BadParameter.__base__
OPTION_HINTS = {  # options of transformers, peft and SAM -> what to use here
    "--num-return-sequences": "Use --num-captions.",
    "--max-length": "Use --max-new-tokens.",
    "--limit": "Use --max-images.",
    "--lora-r": "Set the rank with lora=8.",
    "--lora-rank": "Set the rank with lora=8.",
    "--lora": "Set the rank with lora=8.",
    "--multimask-output": "Masks without captions come from Predictor.segment in Python.",
    "--output-dir": "Use --out.",
    "--repo-id": "Give the repository as the second argument: sca push FOLDER OWNER/NAME.",
    "--max-request-size": "Use --max-body-mb.",
    "--limit-request-size": "Use --max-body-mb.",
}


def build_app(names: Collection[str] = COMMAND_NAMES) -> typer.Typer:
    """Build the command-line interface.

    Args:
        names: Commands to import and add.

    Returns:
        The typer app.
    """
    app = typer.Typer(
        name="sca",
        cls=CommandGroup,
        help="Segment and caption regions of images with interchangeable components.",
        no_args_is_help=True,
        rich_markup_mode=None,
        callback=_define_app_options,
    )
    for panel, commands in COMMANDS.items():
        for name, location in commands.items():
            if name in names:
                module, _, attribute = location.partition(":")
                command = getattr(import_module(f"sca.cli.{module}"), attribute)
                if isinstance(command, typer.Typer):
                    app.add_typer(command, name=name, rich_help_panel=panel)
                else:
                    app.command(name, cls=PanelCommand, rich_help_panel=panel)(command)
    return app


def _print_version(is_requested: bool) -> None:
    """Print the version and exit."""
    if is_requested:
        from sca_registry.plugins import get_builtin_origin

        print_line(f"sca {get_builtin_origin().version}")
        raise typer.Exit()


def _define_app_options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run one command, or complete one for the shell, and exit with its status."""
    guard_terminal()
    if COMPLETION_VARIABLE in os.environ:
        typer.main.get_command(build_app()).main(prog_name="sca")
    if sys.stdout:
        # characters that the terminal cannot encode are escaped
        cast("io.TextIOWrapper", sys.stdout).reconfigure(errors="backslashreplace")
    keep_freed_memory()
    for name in IMPORT_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Run one command and return its exit status.

    A ValueError (a user's mistake) and an OSError (a file that cannot be read or written) are reported in one line. So
    is the error of a broken torchvision, which any command may import. Other exceptions are defects and keep their
    traceback, unless they follow an interrupt. Under `python -X dev`, all exceptions do.
    """
    with _record_interrupts() as interrupts:
        return _run_command(arguments, interrupts)


@contextmanager
def _record_interrupts() -> Iterator[list[int]]:
    """Yield a list that receives every SIGINT, which still raises KeyboardInterrupt.

    Libraries may replace this exception by one of theirs: NumPy does, if the signal arrives in the conversion of an
    array whose `__array__` has no `copy`, as in `pycocotools.mask.decode`.
    """
    interrupts: list[int] = []

    def handle_interrupt(signal_number: int, frame: FrameType | None) -> None:
        interrupts.append(signal_number)
        signal.default_int_handler(signal_number, frame)

    is_main_thread = threading.current_thread() is threading.main_thread()
    if not is_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interrupts
        return
    signal.signal(signal.SIGINT, handle_interrupt)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _run_command(arguments: list[str], interrupts: list[int]) -> int:
    arguments = [HOME_PATTERN.sub(lambda match: match[1] + os.path.expanduser(match[2]), each) for each in arguments]
    try:
        command = typer.main.get_command(build_app(_choose_commands(arguments)))
        with command.make_context("sca", list(arguments)) as context:
            command.invoke(context)
        return 0
    except typer.Exit as exit_request:
        return exit_request.exit_code
    except UsageError as error:
        return _report_usage_error(error)
    except KeyboardInterrupt:
        return _report_interrupt()
    except BrokenPipeError:  # the reader closed the pipe
        return 0
    except Exception as error:
        if interrupts and not sys.flags.dev_mode:
            return _report_interrupt()
        torchvision_error = find_torchvision_error(error)
        if sys.flags.dev_mode or not (torchvision_error or isinstance(error, (ValueError, OSError))):
            raise
        remedy = " (--overwrite)" if isinstance(error, DifferentRunError) else ""
        print_stderr(
            f"torchvision cannot be imported ({describe_error(torchvision_error)}); run `sca doctor`"
            if torchvision_error
            else f"{describe_error(error)}{remedy}"
        )
        return 2


def _choose_commands(arguments: Sequence[str]) -> Collection[str]:
    """Return the built-in command that is run, none for a plugin's, or all for help and unknown names."""
    name = arguments[0] if arguments else ""
    if name in COMMAND_NAMES:
        return [name]
    return [] if name == "--version" or name in find_plugin_commands() else COMMAND_NAMES


def _report_interrupt() -> int:
    print_stderr("interrupted; finished results are kept")
    return 130


def _get_replacement(error: Any) -> str:
    """Return what replaces an option of another package, or an option that is a key of the recipe; "" if unknown."""
    if error.option_name in OPTION_HINTS:
        return OPTION_HINTS[error.option_name]
    if error.ctx and error.ctx.info_name == "train":
        from sca.training.recipe import RECIPE_KEYS

        if key := RECIPE_KEYS.get(error.option_name.lstrip("-").replace("-", "_")):
            return f"Use {key}=VALUE after the recipe: sca train own-data model=NAME data=FOLDER train.steps=100."
    return ""


def _get_option_hint(error: Any) -> str:
    """Return how to set the value of an unknown option, with a leading space; "" if unknown."""
    if replacement := _get_replacement(error):
        error.possibilities = None  # options of similar names, for other purposes
        return f" {replacement}"
    parameters = error.ctx.command.params if error.ctx else []
    takes_assignments = any("KEY=VALUE" in (parameter.metavar or "") for parameter in parameters)
    return " Settings other than options are key=value arguments, without dashes." if takes_assignments else ""


def _report_usage_error(error: Any) -> int:
    command = error.ctx.command_path if error.ctx else "sca"
    option_hint = _get_option_hint(error) if hasattr(error, "option_name") else ""
    message = error.format_message()
    if hasattr(error, "option_name"):
        message = f"{message.rstrip('.')}.{option_hint}"
    if message.startswith("Usage:"):  # no command
        typer.echo(message, err=True)
    else:
        print_stderr(f"{message} See: {command} --help")
    return 2
