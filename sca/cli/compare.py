"""`sca compare` and `sca report`: compare predictions files, and write an HTML report of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sca.cli.options import (
    METRIC_OPTIONS_HELP,
    AsJson,
    Metrics,
    check_pipes,
    parse_evaluation_options,
    parse_input_path,
    print_json,
    print_stderr,
    print_table,
    split_names,
)

SortBy = Annotated[
    str | None,
    typer.Option(
        help="Score to rank regions by. Defaults to the first available of cider-d, attributes/all, meteor, "
        "rouge-l, cider, class/accuracy and mask-iou/mean.",
        rich_help_panel="Metrics",
    ),
]
ASSIGNMENT_PATTERN = re.compile(r"[\w.-]*\w\s*=")  # does not match paths that begin with ./


def compare(
    first: Annotated[
        Path, typer.Argument(parser=parse_input_path, help="Predictions file or folder of the first run.")
    ],
    second: Annotated[
        Path,
        typer.Argument(parser=parse_input_path, help="Predictions file or folder of the second run."),
    ],
    options: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help=METRIC_OPTIONS_HELP)] = None,
    metrics: Metrics = None,
    sort_by: SortBy = None,
    out: Annotated[
        Path | None,
        typer.Option(help="HTML page with the regions whose scores changed most.", rich_help_panel="Output"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare two runs on the same regions.

    Prints the paired differences with confidence intervals.
    """
    from sca.evaluation.comparison import compare_runs
    from sca.output.html_page import check_page_path

    check_pipes([first, second])
    if out:
        check_page_path(out, [first, second])
    metric_options = _parse_metric_options(options or ())
    comparison = compare_runs(first, second, metrics and split_names(metrics), metric_options, sort_by)
    if out:
        from sca.evaluation.report import render_comparison

        _write_page(out, render_comparison(comparison))
    if as_json:
        print_json(comparison.to_dict())
    else:
        print_table(comparison.build_table())


def report(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="PREDICTIONS... [KEY=VALUE]...",
            help="Predictions files or folders of one or more runs, followed by metric options.",
        ),
    ],
    metrics: Metrics = None,
    sort_by: SortBy = None,
    out: Annotated[Path, typer.Option(help="HTML page to write.", rich_help_panel="Output")] = Path("report.html"),
    seed: Annotated[int, typer.Option(help="Random seed for the sampled regions.", rich_help_panel="Runtime")] = 0,
) -> None:
    """Write an HTML report of one or more runs on the same regions."""
    from sca.evaluation.evaluate import score_file
    from sca.evaluation.report import render_report
    from sca.output.html_page import check_page_path

    options = [argument for argument in arguments if ASSIGNMENT_PATTERN.match(argument)]
    predictions = [parse_input_path(argument) for argument in arguments if argument not in options]
    if not predictions:
        raise ValueError("no predictions; pass run folders or predictions.jsonl files")
    check_pipes(predictions)
    check_page_path(out, predictions)
    metric_options = _parse_metric_options(options)
    reports = [score_file(path, metrics and split_names(metrics), metric_options) for path in predictions]
    _write_page(out, render_report(reports, sort_by, seed))


def _parse_metric_options(options: Sequence[str]) -> dict[str, Any]:
    """Parse the `key=value` options of metrics; this command has no options of datasets, proposers or models."""
    from sca_registry.errors import make_unknown_name_error

    for option in options:
        if Path(option).exists():
            raise ValueError(f"{option} is parsed as an option because of '='; write ./{option} for the path")
    from sca.evaluation.scoring import SHARED_OPTIONS

    parsed = parse_evaluation_options(options, table_names=())
    for option in parsed["dataset"]:
        raise make_unknown_name_error(f"unknown metric option {option!r}", option, SHARED_OPTIONS)
    return parsed["scores"]


def _write_page(path: Path, html: str) -> None:
    from sca.io.atomic import create_writable_folder, write_file

    create_writable_folder(path.parent)
    write_file(path, html)
    print_stderr(f"wrote {path}")
