"""`sca evaluate` and `sca score`: how good a model is on a dataset, and what predictions are worth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sca.cli.options import (
    AllowExternal,
    AsJson,
    Device,
    Metrics,
    TrustRemoteCode,
    complain,
    input_path,
    print_json,
    print_table,
    settle,
)
from sca.devices import resolve_device

if TYPE_CHECKING:
    from sca.evaluation.evaluate import EvaluationReport

OPTIONS = (
    "options of the dataset (root=FOLDER, count=100), generation.beams=3, proposer.points=16, references=first, "
    "tokenizer=plain, and options of metrics such as semantic.model=FOLDER"
)


def evaluate(
    model: Annotated[str, typer.Argument(help="a zoo name, a checkpoint folder, a captioner, or encoder+captioner")],
    dataset: Annotated[str, typer.Argument(help="scenes, coco, visual-genome, ... or a protocol")],
    options: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help=OPTIONS)] = None,
    split: Annotated[str | None, typer.Option(help="train, val, test, testA, ... (default: val)")] = None,
    prompt: Annotated[str | None, typer.Option(help="box, center, random-point, mask-point or mask")] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(help="ask once more, misleadingly: wrong-region, colour-swap or shuffled-mask; may be repeated"),
    ] = None,
    proposer: Annotated[str | None, typer.Option(help="dense captioning: what finds the regions (grid, ...)")] = None,
    metrics: Metrics = None,
    batch: Annotated[int, typer.Option(help="images at a time", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="of points that are drawn")] = 0,
    limit: Annotated[int | None, typer.Option(help="at most so many images", min=1)] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder for predictions.jsonl, written as answers come, and scores.json")
    ] = None,
    as_json: AsJson = False,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    allow_external: AllowExternal = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="with --out: replace another run there")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bar and no remarks")] = False,
) -> None:
    """Asks a model for the regions of a dataset and scores the answers. A killed run goes on with the same --out.

    Under `accelerate launch` or torchrun every process asks for its share. A protocol is a published way to do it, and
    prints the published scores beside ours.
    """
    from sca.evaluation import protocol as protocols
    from sca.evaluation.predictions import CONTROLS, PROMPT_TYPES
    from sca.io.atomic import open_folder

    if prompt is not None:
        settle("prompt", prompt, list(PROMPT_TYPES))
    for each in control or ():
        settle("control", each, list(CONTROLS))
    given = read_settings(options or (), dataset, proposer)
    asked = metrics and listed(metrics)
    device = _own(device)
    resolve_device(device)
    if out:
        open_folder(out)
    how = {"batch": batch, "limit": limit, "device": device, "overwrite": overwrite}
    how |= {"trust_remote_code": trust_remote_code, "allow_external": allow_external}
    if _is_protocol(dataset):
        protocol = protocols.read_protocol(dataset)
        reports = _protocol(
            model, protocol, given, asked, (split, prompt, proposer), control or (), seed, out, quiet, how
        )
    else:
        from sca.evaluation.predictions import PromptingOptions

        questions = PromptingOptions(
            prompt=prompt or "box", controls=tuple(control or ()), seed=seed, generation=given["generation"]
        )
        table = {"name": dataset, **given["dataset"]}
        found = {"name": proposer, **given["proposer"]} if proposer else None
        reports = [_run(model, table, split or "val", questions, found, asked, given["scores"], out, quiet, how)]
        protocol = None
    reports = [report for report in reports if report is not None]  # only one of several processes has them
    if as_json and reports:
        plain = [report.to_dict() for report in reports]
        print_json(plain if protocol else plain[0])
    elif reports:
        for place, report in enumerate(reports):
            print_table(report.build_table())
            if protocol and protocol.runs[place].columns:
                run = protocol.runs[place]
                print_table(protocols.build_comparison_table(run, report.run["model"], report.scores, protocol.source))


def score(
    predictions: Annotated[
        Path, typer.Argument(parser=input_path, help="predictions.jsonl, or the folder of it; - is standard input")
    ],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value]...", help="references=first, tokenizer=plain, semantic.model=FOLDER, ..."),
    ] = None,
    metrics: Metrics = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="refuse predictions whose regions are not those of this dataset (dataset.root=...)"),
    ] = None,
    split: Annotated[str, typer.Option(help="of that dataset")] = "val",
    as_json: AsJson = False,
) -> None:
    """Scores a predictions file without the model: one of `sca evaluate`, or one made by hand.

    By hand, a line is {"image_id": 1, "region_id": 2, "caption": "a red car", "references": ["the red car"]}.
    """
    from sca.evaluation.evaluate import score_file

    given = read_settings(options or (), dataset, kinds=("dataset",))
    if given["dataset"] and dataset is None:
        raise ValueError(f"{', '.join(given['dataset'])}: options of a dataset, and no --dataset is named")
    against = {"name": dataset, **given["dataset"]} if dataset else None
    report = score_file(predictions, metrics and listed(metrics), given["scores"], against, split)
    if as_json:
        print_json(report.to_dict())
    else:
        print_table(report.build_table())


def read_settings(
    assignments: Sequence[str],
    dataset: str | None = None,
    proposer: str | None = None,
    kinds: Sequence[str] = ("generation", "proposer"),
) -> dict[str, Any]:
    """`key=value` by what it is an option of: the dataset, the scores, or one of `kinds` (kind.key=value)."""
    from sca_registry import datasets, metrics, proposers
    from sca_registry.overrides import read_assignment

    from sca.evaluation.scoring import SHARED_OPTIONS

    def is_text(path: tuple[str, ...]) -> bool:
        *above, option = path
        match above:
            case [] | ["dataset"]:
                return dataset is not None and datasets.takes_text(dataset, option)
            case ["proposer"]:
                return proposer is not None and proposers.takes_text(proposer, option)
            case [metric]:
                return metrics.takes_text(metric, option)
        return False

    given: dict[str, Any] = {kind: {} for kind in ("dataset", "scores", *kinds)}
    for assignment in assignments:
        path, value = read_assignment(assignment, is_text)
        if len(path) == 2 and path[0] in kinds:
            given[path[0]][path[1]] = value
        elif len(path) == 2 or path[0] in SHARED_OPTIONS:
            given["scores"][".".join(path)] = value
        elif len(path) == 1:
            given["dataset"][path[0]] = value
        else:
            raise ValueError(f"{assignment!r}: write option=value, or metric.option=value")
    return given


def _protocol(
    model: str,
    protocol: Any,
    given: dict[str, Any],
    metrics: Sequence[str] | None,
    chosen: Sequence[str | None],
    controls: Sequence[str],
    seed: int,
    out: Path | None,
    quiet: bool,
    how: dict[str, Any],
) -> list[EvaluationReport | None]:
    from dataclasses import replace

    from sca.evaluation.protocol import available_metrics

    split, prompt, proposer = chosen
    if split or prompt:
        raise ValueError(f"the protocol {protocol.name} has its own splits and prompts: leave out --split and --prompt")
    settings = {**protocol.settings, **given["scores"]}
    wanted = metrics
    if not wanted:
        wanted, missing = available_metrics(protocol, settings)
        if missing and not quiet:
            complain(f"left out {', '.join(missing)} of {protocol.name}; name one with --metrics for the reason")
    reports = []
    for run in protocol.runs:
        questions = replace(run.questions, controls=tuple(controls), seed=seed)
        questions = replace(questions, generation={**run.generation, **given["generation"]})
        finder = proposer or run.proposer if run.proposer else None
        found = {"name": finder, **given["proposer"]} if finder else None
        table = {"name": run.dataset, **run.options, **given["dataset"]}
        folder = out and out / run.name
        reports.append(_run(model, table, run.split, questions, found, wanted, settings, folder, quiet, how))
    return reports


def _run(
    model: str,
    dataset: dict[str, Any],
    split: str,
    questions: Any,
    proposer: dict[str, Any] | None,
    metrics: Sequence[str] | None,
    settings: dict[str, Any],
    out: Path | None,
    quiet: bool,
    how: dict[str, Any],
) -> EvaluationReport | None:
    from rich.console import Console
    from rich.progress import Progress

    from sca.evaluation.evaluate import SCORES_NAME
    from sca.evaluation.evaluate import evaluate as run
    from sca.io.atomic import open_folder, write_file

    if out:
        open_folder(out)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        bar = progress.add_task("images", total=None)
        report = run(
            model,
            dataset,
            split,
            prompting=questions,
            proposer=proposer,
            metrics=metrics,
            metric_options=settings,
            folder=out,
            **how,
            progress=lambda done, every: progress.update(bar, completed=done, total=every),
            report=None if quiet else complain,
        )
    if out and report is not None:
        write_file(out / SCORES_NAME, f"{json.dumps(report.to_dict(), indent=1)}\n")
        if not quiet:
            complain(f"wrote {out / 'predictions.jsonl'} and {out / SCORES_NAME}")
    return report


def _is_protocol(name: str) -> bool:
    import sca_registry

    from sca.evaluation import protocol

    if name in protocol.list_protocols():
        return True
    if name not in sca_registry.datasets.names() and ":" not in name:
        from sca_registry.messages import unknown

        known = [*sca_registry.datasets.names(), *protocol.list_protocols()]
        raise unknown(f"no dataset or protocol {name!r}", name, known)
    return False


def listed(names: str) -> list[str]:
    return [name for each in names.split(",") if (name := each.strip())]


def _own(device: str) -> str:
    """Under a launcher each process has a GPU of its own."""
    import os

    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device
