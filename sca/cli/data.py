"""`sca data`: inspect and export datasets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from sca.cli.options import PanelCommand

DatasetName = Annotated[str, typer.Argument(help="Dataset name; see `sca list datasets`.")]
SplitName = Annotated[str, typer.Option(help="Dataset split, such as train, val or test.", rich_help_panel="Data")]
DatasetOptions = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Dataset options, such as root=FOLDER.")
]

app: typer.Typer = typer.Typer(help="Inspect and export datasets.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _show_data_help() -> None:
    """Inspect and export datasets."""


@app.command(cls=PanelCommand)
def export(
    dataset: DatasetName,
    out: Annotated[Path, typer.Argument(help="New or empty output folder.")],
    options: DatasetOptions = None,
    format: Annotated[
        str,
        typer.Option(
            help="Dataset format: coco, coco-captions, coco-panoptic, jsonl, objects365, sa1b, v3det, vg, vg-grit, "
            "refcoco or refcocog.",
            rich_help_panel="Output",
        ),
    ] = "coco",
    split: Annotated[
        list[str] | None,
        typer.Option(help="Split to export, such as train. Repeatable. Defaults to val.", rich_help_panel="Data"),
    ] = None,
    max_images: Annotated[
        int | None, typer.Option(help="Maximum number of images per split.", min=1, rich_help_panel="Data")
    ] = None,
) -> None:
    """Export a dataset in the format of a public dataset, such as COCO."""
    from sca_registry import datasets

    from sca.cli.options import check_option_choice, parse_component_options, print_line
    from sca.data.export import EXPORT_WRITERS, export_dataset
    from sca.io.atomic import check_folder_replaceable

    check_option_choice("format", format, tuple(EXPORT_WRITERS))
    check_folder_replaceable(out)
    dataset_options = parse_component_options("datasets", dataset, options or ())
    datasets_by_split = {name: datasets.build(dataset, name, **dataset_options) for name in split or ["val"]}
    with _exit_if_empty():
        _report_splits(dataset, datasets_by_split)
        print_line(f"wrote {export_dataset(datasets_by_split, out, format, max_images=max_images)}")


def _report_splits(dataset: str, datasets_by_split: Mapping[str, Any]) -> None:
    """Report the contents of each split; raise EmptyDatasetError if all are empty."""
    from sca.cli.options import print_stderr
    from sca.data.summary import check_dataset_not_empty, summarize_dataset

    for split, split_dataset in datasets_by_split.items():
        if len(split_dataset) or any(map(len, datasets_by_split.values())):
            print_stderr(f"{dataset} {split}: {summarize_dataset(split_dataset)}")
        else:
            check_dataset_not_empty(split_dataset, f"{dataset} {split}")


@contextmanager
def _exit_if_empty() -> Iterator[None]:
    """Exit with status 1 if a dataset has nothing to write."""
    from sca.cli.options import print_stderr
    from sca.data.summary import EmptyDatasetError

    try:
        yield
    except EmptyDatasetError as error:
        print_stderr(str(error))
        raise typer.Exit(1) from error


@app.command(cls=PanelCommand)
def stats(
    dataset: DatasetName,
    options: DatasetOptions = None,
    split: SplitName = "val",
    check_images: Annotated[
        bool,
        typer.Option("--check-images", help="Open every image and count unreadable ones.", rich_help_panel="Data"),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of a table.", rich_help_panel="Output")
    ] = False,
) -> None:
    """Count the images, regions, phrases and words of a dataset."""
    from sca_registry import datasets

    from sca.cli.options import parse_component_options, print_json, print_table
    from sca.data.stats import compute_dataset_stats
    from sca.io.terminal import Table

    dataset_options = parse_component_options("datasets", dataset, options or ())
    built_dataset = datasets.build(dataset, split, **dataset_options)
    statistics = {"dataset": dataset, **compute_dataset_stats(built_dataset, check_images)}
    if as_json:
        print_json(statistics)
        return
    table = Table(("", ""), title=f"{dataset} {split}")
    for name, value in statistics.items():
        if name not in ("dataset", "split", "skipped_examples") and value not in (None, {}):
            table.add_row(name.removeprefix("num_").replace("_", " "), _format_statistic(value))
    for reason, examples in statistics["skipped_examples"].items():
        for index, example in enumerate(examples):
            table.add_row("" if index else f"examples: {reason}", example)
    print_table(table)


def _format_statistic(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_format_statistic(count)}" for name, count in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


@app.command(cls=PanelCommand)
def view(
    dataset: DatasetName,
    options: DatasetOptions = None,
    split: SplitName = "val",
    num_images: Annotated[
        int, typer.Option(help="Number of randomly sampled images.", min=1, rich_help_panel="Data")
    ] = 12,
    seed: Annotated[int, typer.Option(help="Random seed for sampling and augmentation.", rich_help_panel="Data")] = 0,
    augment: Annotated[
        str,
        typer.Option(
            help="Augmentation to show next to each image: '{flip_prob=0.5, min_crop_fraction=0.7}'.",
            rich_help_panel="Data",
        ),
    ] = "",
    out: Annotated[Path, typer.Option(help="HTML page to write.", rich_help_panel="Output")] = Path("data.html"),
) -> None:
    """Write an HTML page of samples, optionally augmented."""
    import random

    from sca_registry import datasets
    from sca_registry.overrides import parse_assignment

    from sca.cli.options import parse_component_options, print_line
    from sca.io.run_folder import iter_existing_paths
    from sca.output.dataset_page import write_samples_page
    from sca.output.html_page import check_page_path
    from sca.training.recipe import parse_augmentation

    augmentation = parse_augmentation(parse_assignment(f"augment={augment}")[1], "--augment") if augment else None
    dataset_options = parse_component_options("datasets", dataset, options or ())
    check_page_path(out, iter_existing_paths(dataset_options))
    built_dataset = datasets.build(dataset, split, **dataset_options)
    with _exit_if_empty():
        _report_splits(dataset, {split: built_dataset})
        indices = sorted(random.Random(seed).sample(range(len(built_dataset)), min(num_images, len(built_dataset))))
        title = f"{dataset} {split}: {len(indices)} of {len(built_dataset)} images"
        print_line(
            f"wrote {write_samples_page((built_dataset[index] for index in indices), out, title, augmentation, seed)}"
        )
