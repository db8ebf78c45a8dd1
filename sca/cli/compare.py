"""`sca compare` and `sca report`: what predictions files say, side by side and on a page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sca.cli.evaluate import parse_evaluation_options, split_names
from sca.cli.options import AsJson, Metrics, check_pipes, parse_input_path, print_json, print_stderr, print_table

SORT_BY_HELP = "the score that regions are ranked by (default: the most telling there is)"
METRIC_OPTIONS_HELP = "references=first, tokenizer=plain, semantic.model=FOLDER, ..."
ASSIGNMENT_PATTERN = re.compile(r"[\w.-]*\w\s*=")  # no path that begins with ./


def compare(
    first: Annotated[Path, typer.Argument(parser=parse_input_path, help="predictions.jsonl of a run, or its folder")],
    second: Annotated[Path, typer.Argument(parser=parse_input_path, help="of another run on the same regions")],
    options: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help=METRIC_OPTIONS_HELP)] = None,
    metrics: Metrics = None,
    by: Annotated[str | None, typer.Option(help=SORT_BY_HELP)] = None,
    out: Annotated[Path | None, typer.Option(help="a page with the regions whose answers changed most")] = None,
    as_json: AsJson = False,
) -> None:
    """How much better the second run is than the first, with intervals of the paired differences."""
    from sca.evaluation.comparison import compare_runs as run
    from sca.output.html_page import check_page_path

    check_pipes([first, second])
    if out:
        check_page_path(out, [first, second])
    comparison = run(first, second, metrics and split_names(metrics), _parse_metric_options(options or ()), by)
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
            metavar="PREDICTIONS... [key=value]...",
            help=f"predictions.jsonl of one or several runs, or their folders; then {METRIC_OPTIONS_HELP}",
        ),
    ],
    out: Annotated[Path, typer.Option(help="the page")] = Path("report.html"),
    metrics: Metrics = None,
    by: Annotated[str | None, typer.Option(help=SORT_BY_HELP)] = None,
    seed: Annotated[int, typer.Option(help="of the regions at random")] = 0,
) -> None:
    """A page of runs on the same regions: scores, how they are spread, best and worst regions, models side by side."""
    from sca.evaluation.evaluate import score_file
    from sca.evaluation.report import render_report
    from sca.output.html_page import check_page_path

    options = [argument for argument in arguments if ASSIGNMENT_PATTERN.match(argument)]
    predictions = [parse_input_path(argument) for argument in arguments if argument not in options]
    if not predictions:
        raise ValueError("no predictions are named; name one run folder or predictions.jsonl, or several")
    check_pipes(predictions)
    check_page_path(out, predictions)
    metric_options = _parse_metric_options(options)
    reports = [score_file(path, metrics and split_names(metrics), metric_options) for path in predictions]
    _write_page(out, render_report(reports, by, seed))


def _parse_metric_options(options: Sequence[str]) -> dict[str, Any]:
    """Read the `key=value` options of scores; no dataset, proposer or model has options here."""
    from sca_registry.errors import make_unknown_name_error

    for option in options:
        if Path(option).exists():
            raise ValueError(f"{option} is read as an option, because of '='; write ./{option} to name the path")
    from sca.evaluation.scoring import SHARED_OPTIONS

    parsed = parse_evaluation_options(options, table_names=())
    for option in parsed["dataset"]:
        raise make_unknown_name_error(f"scores have no option {option!r}", option, SHARED_OPTIONS)
    return parsed["scores"]


def _write_page(path: Path, html: str) -> None:
    from sca.io.atomic import create_writable_folder, write_file

    create_writable_folder(path.parent)
    write_file(path, html)
    print_stderr(f"wrote {path}")
