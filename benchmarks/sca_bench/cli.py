"""`sca bench`: sweeps over combinations, and what came of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from sca.devices import DTYPES, resolve_device

app = typer.Typer(
    help="Sweeps over combinations of parts: run, status, report, diff.", no_args_is_help=True, rich_markup_mode=None
)

SWEEP_HELP = "a shipped sweep (smoke, mixers, ...) or a TOML file"
OUT_HELP = "the folder of results (default: runs/bench/SWEEP)"


@app.callback()
def _show_bench_help() -> None:
    """Sweeps over combinations of parts."""


@app.command()
def run(
    sweep: Annotated[str, typer.Argument(help=SWEEP_HELP)],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value]...", help="options of the launcher: workers=2; device=cpu"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help=OUT_HELP)] = None,
    launcher: Annotated[str, typer.Option(help="where rows are made: local, ray, or a plugin's")] = "local",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    timeout: Annotated[float, typer.Option(help="seconds that a row has", min=1.0)] = 3600.0,
    retry: Annotated[list[str] | None, typer.Option(help="make rows of this state again; may be repeated")] = None,
    force: Annotated[bool, typer.Option("--force", help="try rows that are predicted not to fit")] = False,
    seconds: Annotated[
        float, typer.Option(help="Time budget of the run: no row starts after it, and rows that it cuts stay missing.")
    ] = math.inf,
    order: Annotated[str, typer.Option(help="Order of rows: cheapest first, or listed as in the sweep.")] = "cheapest",
    quiet: Annotated[bool, typer.Option("--quiet", help="no line for every row")] = False,
) -> None:
    """Makes the rows of a sweep that are missing; what is there stays, whatever happens.

    Exit status 1 if rows are missing at the end.
    """
    from sca.cli.options import check_option_choice, parse_part_options, print_stderr
    from sca_bench.row_states import ROW_STATES
    from sca_bench.runner import run_sweep as make
    from sca_bench.sweep import ROW_ORDERS, Sweep, list_sweeps

    for state in retry or ():
        check_option_choice("state", state, ROW_STATES)
    check_option_choice("order", order, ROW_ORDERS)
    launcher_options = parse_part_options("launchers", launcher, options or ())
    device = str(launcher_options.pop("device", device))
    resolve_device(device)
    log = (lambda line: None) if quiet else print_stderr
    if device == "cpu" and f"{sweep}-cpu" in list_sweeps():
        sweep = f"{sweep}-cpu"
        log(f"on a CPU the sweep is {sweep}; `sca bench published` prints the ratios to the published procedure")
    loaded_sweep = Sweep.read(sweep, device)
    retry_states = tuple(retry or ())
    sweep_status = make(
        loaded_sweep,
        _get_results_folder(loaded_sweep.name, out),
        launcher,
        launcher_options,
        timeout,
        retry_states,
        force,
        log,
        budget_seconds=seconds,
        order=order,
    )
    _print_status(sweep_status)
    raise typer.Exit(1 if sweep_status.missing else 0)


@app.command()
def status(
    sweep: Annotated[str, typer.Argument(help=SWEEP_HELP)],
    out: Annotated[Path | None, typer.Option(help=OUT_HELP)] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """How far a sweep is; it may be running meanwhile."""
    from sca_bench.runner import read_sweep_status as look
    from sca_bench.sweep import Sweep

    loaded_sweep = Sweep.read(sweep, device)
    _print_status(look(loaded_sweep, _get_results_folder(loaded_sweep.name, out)))


@app.command()
def row(
    config: Annotated[str, typer.Argument(help="of a row, as JSON: its `config` in results.jsonl")],
    force: Annotated[bool, typer.Option("--force", help="try it even if it is predicted not to fit")] = False,
) -> None:
    """Makes one row here and now, and prints it: the command that is given with each row."""
    import contextlib
    import sys
    import tempfile

    from sca.cli.options import print_json
    from sca.io.json import parse_json
    from sca_bench.worker import work

    row_config = parse_json(config, "the configuration")
    for key in ("model", "seed", "threads", "device"):
        if not isinstance(row_config, dict) or key not in row_config:
            raise ValueError(f"a row has no {key!r}: give the `config` of one of results.jsonl")
    with tempfile.TemporaryDirectory(prefix="sca-") as folder, contextlib.redirect_stdout(sys.stderr):
        result = work({**row_config, "force": force}, folder)
    print_json(result)
    raise typer.Exit(0 if result["state"] == "done" else 1)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="of results, such as runs/bench/smoke")],
    out: Annotated[Path | None, typer.Option(help="the page (default: report.html in the folder)")] = None,
    score: Annotated[str | None, typer.Option(help="what counts as quality (default: the most telling)")] = None,
) -> None:
    """One page, offline, with Markdown (.md) and CSV (.csv) beside it."""
    from sca.cli.options import print_stderr
    from sca.io.atomic import create_writable_folder, write_file
    from sca.io.run_folder import check_not_inputs
    from sca.output.html_page import check_page_path
    from sca_bench import report as reports
    from sca_bench.store import ResultStore

    rows = ResultStore(folder).read_rows()
    if not rows:
        raise ValueError(f"no results in {folder}: sca bench run SWEEP --out {folder} makes some")
    page = out or folder / "report.html"
    create_writable_folder(page.parent)
    siblings = [page.with_suffix(".md"), page.with_suffix(".csv")]
    check_not_inputs([page, *siblings], [ResultStore(folder).path])
    check_page_path(page, ())
    for sibling in siblings:
        if sibling.exists() and not page.exists():
            raise ValueError(f"{sibling} exists and is not of a report; choose another --out")
    for path, content in (
        (page, reports.render_sweep_page(rows, f"sweep {rows[0]['sweep']}", score)),
        (page.with_suffix(".md"), reports.render_markdown(rows, score)),
        (page.with_suffix(".csv"), reports.render_csv(rows, score)),
    ):
        write_file(path, content)
    print_stderr(f"wrote {page}, {page.with_suffix('.md').name} and {page.with_suffix('.csv').name}")


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="a folder of results")],
    second: Annotated[Path, typer.Argument(help="of another run of the same sweep")],
) -> None:
    """Whether a second run timed the same, and which states and scores are others."""
    from sca.cli.options import print_line
    from sca_bench.diff import diff_rows as compare
    from sca_bench.store import ResultStore

    for line in compare(ResultStore(first).read_rows(), ResultStore(second).read_rows()).format_lines():
        print_line(line)


@app.command()
def published(
    parts: Annotated[
        list[str] | None, typer.Argument(help="of captions, training, resampler, tiny, everything (default: all)")
    ] = None,
    encoder: Annotated[str, typer.Option(help="A SAM by name.")] = "sam-vit-b",
    language_model: Annotated[str, typer.Option(help="A language model by name.")] = "gpt2",
    images: Annotated[int, typer.Option(help="Images per batch of captions.", min=1)] = 1,
    regions: Annotated[int, typer.Option(help="Regions per image.", min=1)] = 32,
    beside: Annotated[int, typer.Option(help="Regions that the published procedure captions; 0 for all.", min=0)] = 0,
    repeats: Annotated[int, typer.Option(help="Repeats of each way; the fastest counts.", min=1)] = 3,
    device: Annotated[str, typer.Option(help="Device: cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Data type of weights: float32, bfloat16 or float16.")] = "float32",
    seconds: Annotated[float, typer.Option(help="Time budget; no part is started after it.", min=1.0)] = math.inf,
    out: Annotated[Path | None, typer.Option(help="JSON file for the measurements.")] = None,
) -> None:
    """How much faster than the published procedure, both in this run: a table of ratios. Ten minutes for all."""
    from dataclasses import asdict

    from sca.cli.options import check_option_choice
    from sca.io.atomic import write_file
    from sca_bench.published_comparison import (
        ComparisonSettings,
        choose_parts,
        convert_row_to_dict,
        print_table,
        run_comparisons,
    )
    from sca_bench.worker import collect_environment

    resolve_device(device)
    check_option_choice("dtype", dtype, DTYPES)
    settings = ComparisonSettings(encoder, language_model, images, regions, beside, repeats, device, dtype, seconds)
    rows = print_table(run_comparisons(choose_parts(parts or ()), settings))
    if out:
        measurements = {key: value for key, value in asdict(settings).items() if key != "seconds"}
        measurements |= {"rows": [convert_row_to_dict(row) for row in rows], "environment": collect_environment(device)}
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, f"{json.dumps(measurements, indent=1)}\n")


def _get_results_folder(name: str, out: Path | None) -> Path:
    return out or Path("runs/bench") / name


def _print_status(sweep_status) -> None:
    from sca.cli.options import print_line

    counts = ", ".join(f"{count} {state}" for state, count in sorted(sweep_status.states.items())) or "none made"
    print_line(f"{sweep_status.rows} rows: {counts}; {len(sweep_status.missing)} missing")
    for label in sweep_status.missing[:10]:
        print_line(f"  missing: {label}")
