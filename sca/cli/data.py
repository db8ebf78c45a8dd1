"""`sca data`: datasets as files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Datasets as files.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Datasets as files."""


@app.command()
def export(
    dataset: Annotated[str, typer.Argument(help="a dataset by name: scenes")],
    folder: Annotated[Path, typer.Argument(help="a new or empty folder")],
    format: Annotated[str, typer.Option(help="coco, vg, refcoco or another layout; a wrong one tells all")] = "coco",
    split: Annotated[list[str] | None, typer.Option(help="train, val or test; may be repeated (default: val)")] = None,
    limit: Annotated[int | None, typer.Option(help="at most so many images of each split", min=1)] = None,
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="options of the dataset")
    ] = None,
) -> None:
    """Writes a dataset in the layout that a public one is published in."""
    from sca_registry import datasets

    from sca.cli.options import print_line, read_options, settle
    from sca.data.export import FORMATS
    from sca.data.export import export as write
    from sca.io.atomic import check_replaceable

    settle("format", format, tuple(FORMATS))
    check_replaceable(folder)
    chosen = read_options("datasets", dataset, options or ())
    sets = {name: datasets.build(dataset, name, **chosen) for name in split or ["val"]}
    with _refusing_nothing():
        _report(dataset, sets)
        print_line(f"wrote {write(sets, folder, format, limit=limit)}")


def _report(dataset: str, sets: Mapping[str, Any]) -> None:
    """Report what each split contains. Raises EmptyDatasetError if none has an image."""
    from sca.cli.options import complain
    from sca.data.summary import check_not_empty, summarize_dataset

    for split, found in sets.items():
        if len(found) or any(map(len, sets.values())):
            complain(f"{dataset} {split}: {summarize_dataset(found)}")
        else:
            check_not_empty(found, f"{dataset} {split}")


@contextmanager
def _refusing_nothing() -> Iterator[None]:
    """Exit with status 1 where a dataset has nothing to write."""
    from sca.cli.options import complain
    from sca.data.summary import EmptyDatasetError

    try:
        yield
    except EmptyDatasetError as error:
        complain(str(error))
        raise typer.Exit(1) from error


Dataset = Annotated[str, typer.Argument(help="a dataset by name, such as coco; `sca list datasets` has all")]
Split = Annotated[str, typer.Option(help="train, val, test, ...")]
Options = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]...", help="options of the dataset, such as root=FOLDER")
]


@app.command()
def stats(
    dataset: Dataset,
    options: Options = None,
    split: Split = "val",
    pictures: Annotated[
        bool, typer.Option("--pictures", help="open every picture, so that damaged ones count")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """Counts images, regions, phrases and words, and tells what was left out and why."""
    from sca_registry import datasets

    from sca.cli.options import print_json, print_table, read_options
    from sca.data.stats import stats as counted
    from sca.io.terminal import Table

    chosen = read_options("datasets", dataset, options or ())
    found = {"dataset": dataset, **counted(datasets.build(dataset, split, **chosen), pictures)}
    if as_json:
        print_json(found)
        return
    table = Table(("", ""), title=f"{dataset} {split}")
    for name, value in found.items():
        if name not in ("dataset", "split", "examples") and value not in (None, {}):
            table.add_row(name.replace("_", " "), _shown(value))
    for reason, examples in found["examples"].items():
        for place, example in enumerate(examples):
            table.add_row("" if place else f"such as {reason}", example)
    print_table(table)


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(number)}" for name, number in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


@app.command()
def view(
    dataset: Dataset,
    options: Options = None,
    split: Split = "val",
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("data.html"),
    limit: Annotated[int, typer.Option(help="so many images, drawn at random", min=1)] = 12,
    seed: Annotated[int, typer.Option(help="of what is drawn")] = 0,
    augment: Annotated[str, typer.Option(help="also show what this makes of them: '{flip=0.5, crop=0.7}'")] = "",
) -> None:
    """Writes a page of samples with their boxes, masks and words, before and after augmentation."""
    import random

    from sca_registry import datasets
    from sca_registry.overrides import read_assignment

    from sca.cli.options import print_line, read_options
    from sca.io.run_folder import existing_paths
    from sca.output.page import check_page
    from sca.output.samples import write_samples
    from sca.training.recipe import parse_augmentation

    change = parse_augmentation(read_assignment(f"augment={augment}")[1], "--augment") if augment else None
    given = read_options("datasets", dataset, options or ())
    check_page(out, existing_paths(given))
    found = datasets.build(dataset, split, **given)
    with _refusing_nothing():
        _report(dataset, {split: found})
        chosen = sorted(random.Random(seed).sample(range(len(found)), min(limit, len(found))))
        title = f"{dataset} {split}: {len(chosen)} of {len(found)} images"
        print_line(f"wrote {write_samples((found[index] for index in chosen), out, title, change, seed)}")
