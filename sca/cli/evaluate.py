"""`sca evaluate`: how good a model is on a dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sca.cli.options import DEVICES, complain, find_device, print_table, read_options, settle

if TYPE_CHECKING:
    from sca.evaluation.evaluate import Report


def evaluate(
    model: Annotated[str, typer.Argument(help="a zoo name or a checkpoint folder")],
    dataset: Annotated[str, typer.Argument(help="scenes, coco, ...")],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value]...", help="options of the dataset: root=FOLDER, count=100"),
    ] = None,
    split: Annotated[str, typer.Option(help="train, val or test")] = "val",
    prompt: Annotated[str, typer.Option(help="box or point")] = "box",
    limit: Annotated[int | None, typer.Option(help="at most so many images", min=1)] = None,
    out: Annotated[Path | None, typer.Option(help="folder for predictions.jsonl and scores.json")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table")] = False,
    device: Annotated[str, typer.Option(help=DEVICES)] = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bar and no remarks")] = False,
) -> None:
    """Attributes, relations, classes, masks, and how often the caption follows the prompt, against the truth."""
    from rich.console import Console
    from rich.progress import Progress

    from sca.evaluation.evaluate import evaluate as run
    from sca.evaluation.predictions import PROMPTS
    from sca.output.files import open_folder

    settle("prompt", prompt, PROMPTS)
    table = {"name": dataset, **read_options(options or ())}
    find_device(device)
    if out:
        open_folder(out)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        bar = progress.add_task("images", total=None)
        report = run(
            model,
            table,
            split,
            prompt=prompt,
            limit=limit,
            device=device,
            progress=lambda done, every: progress.update(bar, completed=done, total=every),
        )
    if out:
        _write(report, out)
        if not quiet:
            complain(f"wrote {out / 'predictions.jsonl'} and {out / 'scores.json'}")
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=1))
    else:
        print_table(report.table())


def _write(report: Report, folder: Path) -> None:
    """Each file is whole, or as it was before."""
    from sca.output.files import write_file

    write_file(folder / "predictions.jsonl", "".join(f"{json.dumps(each)}\n" for each in report.records).encode())
    write_file(folder / "scores.json", f"{json.dumps(report.to_dict(), indent=1)}\n".encode())
