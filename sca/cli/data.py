"""`sca data`: datasets as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Datasets as files.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Datasets as files."""


@app.command()
def export(
    dataset: Annotated[str, typer.Argument(help="a dataset by name: scenes")],
    folder: Annotated[Path, typer.Argument(help="a new or empty folder")],
    format: Annotated[str, typer.Option(help="coco, vg or refcoco")] = "coco",
    split: Annotated[list[str] | None, typer.Option(help="train, val or test; may be repeated (default: val)")] = None,
    limit: Annotated[int | None, typer.Option(help="at most so many images of each split", min=1)] = None,
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="options of the dataset")
    ] = None,
) -> None:
    """Writes a dataset in the JSON layout that COCO, Visual Genome or RefCOCO is published in."""
    from sca_registry import datasets

    from sca.cli.options import read_options, settle
    from sca.data.export import FORMATS
    from sca.data.export import export as write

    settle("format", format, tuple(FORMATS))
    chosen = read_options(options or ())
    sets = {name: datasets.build(dataset, name, **chosen) for name in split or ["val"]}
    typer.echo(f"wrote {write(sets, folder, format, limit=limit)}")
