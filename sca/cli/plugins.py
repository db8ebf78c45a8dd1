"""`sca check`, `sca doctor` and `sca plugin`: other people's parts, and one's own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sca.cli.options import read_options

if TYPE_CHECKING:
    from sca.conformance import Finding

app = typer.Typer(help="Plugin packages.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Plugin packages."""


@app.command()
def new(
    kind: Annotated[str, typer.Argument(help="encoder, mixer, dataset, ...")],
    name: Annotated[str, typer.Argument(help="of the part, as it will be asked for")],
    folder: Annotated[Path | None, typer.Option(help="a new or empty folder (default: sca-NAME)")] = None,
) -> None:
    """Writes a package with one part, which installs and passes its tests as it is."""
    from sca.scaffold import scaffold

    made = scaffold(kind, name, folder)
    typer.echo(f"wrote {made}; next: cd {made} && pip install -e . && sca check {kind} {name}")


def check(
    kind: Annotated[str, typer.Argument(help="singular or plural: mixer, encoders, ...")],
    name: Annotated[str, typer.Argument()],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value]...", help="options of the part, besides the card's `small`"),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="only what failed")] = False,
) -> None:
    """Tries a part against every promise of its kind, on small tensors; what fails says what was expected.

    Exit status 1 if a promise is broken.
    """
    from sca_registry import registry
    from sca_registry.plugins import BUILTIN

    from sca.conformance import check as try_out

    parts = registry(kind)
    given = {**parts.card(name).small, **read_options(options or ())}
    findings = try_out(kind, name, **given)
    broken = sum(not finding.passed for finding in findings)
    for finding in findings:
        if not (quiet and finding.passed):
            typer.echo(str(finding))
    typer.echo(f"{len(findings) - broken} of {len(findings)} promises kept")
    if not options and parts.describe(name).distribution != BUILTIN:
        parts.judge(name, _told(kind, name, findings))
    raise typer.Exit(1 if broken else 0)


def doctor(
    timeout: Annotated[float, typer.Option(help="seconds that a part of a plugin has to be tried in", min=0.1)] = 60.0,
) -> None:
    """What is installed, whether it works, and the line that repairs what does not.

    Every part of a plugin is tried in a process of its own, as `sca check` does. Exit status 1 if something is broken.
    """
    from concurrent.futures import ThreadPoolExecutor

    from sca_registry import REGISTRIES
    from sca_registry.plugins import BUILTIN

    for name, value in _machine():
        typer.echo(f"{name + ':':<17}{value}")
    entries = [(parts, entry) for parts in REGISTRIES.values() for entry in parts.entries()]
    foreign = [
        (parts, entry)
        for parts, entry in entries
        if entry.distribution != BUILTIN and entry.name in parts and not entry.state.startswith("needs extra")
    ]
    with ThreadPoolExecutor(os.cpu_count()) as together:
        problems = list(together.map(lambda each: _try(each[1].kind, each[1].name, timeout), foreign))
    judged = [parts.judge(entry.name, problem) for (parts, entry), problem in zip(foreign, problems, strict=True)]
    tried = {(entry.kind, entry.name): entry for entry in judged}
    found: dict[str, list[Any]] = {}
    for _, entry in entries:
        told = tried.get((entry.kind, entry.name), entry)
        found.setdefault(f"{told.distribution} {told.version}".strip(), []).append(told)
    repairs, broken = [], False
    for distribution, listed in found.items():
        typer.echo(f"\n{distribution}")
        fine = [entry for entry in listed if distribution.startswith(BUILTIN) and entry.state == "ok"]
        for kind, count in Counter(entry.kind for entry in fine).items():
            typer.echo(f"  {f'{count} of kind {kind}':<34}ok")
        for entry in (entry for entry in listed if entry not in fine):
            reason = f": {entry.reason}" if entry.reason else ""
            typer.echo(f"  {entry.kind + ' ' + entry.name:<34}{entry.state}{reason}")
        if any(entry.state == "broken" for entry in listed):
            broken = True
            name = listed[0].distribution
            repairs.append(f"pip install -U {name}, or pip uninstall {name}")
        repairs += [entry.reason for entry in listed if entry.state.startswith("needs extra")]
    if repairs:
        typer.echo("\nto repair:")
        for line in dict.fromkeys(repairs):
            typer.echo(f"  {line}")
    raise typer.Exit(1 if broken else 0)


def _try(kind: str, name: str, timeout: float) -> str:
    """What is wrong with a part, tried in a process of its own; "" if nothing is."""
    program = "import sys; from sca.cli.plugins import trial; sys.exit(trial(*sys.argv[1:]))"
    command = [sys.executable, "-c", program, kind, name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"it takes more than {timeout:g} s to be imported and tried"
    if not done.returncode:
        return ""
    said = done.stderr.strip().splitlines()
    return said[-1] if said else f"Python ended with status {done.returncode}"


def trial(kind: str, name: str) -> str | None:
    """What is wrong with a part, None if nothing is. One that cannot be built from its card alone is only imported."""
    from sca_registry import RegistryError, registry
    from sca_registry.options import REQUIRED

    from sca.conformance import check as try_out

    parts = registry(kind)
    small = parts.card(name).small
    try:
        parts.get(name)
    except RegistryError as error:
        return str(error)
    options = parts.describe(name).options
    if not small and (REQUIRED in options.values() or options.get("weights")):
        return None
    return _told(kind, name, try_out(kind, name, **small)) or None


def _told(kind: str, name: str, findings: list[Finding]) -> str:
    """The promises that are broken, in a line; "" if there are none."""
    from sca_registry.states import BREAKS

    broken = [finding for finding in findings if not finding.passed]
    names = ", ".join(finding.check for finding in broken)
    return f"{BREAKS} ({names}). {broken[0].found} `sca check {kind} {name}` tells more" if broken else ""


def _machine() -> list[tuple[str, str]]:
    """Python, the packages that all stands on, and what there is to compute on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    rows = [("python", f"{platform.python_version()} on {platform.platform()}")]
    for package in ("torch", "transformers", "peft", "huggingface_hub", "torchvision", "open_clip_torch", "timm"):
        try:
            rows.append((package, version(package)))
        except PackageNotFoundError:
            rows.append((package, "not installed"))
    import torch

    devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    rows.append(("devices", ", ".join(["cpu", *devices])))
    return rows
