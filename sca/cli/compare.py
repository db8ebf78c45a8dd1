"""`sca compare` and `sca report`: what predictions files say, side by side and on a page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sca.cli.evaluate import listed, read_settings
from sca.cli.options import AsJson, Metrics, check_pipes, complain, input_path, print_json, print_table

BY = "the score that regions are ranked by (default: the most telling there is)"
SETTINGS = "references=first, tokenizer=plain, semantic.model=FOLDER, ..."
ASSIGNMENT = re.compile(r"[\w.-]*\w\s*=")  # no path that begins with ./


def compare(
    first: Annotated[Path, typer.Argument(parser=input_path, help="predictions.jsonl of a run, or its folder")],
    second: Annotated[Path, typer.Argument(parser=input_path, help="of another run on the same regions")],
    options: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help=SETTINGS)] = None,
    metrics: Metrics = None,
    by: Annotated[str | None, typer.Option(help=BY)] = None,
    out: Annotated[Path | None, typer.Option(help="a page with the regions whose answers changed most")] = None,
    as_json: AsJson = False,
) -> None:
    """How much better the second run is than the first, with intervals of the paired differences."""
    from sca.evaluation.comparison import compare_runs as run
    from sca.output.page import check_page

    check_pipes([first, second])
    if out:
        check_page(out, [first, second])
    comparison = run(first, second, metrics and listed(metrics), _read_settings(options or ()), by)
    if out:
        from sca.evaluation.report import comparison_page

        _write(out, comparison_page(comparison))
    if as_json:
        print_json(comparison.to_dict())
    else:
        print_table(comparison.build_table())


def report(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="PREDICTIONS... [key=value]...",
            help=f"predictions.jsonl of one or several runs, or their folders; then {SETTINGS}",
        ),
    ],
    out: Annotated[Path, typer.Option(help="the page")] = Path("report.html"),
    metrics: Metrics = None,
    by: Annotated[str | None, typer.Option(help=BY)] = None,
    seed: Annotated[int, typer.Option(help="of the regions at random")] = 0,
) -> None:
    """A page of runs on the same regions: scores, how they are spread, best and worst regions, models side by side."""
    from sca.evaluation.evaluate import score_file
    from sca.evaluation.report import report_page
    from sca.output.page import check_page

    options = [argument for argument in arguments if ASSIGNMENT.match(argument)]
    predictions = [input_path(argument) for argument in arguments if argument not in options]
    if not predictions:
        raise ValueError("no predictions are named; name one run folder or predictions.jsonl, or several")
    check_pipes(predictions)
    check_page(out, predictions)
    settings = _read_settings(options)
    reports = [score_file(path, metrics and listed(metrics), settings) for path in predictions]
    _write(out, report_page(reports, by, seed))


def _read_settings(options: Sequence[str]) -> dict[str, Any]:
    """Read the `key=value` options of scores; no dataset, proposer or model has options here."""
    from sca_registry.messages import unknown

    for option in options:
        if Path(option).exists():
            raise ValueError(f"{option} is read as an option, because of '='; write ./{option} to name the path")
    from sca.evaluation.scoring import SHARED_OPTIONS

    given = read_settings(options, kinds=())
    for option in given["dataset"]:
        raise unknown(f"scores have no option {option!r}", option, SHARED_OPTIONS)
    return given["scores"]


def _write(path: Path, page: str) -> None:
    from sca.io.atomic import open_folder, write_file

    open_folder(path.parent)
    write_file(path, page)
    complain(f"wrote {path}")
