"""`sca check`, `sca doctor` and `sca plugin`: other people's parts, and one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sca.cli.options import complain, read_options

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

    from sca.conformance import check as try_out

    given = {**registry(kind).card(name).small, **read_options(options or ())}
    findings = try_out(kind, name, **given)
    broken = sum(not finding.passed for finding in findings)
    for finding in findings:
        if not (quiet and finding.passed):
            typer.echo(str(finding))
    typer.echo(f"{len(findings) - broken} of {len(findings)} promises kept")
    raise typer.Exit(1 if broken else 0)


def doctor(
    timeout: Annotated[float, typer.Option(help="seconds that a plugin has for its import", min=0.1)] = 20.0,
) -> None:
    """What is installed, whether it works, and the line that repairs what does not.

    Every part of a plugin is imported in a process of its own. Exit status 1 if something is broken.
    """
    from sca_registry import REGISTRIES
    from sca_registry.plugins import BUILTIN

    for name, value in _machine():
        typer.echo(f"{name + ':':<14}{value}")
    found: dict[str, list[Any]] = {}
    for parts in REGISTRIES.values():
        for entry in parts.entries():
            if entry.distribution != BUILTIN and entry.state == "unchecked":
                entry = parts.examine(entry.name, timeout)
            found.setdefault(f"{entry.distribution} {entry.version}".strip(), []).append(entry)
    broken = 0
    for distribution, entries in found.items():
        typer.echo(f"\n{distribution}")
        for entry in entries:
            broken += entry.state == "broken"
            reason = f": {entry.reason}" if entry.reason else ""
            typer.echo(f"  {entry.kind + ' ' + entry.name:<34}{entry.state}{reason}")
    if broken:
        complain(f"{broken} broken; try: pip install -U DISTRIBUTION, or take it away: pip uninstall DISTRIBUTION")
    raise typer.Exit(1 if broken else 0)


def _machine() -> list[tuple[str, str]]:
    """Python, the packages that all stands on, and what there is to compute on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    rows = [("python", f"{platform.python_version()} on {platform.platform()}")]
    for package in ("segment-caption-anything", "torch", "transformers", "peft", "huggingface_hub"):
        try:
            rows.append((package.partition("-")[0] if package.startswith("segment") else package, version(package)))
        except PackageNotFoundError:
            rows.append((package, "not installed"))
    import torch

    devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    rows.append(("devices", ", ".join(["cpu", *devices])))
    return rows
