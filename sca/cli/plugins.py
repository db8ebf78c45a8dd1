"""`sca check`, `sca doctor` and `sca plugin`: check and create components."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from sca.cli.options import PanelCommand, parse_component_options, print_line, print_stderr
from sca.io.errors import InputError

if TYPE_CHECKING:
    from sca_registry.registry import RegistryEntry

app: typer.Typer = typer.Typer(help="Create plugin packages.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _show_plugin_help() -> None:
    """Create plugin packages."""


@app.command(cls=PanelCommand)
def new(
    kind: Annotated[str, typer.Argument(help="Kind of component, such as encoder, mixer or dataset.")],
    name: Annotated[str, typer.Argument(help="Name of the new component.")],
    out: Annotated[
        Path | None,
        typer.Option(help="New or empty folder for the package. Defaults to sca-NAME.", rich_help_panel="Output"),
    ] = None,
) -> None:
    """Create a plugin package with one component."""
    from sca.testing.scaffold import write_plugin_package

    package_folder = write_plugin_package(kind, name, out)
    print_line(f"wrote {package_folder}; next: cd {package_folder} && pip install -e . && sca check {kind} {name}")


def check(
    kind: Annotated[str, typer.Argument(help="Kind of component, singular or plural, such as mixer or encoders.")],
    name: Annotated[str, typer.Argument(help="Name of the component.")],
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Component options, in addition to those that the checks use to build a small instance.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Compare with the same model of another library instead: LIBRARY:MODEL, such as transformers:SamModel "
            "or timm:resnet50.",
            rich_help_panel="Comparison",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only failed checks.", rich_help_panel="Output")] = False,
) -> None:
    """Check a component, or compare it with another library.

    With --against, both load the same random weights. Exits with status 1 if a check or a comparison fails.
    """
    if against is not None:
        _compare_with_library(kind, name, options or (), against, quiet)
    from sca.testing.conformance import check_component
    from sca.testing.tiny import get_tiny_options

    component_options = {**get_tiny_options(kind, name), **parse_component_options(kind, name, options or ())}
    results = check_component(kind, name, **component_options)
    num_failed = sum(not result.passed for result in results)
    for result in results:
        if not (quiet and result.passed):
            print_line(str(result))
    print_line(f"{len(results) - num_failed} of {len(results)} checks passed")
    raise typer.Exit(1 if num_failed else 0)


def _compare_with_library(kind: str, name: str, options: Sequence[str], against: str, quiet: bool) -> NoReturn:
    """Compare a component with a model of another library, print the results and exit."""
    from sca.testing.parity import check_parity, format_results, get_option_kind

    component_options = parse_component_options(get_option_kind(kind, name), name, options)
    results = check_parity(kind, name, against, **component_options)
    num_passed = sum(result.passed for result in results)
    for line in format_results([result for result in results if not (quiet and result.passed)]):
        print_line(line)
    print_line(f"{num_passed} of {len(results)} comparisons passed")
    raise typer.Exit(0 if num_passed == len(results) else 1)


def doctor(
    distribution: Annotated[
        str,
        typer.Argument(
            metavar="PACKAGE", help="Check only this package. Defaults to all packages.", show_default=False
        ),
    ] = "",
    timeout: Annotated[
        float, typer.Option(help="Time limit in seconds per plugin component.", min=0.1, rich_help_panel="Runtime")
    ] = 60.0,
    fix: Annotated[
        bool,
        typer.Option(
            "--fix",
            help="Make a CUDA build of torchvision importable with a CPU build of torch.",
            rich_help_panel="Fix",
        ),
    ] = False,
    undo_fix: Annotated[bool, typer.Option("--undo-fix", help="Undo --fix.", rich_help_panel="Fix")] = False,
) -> None:
    """Check the installation and suggest fixes.

    Imports every built-in component, and runs `sca check` on each plugin component in its own process. If torchvision
    cannot be imported, the other checks are skipped. Exits with status 1 if something is broken.
    """
    from sca_registry import REGISTRIES

    from sca import torchvision_fix

    if fix and undo_fix:
        raise ValueError("--fix and --undo-fix are mutually exclusive; pass only one")
    if fix or undo_fix:
        try:
            print_line(torchvision_fix.fix_torchvision() if fix else torchvision_fix.remove_torchvision_fix())
        except InputError as error:
            print_stderr(str(error))
            raise typer.Exit(1) from error
        return

    from sca.testing.subprocess_checks import check_components

    for name, value in _collect_environment():
        print_line(f"{name + ':':<17}{value}")
    if problem := torchvision_fix.diagnose_torchvision():
        _print_section("to fix:", [problem, "then run `sca doctor` again; no component was checked"])
        raise typer.Exit(1)
    entries = [entry for registry in REGISTRIES.values() for entry in registry.list_entries()]
    entries = [entry for entry in entries if distribution in ("", entry.distribution)]
    if not entries:
        raise ValueError(f"no package {distribution!r} with components; run `sca list --long` to see all packages")
    entries = check_components(entries, timeout)
    _print_packages(entries)
    broken_distributions = dict.fromkeys(entry.distribution for entry in entries if entry.state == "broken")
    repairs = [*map(_suggest_repair, broken_distributions), *_find_command_problems(), *_find_unknown_groups()]
    missing_extras = Counter(entry.reason for entry in entries if entry.state.startswith("needs extra"))
    _print_section("to fix:", dict.fromkeys(repairs))
    _print_section("for more components:", [f"{line}  ({count} components)" for line, count in missing_extras.items()])
    raise typer.Exit(1 if repairs else 0)


def _print_packages(entries: Sequence[RegistryEntry]) -> None:
    """Print each package with the states of its components; for built-in components that are ok, only their count."""
    from sca_registry.plugins import BUILTIN_DISTRIBUTION

    packages: dict[str, list[RegistryEntry]] = {}
    for entry in entries:
        packages.setdefault(f"{entry.distribution} {entry.version}".strip(), []).append(entry)
    for package, package_entries in packages.items():
        print_line("")
        print_line(package)
        working_entries = [
            entry for entry in package_entries if entry.distribution == BUILTIN_DISTRIBUTION and entry.state == "ok"
        ]
        for kind, count in Counter(entry.kind for entry in working_entries).items():
            print_line(f"  {f'{count} of kind {kind}':<34}ok")
        for entry in package_entries:
            if entry not in working_entries and not entry.state.startswith("needs extra"):
                reason = f": {entry.reason}" if entry.reason else ""
                print_line(f"  {entry.kind + ' ' + entry.name:<34}{entry.state}{reason}")


def _print_section(title: str, lines: Collection[str]) -> None:
    if lines:
        print_line("")
        print_line(title)
    for line in lines:
        print_line(f"  {line}")


def _suggest_repair(distribution: str) -> str:
    """Return the command that repairs a package, or the path of its source if it was installed from a folder."""
    from importlib import metadata

    from sca_registry.plugins import BUILTIN_DISTRIBUTION

    if distribution == BUILTIN_DISTRIBUTION:
        return "pip install --force-reinstall -c constraints.txt PACKAGE, for each package that the errors above name"
    try:
        source_url = json.loads(metadata.distribution(distribution).read_text("direct_url.json") or "{}").get("url", "")
    except (ModuleNotFoundError, ValueError):
        source_url = ""
    if source_url.startswith("file:"):
        return f"correct {distribution} in {source_url.removeprefix('file://')}, and install it again"
    return f"pip install -U {distribution}, or pip uninstall {distribution}"


def _find_unknown_groups() -> list[str]:
    """Return entry-point groups that seem meant for this package but are not read by it."""
    from importlib.metadata import distributions

    from sca_registry.contracts import COMPONENT_KINDS
    from sca_registry.errors import suggest_name

    from sca.cli.plugin_commands import COMMAND_GROUP

    known_groups = {f"sca_{kind}" for kind in COMPONENT_KINDS} | {"sca_api", COMMAND_GROUP}
    return [
        f"{distribution.metadata['Name']}: unknown entry-point group {entry_point.group!r}."
        f"{suggest_name(entry_point.group, known_groups)}"
        for distribution in distributions()
        for entry_point in distribution.entry_points
        if entry_point.group.startswith("sca_") and entry_point.group not in known_groups
    ]


def _find_command_problems() -> list[str]:
    """Return the problems of plugin commands that cannot be used; nothing is imported."""
    from sca.cli import COMMAND_NAMES
    from sca.cli.plugin_commands import find_command_problem, find_plugin_commands

    problems = []
    for name, registrations in find_plugin_commands().items():
        if name in COMMAND_NAMES:
            problems += [
                f"{each.origin}: the command {name!r} is built in; rename the command of the plugin"
                for each in registrations
            ]
        elif problem := find_command_problem(name, registrations):
            problems.append(problem)
    return problems


def _collect_environment() -> list[tuple[str, str]]:
    """Return the versions of Python and the main packages, and the available compute devices."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    rows = [("python", f"{platform.python_version()} on {platform.platform()}")]
    for package in ("torch", "transformers", "peft", "huggingface_hub", "torchvision", "open_clip_torch", "timm"):
        try:
            rows.append((package, version(package)))
        except PackageNotFoundError:
            rows.append((package, "not installed"))
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    rows.append(("devices", ", ".join(["cpu", *devices])))
    return rows
