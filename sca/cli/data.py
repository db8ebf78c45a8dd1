"""`sca data`: datasets as files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Datasets as files.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _show_data_help() -> None:
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

    from sca.cli.options import check_option_choice, parse_part_options, print_line
    from sca.data.export import EXPORT_WRITERS
    from sca.data.export import export_dataset as write
    from sca.io.atomic import check_folder_replaceable

    check_option_choice("format", format, tuple(EXPORT_WRITERS))
    check_folder_replaceable(folder)
    dataset_options = parse_part_options("datasets", dataset, options or ())
    datasets_by_split = {name: datasets.build(dataset, name, **dataset_options) for name in split or ["val"]}
    with _exit_if_empty():
        _report_splits(dataset, datasets_by_split)
        print_line(f"wrote {write(datasets_by_split, folder, format, max_images=limit)}")


def _report_splits(dataset: str, datasets_by_split: Mapping[str, Any]) -> None:
    """Report what each split contains. Raises EmptyDatasetError if none has an image."""
    from sca.cli.options import print_stderr
    from sca.data.summary import check_dataset_not_empty, summarize_dataset

    for split, split_dataset in datasets_by_split.items():
        if len(split_dataset) or any(map(len, datasets_by_split.values())):
            print_stderr(f"{dataset} {split}: {summarize_dataset(split_dataset)}")
        else:
            check_dataset_not_empty(split_dataset, f"{dataset} {split}")


@contextmanager
def _exit_if_empty() -> Iterator[None]:
    """Exit with status 1 where a dataset has nothing to write."""
    from sca.cli.options import print_stderr
    from sca.data.summary import EmptyDatasetError

    try:
        yield
    except EmptyDatasetError as error:
        print_stderr(str(error))
        raise typer.Exit(1) from error


DatasetName = Annotated[str, typer.Argument(help="a dataset by name, such as coco; `sca list datasets` has all")]
SplitName = Annotated[str, typer.Option(help="train, val, test, ...")]
DatasetOptions = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]...", help="options of the dataset, such as root=FOLDER")
]


@app.command()
def stats(
    dataset: DatasetName,
    options: DatasetOptions = None,
    split: SplitName = "val",
    pictures: Annotated[
        bool, typer.Option("--pictures", help="open every picture, so that damaged ones count")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """Counts images, regions, phrases and words, and tells what was left out and why."""
    from sca_registry import datasets

    from sca.cli.options import parse_part_options, print_json, print_table
    from sca.data.stats import compute_dataset_stats as counted
    from sca.io.terminal import Table

    dataset_options = parse_part_options("datasets", dataset, options or ())
    statistics = {"dataset": dataset, **counted(datasets.build(dataset, split, **dataset_options), pictures)}
    if as_json:
        print_json(statistics)
        return
    table = Table(("", ""), title=f"{dataset} {split}")
    for name, value in statistics.items():
        if name not in ("dataset", "split", "examples") and value not in (None, {}):
            table.add_row(name.replace("_", " "), _format_statistic(value))
    for reason, examples in statistics["examples"].items():
        for index, example in enumerate(examples):
            table.add_row("" if index else f"such as {reason}", example)
    print_table(table)


def _format_statistic(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_format_statistic(count)}" for name, count in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


@app.command()
def view(
    dataset: DatasetName,
    options: DatasetOptions = None,
    split: SplitName = "val",
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("data.html"),
    limit: Annotated[int, typer.Option(help="so many images, drawn at random", min=1)] = 12,
    seed: Annotated[int, typer.Option(help="of what is drawn")] = 0,
    augment: Annotated[str, typer.Option(help="also show what this makes of them: '{flip=0.5, crop=0.7}'")] = "",
) -> None:
    """Writes a page of samples with their boxes, masks and words, before and after augmentation."""
    import random

    from sca_registry import datasets
    from sca_registry.overrides import parse_assignment

    from sca.cli.options import parse_part_options, print_line
    from sca.io.run_folder import iter_existing_paths
    from sca.output.dataset_page import write_samples_page
    from sca.output.html_page import check_page_path
    from sca.training.recipe import parse_augmentation

    augmentation = parse_augmentation(parse_assignment(f"augment={augment}")[1], "--augment") if augment else None
    dataset_options = parse_part_options("datasets", dataset, options or ())
    check_page_path(out, iter_existing_paths(dataset_options))
    built_dataset = datasets.build(dataset, split, **dataset_options)
    with _exit_if_empty():
        _report_splits(dataset, {split: built_dataset})
        indices = sorted(random.Random(seed).sample(range(len(built_dataset)), min(limit, len(built_dataset))))
        title = f"{dataset} {split}: {len(indices)} of {len(built_dataset)} images"
        print_line(
            f"wrote {write_samples_page((built_dataset[index] for index in indices), out, title, augmentation, seed)}"
        )
