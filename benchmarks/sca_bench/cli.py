"""`sca bench`: run sweeps over combinations of components and report the results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sca.cli.options import PanelCommand
from sca.devices import DTYPES, resolve_device

if TYPE_CHECKING:
    from sca_bench.runner import SweepStatus

app = typer.Typer(help="Benchmark combinations of components.", no_args_is_help=True, rich_markup_mode=None)

SWEEP_HELP = "Bundled sweep (smoke, mixers, ...) or a TOML file."
OUT_HELP = "Results folder. Defaults to runs/bench/SWEEP."
DEVICE_HELP = "Device: cpu or cuda."
MODEL, METRICS, OUTPUT, ROWS, RUNTIME, WORKLOAD = "Model", "Metrics", "Output", "Rows", "Runtime", "Workload"


@app.callback()
def _show_bench_help() -> None:
    """Benchmark combinations of components."""


@app.command(cls=PanelCommand)
def run(
    sweep: Annotated[str, typer.Argument(help=SWEEP_HELP)],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Launcher options, such as num_workers=2."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help=OUT_HELP, rich_help_panel=OUTPUT)] = None,
    launcher: Annotated[
        str,
        typer.Option(
            help="Launcher that runs the rows: local, ray or the name of a plugin launcher.", rich_help_panel=RUNTIME
        ),
    ] = "local",
    device: Annotated[str, typer.Option(help=DEVICE_HELP, rich_help_panel=RUNTIME)] = "cpu",
    timeout: Annotated[
        float, typer.Option(help="Time limit in seconds per row.", min=1.0, rich_help_panel=RUNTIME)
    ] = 3600.0,
    retry_state: Annotated[
        list[str] | None,
        typer.Option(
            help="Run rows in this state again: done, incompatible, skipped, out-of-memory, timed-out, crashed, "
            "non-finite, import-error or failed. Repeatable.",
            rich_help_panel=ROWS,
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Also run rows that are predicted to run out of memory.", rich_help_panel=ROWS),
    ] = False,
    time_budget: Annotated[
        float,
        typer.Option(
            help="Stop after this many seconds. Unfinished rows have no result; the next run starts them again.",
            rich_help_panel=RUNTIME,
        ),
    ] = math.inf,
    order: Annotated[
        str | None,
        typer.Option(
            help="Order of the rows: cheapest (cheapest first) or listed (the order of the sweep).  "
            "[default: cheapest]",
            show_default=False,
            rich_help_panel=ROWS,
        ),
    ] = None,
    halving: Annotated[
        bool,
        typer.Option(
            "--halving",
            help="Find the best combination by successive halving instead of training all to the end.",
            rich_help_panel=ROWS,
        ),
    ] = False,
    score: Annotated[
        str | None,
        typer.Option(help="Score that ranks the combinations of --halving.", rich_help_panel=METRICS),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Do not log each row.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Run the combinations (rows) of a sweep that have no result yet.

    Exits with status 1 if some rows still have no result.
    """
    from sca.cli.options import check_option_choice, parse_component_options, print_line, print_stderr
    from sca_bench.runner import RunSettings, run_halving, run_sweep
    from sca_bench.store import ROW_STATES
    from sca_bench.sweep import ROW_ORDERS, Sweep, list_sweeps

    for state in retry_state or ():
        check_option_choice("state", state, tuple(ROW_STATES))
    if order is not None:
        check_option_choice("order", order, ROW_ORDERS)
        if halving:
            raise ValueError("--order has no effect with --halving; omit it")
    launcher_options = parse_component_options("launchers", launcher, options or ())
    device = str(launcher_options.pop("device", device))
    resolve_device(device)
    log = (lambda line: None) if quiet else print_stderr
    if device == "cpu" and f"{sweep}-cpu" in list_sweeps():
        sweep = f"{sweep}-cpu"
        log(
            f"on a CPU, runs the sweep {sweep}; `sca bench speedup` measures the speedup over our reproduction of the "
            "original SCA implementation"
        )
    loaded_sweep = Sweep.read(sweep, device)
    settings = RunSettings(launcher, launcher_options, timeout, force, log, time_budget)
    folder, retry_states = _get_results_folder(loaded_sweep.name, out), tuple(retry_state or ())
    if halving:
        for line in run_halving(loaded_sweep, folder, settings, retry_states, score).format_lines():
            print_line(line)
        return
    if score is not None:
        raise ValueError("--score requires --halving; `sca bench report` has its own --score")
    sweep_status = run_sweep(loaded_sweep, folder, settings, retry_states, order or ROW_ORDERS[0])
    _print_status(sweep_status)
    raise typer.Exit(1 if sweep_status.missing else 0)


@app.command(cls=PanelCommand)
def status(
    sweep: Annotated[str, typer.Argument(help=SWEEP_HELP)],
    out: Annotated[Path | None, typer.Option(help=OUT_HELP, rich_help_panel=OUTPUT)] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP, rich_help_panel=RUNTIME)] = "cpu",
) -> None:
    """Show the progress of a sweep."""
    from sca_bench.runner import read_sweep_status
    from sca_bench.sweep import Sweep

    loaded_sweep = Sweep.read(sweep, device)
    _print_status(read_sweep_status(loaded_sweep, _get_results_folder(loaded_sweep.name, out)))


@app.command(cls=PanelCommand)
def row(
    config: Annotated[str, typer.Argument(help="Configuration of a row as JSON: the `config` field in results.jsonl.")],
    force: Annotated[
        bool,
        typer.Option("--force", help="Run the row even if it is predicted to run out of memory.", rich_help_panel=ROWS),
    ] = False,
) -> None:
    """Run one row and print its result as JSON."""
    import contextlib
    import sys
    import tempfile

    from sca.cli.options import print_json
    from sca.io.json import parse_json
    from sca_bench.worker import run_row

    row_config = parse_json(config, "the configuration")
    for keys in (("model", "captioner"), ("seed",), ("num_threads",), ("device",)):
        if not isinstance(row_config, dict) or not row_config.keys() & {*keys}:
            raise ValueError(f"the configuration has no {keys[0]!r}; pass the `config` field of a row of results.jsonl")
    with tempfile.TemporaryDirectory(prefix="sca-") as folder, contextlib.redirect_stdout(sys.stderr):
        result = run_row({**row_config, "force": force}, folder)
    print_json(result)
    raise typer.Exit(0 if result["state"] == "done" else 1)


@app.command(cls=PanelCommand)
def report(
    folder: Annotated[Path, typer.Argument(help="Results folder, such as runs/bench/smoke.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="HTML page to write; the Markdown and CSV files are stored next to it. Defaults to report.html in "
            "the results folder.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(
            help="Score that measures quality. Defaults to the first available of cider-d, attributes/all, meteor, "
            "class/accuracy, mask-iou/mean and densecap-map.",
            rich_help_panel=METRICS,
        ),
    ] = None,
) -> None:
    """Write an HTML, Markdown and CSV report of a sweep."""
    from sca_registry import RegistryError

    from sca.cli.options import print_stderr
    from sca.io.atomic import create_writable_folder, write_file
    from sca.io.run_folder import check_not_inputs
    from sca.output.html_page import check_page_path
    from sca_bench import report as reports
    from sca_bench.store import ResultStore

    rows = ResultStore(folder).read_rows()
    if not rows:
        raise ValueError(f"no results in {folder}; run sca bench run SWEEP --out {folder}")
    try:
        sweep = ResultStore(folder).read_sweep()
    except RegistryError as error:  # for example of a plugin that is not installed
        sweep = None
        print_stderr(f"the report has no studies, because the sweep cannot be read: {error}")
    page = out or folder / "report.html"
    create_writable_folder(page.parent)
    siblings = [page.with_suffix(".md"), page.with_suffix(".csv")]
    check_not_inputs([page, *siblings], [ResultStore(folder).path])
    check_page_path(page, ())
    for sibling in siblings:
        if sibling.exists() and not reports.is_table_of_report(sibling):
            raise ValueError(f"{sibling} exists and was not written by `sca bench report`; choose a different --out")
    for path, content in (
        (page, reports.render_sweep_page(rows, f"sweep {rows[0]['sweep']}", score, sweep)),
        (page.with_suffix(".md"), reports.render_markdown(rows, score, sweep)),
        (page.with_suffix(".csv"), reports.render_csv(rows, score)),
    ):
        write_file(path, content)
    print_stderr(f"wrote {page}, {page.with_suffix('.md').name} and {page.with_suffix('.csv').name}")


@app.command(cls=PanelCommand)
def diff(
    first: Annotated[Path, typer.Argument(help="Results folder of the first run.")],
    second: Annotated[Path, typer.Argument(help="Results folder of the second run.")],
) -> None:
    """Compare the timings, states and scores of two runs of a sweep."""
    from sca.cli.options import print_line
    from sca_bench.diff import diff_rows
    from sca_bench.store import ResultStore

    for line in diff_rows(ResultStore(first).read_rows(), ResultStore(second).read_rows()).format_lines():
        print_line(line)


@app.command(cls=PanelCommand)
def speedup(
    parts: Annotated[
        list[str] | None,
        typer.Argument(help="Parts to measure: captions, training, mixers, tiny, pam, everything. Defaults to all."),
    ] = None,
    encoder: Annotated[str, typer.Option(help="SAM encoder name.", rich_help_panel=MODEL)] = "sam-vit-b",
    language_model: Annotated[str, typer.Option(help="Language model name.", rich_help_panel=MODEL)] = "gpt2",
    batch_size: Annotated[int, typer.Option(help="Images per batch.", min=1, rich_help_panel=WORKLOAD)] = 1,
    regions_per_image: Annotated[int, typer.Option(help="Regions per image.", min=1, rich_help_panel=WORKLOAD)] = 32,
    published_regions: Annotated[
        int,
        typer.Option(
            help="Regions captioned with the reproduced original implementation; 0 captions all of them.",
            min=0,
            rich_help_panel=WORKLOAD,
        ),
    ] = 0,
    num_repeats: Annotated[
        int, typer.Option(help="Repeats of each method; the fastest counts.", min=1, rich_help_panel=RUNTIME)
    ] = 3,
    device: Annotated[str, typer.Option(help=DEVICE_HELP, rich_help_panel=MODEL)] = "cpu",
    dtype: Annotated[
        str,
        typer.Option(help="Data type of the weights: float32, bfloat16 or float16.", rich_help_panel=MODEL),
    ] = "float32",
    precision: Annotated[
        str | None,
        typer.Option(
            help="Precision of ours in the part captions: int8 or auto, on a CPU. Defaults to that of --dtype.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    time_budget: Annotated[
        float, typer.Option(help="Start no part after this many seconds.", min=1.0, rich_help_panel=RUNTIME)
    ] = math.inf,
    out: Annotated[Path | None, typer.Option(help="JSON file for the measurements.", rich_help_panel=OUTPUT)] = None,
) -> None:
    """Measure the speedup over our reproduction of the original SCA implementation.

    Prints a table of ratios. On two cores, the part everything takes about seven minutes, and the others ten.
    The part everything requires the package segment-anything.
    """
    from dataclasses import asdict

    from sca.cli.options import check_option_choice
    from sca.io.atomic import write_file
    from sca_bench.published_comparison import choose_parts, convert_row_to_dict, print_table, run_comparisons
    from sca_bench.published_procedure import ComparisonSettings
    from sca_bench.worker import collect_environment

    resolve_device(device)
    check_option_choice("dtype", dtype, DTYPES)
    if precision is not None:
        check_option_choice("precision", precision, ("int8", "auto"))
    settings = ComparisonSettings(
        encoder,
        language_model,
        batch_size,
        regions_per_image,
        published_regions,
        num_repeats,
        device,
        dtype,
        precision,
        time_budget,
    )
    rows = print_table(run_comparisons(choose_parts(parts or ()), settings))
    if out:
        measurements = {key: value for key, value in asdict(settings).items() if key != "time_budget"}
        measurements |= {"rows": [convert_row_to_dict(row) for row in rows], "environment": collect_environment(device)}
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, f"{json.dumps(measurements, indent=1)}\n")


@app.command("precision", cls=PanelCommand)
def compare_precision(
    model: Annotated[str, typer.Argument(help="Model: a name from `sca list models`, or a checkpoint folder.")],
    dataset: Annotated[str, typer.Argument(help="Dataset, such as scenes or coco.")],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Dataset options, such as root=FOLDER.")
    ] = None,
    precisions: Annotated[
        list[str] | None,
        typer.Option(
            "--precision",
            help="Precision to compare with float32: auto, bfloat16, float16 or int8. Repeatable.  [default: int8]",
            rich_help_panel=MODEL,
        ),
    ] = None,
    min_width: Annotated[
        int,
        typer.Option(
            help="Minimum number of inputs and outputs of an int8 layer; 1 converts the layers of a small model, too.",
            min=1,
            rich_help_panel=MODEL,
        ),
    ] = 384,
    split: Annotated[str, typer.Option(help="Dataset split.", rich_help_panel=WORKLOAD)] = "val",
    num_images: Annotated[
        int | None, typer.Option(help="Maximum number of images.", min=1, rich_help_panel=WORKLOAD)
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Metrics, comma-separated. Defaults to all metrics that the data supports.", rich_help_panel=METRICS
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the measurements.", rich_help_panel=OUTPUT)] = None,
) -> None:
    """Measure what a precision changes: masks, captions, scores and the CPU time per image.

    Compares predictions for the boxes of a dataset with those in float32.
    """
    from dataclasses import asdict
    from tempfile import TemporaryDirectory

    from sca_registry.spec import ComponentSpec

    from sca.cli.options import check_precision, parse_component_options, print_table, split_names
    from sca.io.atomic import write_file
    from sca_bench.precision_comparison import build_table, compare_precisions
    from sca_bench.worker import collect_environment

    names = precisions or ["int8"]
    for name in names:
        check_precision(name)
    component = ComponentSpec(dataset, parse_component_options("dataset", dataset, options or ()))
    with TemporaryDirectory(prefix="sca-precision-") as folder:
        rows = list(
            compare_precisions(
                model, component, split, names, Path(folder), num_images, min_width, split_names(metrics or "") or None
            )
        )
    print_table(build_table(model, f"{dataset} {split}", rows))
    if out:
        measurements = {
            "model": model,
            "dataset": component.to_dict(),
            "split": split,
            "num_images": num_images,
            "min_width": min_width,
            "rows": [asdict(row) | {"speedup": row.speedup} for row in rows],
            "environment": collect_environment("cpu"),
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, f"{json.dumps(measurements, indent=1)}\n")


def _get_results_folder(name: str, out: Path | None) -> Path:
    return out or Path("runs/bench") / name


def _print_status(sweep_status: SweepStatus) -> None:
    from sca.cli.options import print_line

    counts = (
        ", ".join(f"{count} {state}" for state, count in sorted(sweep_status.state_counts.items())) or "none finished"
    )
    print_line(f"{sweep_status.num_rows} rows: {counts}; {len(sweep_status.missing)} missing")
    for label in sweep_status.missing[:10]:
        print_line(f"  missing: {label}")
