"""`sca evaluate` and `sca score`: evaluate a model on a dataset, and score a predictions file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from sca_registry.spec import ComponentSpec

from sca.cli.options import (
    METRIC_OPTIONS_HELP,
    AllowExternal,
    AsJson,
    Device,
    Metrics,
    TrustRemoteCode,
    Zoom,
    check_option_choice,
    parse_evaluation_options,
    parse_input_path,
    print_json,
    print_stderr,
    print_table,
    split_names,
)
from sca.devices import resolve_device
from sca.inference.zoom_options import DEFAULT_ZOOM

if TYPE_CHECKING:
    from sca.evaluation.evaluate import EvaluationReport
    from sca.evaluation.predictions import PromptingOptions
    from sca.evaluation.protocol import EvaluationProtocol, ProtocolRun

OPTIONS_HELP = (
    "Dataset options (root=FOLDER), generation options (generation.num_beams=3), proposer options "
    "(proposer.points_per_side=16) and metric options (references=first, tokenizer=plain, semantic.model=FOLDER)."
)


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="Model to use: a name from `sca list models`, a checkpoint folder, or a captioner written as "
            "'[ENCODER+]NAME [key=value]...', such as sam-vit-b+blip-base."
        ),
    ],
    dataset: Annotated[str, typer.Argument(help="Dataset (scenes, coco, visual-genome, ...) or evaluation protocol.")],
    options: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help=OPTIONS_HELP)] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Dataset split, such as train, val, test or testA. Defaults to val.", rich_help_panel="Data"),
    ] = None,
    max_images: Annotated[
        int | None,
        typer.Option("--max-images", "--limit", help="Maximum number of images.", min=1, rich_help_panel="Data"),
    ] = None,
    prompt_type: Annotated[
        str | None,
        typer.Option(
            help="Prompt type: box, center (the center of the box), random-point (a random point inside the box), "
            "mask-point (a random point inside the mask), box-and-point or mask.",
            rich_help_panel="Prompts",
        ),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            help="Also evaluate with deliberately wrong inputs, as a negative control: wrong-region, color-swap or "
            "shuffled-mask. Repeatable.",
            rich_help_panel="Prompts",
        ),
    ] = None,
    proposer: Annotated[
        str | None,
        typer.Option(
            help="Region proposer for dense captioning and comprehension, such as grid: 'NAME [key=value]...'.",
            rich_help_panel="Prompts",
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Word or phrase to find; requires a --proposer that takes text, such as owlv2-base. Repeatable.",
            rich_help_panel="Prompts",
        ),
    ] = None,
    zoom: Zoom = DEFAULT_ZOOM,
    caption_task: Annotated[
        str,
        typer.Option(
            help="Task that generates the evaluated captions, for a model with further tasks, such as detail.",
            rich_help_panel="Generation",
        ),
    ] = "caption",
    caption_all: Annotated[
        bool,
        typer.Option(
            "--caption-all",
            help="Also caption regions without a reference caption, for metrics that need none, such as positions.",
            rich_help_panel="Generation",
        ),
    ] = False,
    runs: Annotated[
        str | None,
        typer.Option(
            help="Runs of a protocol, comma-separated, such as refcocog-val. Defaults to all.", rich_help_panel="Data"
        ),
    ] = None,
    metrics: Metrics = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Output folder for predictions.jsonl and scores.json. The same command resumes an interrupted run.",
            rich_help_panel="Output",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a different run in --out.", rich_help_panel="Output")
    ] = False,
    as_json: AsJson = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Suppress the progress bar and notes.", rich_help_panel="Output")
    ] = False,
    device: Device = "cpu",
    batch_size: Annotated[int, typer.Option(help="Images per batch.", min=1, rich_help_panel="Runtime")] = 8,
    seed: Annotated[int, typer.Option(help="Random seed for sampled point prompts.", rich_help_panel="Runtime")] = 0,
    trust_remote_code: TrustRemoteCode = False,
    allow_external: AllowExternal = False,
) -> None:
    """Evaluate a model on a dataset or with an evaluation protocol.

    Under `accelerate launch` or torchrun, every process captions its share of the images. A protocol is a
    fixed set of evaluations, most of them those of a paper; scores that the paper reports are printed next to the
    measured ones.
    """
    from sca.evaluation import protocol as protocols
    from sca.evaluation.predictions import CONTROLS, PROMPT_TYPES, PromptingOptions
    from sca.io.atomic import create_writable_folder

    if prompt_type is not None:
        check_option_choice("prompt-type", prompt_type, list(PROMPT_TYPES))
    for each in control or ():
        check_option_choice("control", each, list(CONTROLS))
    if text and not proposer:
        raise ValueError("--text requires --proposer with a proposer that takes text, such as owlv2-base")
    if proposer and (prompt_type or control or caption_all):
        raise ValueError("--proposer finds the regions to caption; omit --prompt-type, --control and --caption-all")
    proposer_component = ComponentSpec.parse(proposer, "proposer", "proposers") if proposer else None
    parsed_options = parse_evaluation_options(
        options or (), dataset, proposer_component.name if proposer_component else None
    )
    device = _get_process_device(device)
    resolve_device(device)
    if out:
        create_writable_folder(out)
    proposer_options = parsed_options["proposer"]
    requested = PlannedRun(
        dataset={"name": dataset, **parsed_options["dataset"]},
        split=split or "val",
        prompting=PromptingOptions(
            prompt_type=prompt_type or "box",
            controls=tuple(control or ()),
            seed=seed,
            generation=parsed_options["generation"],
            zoom=zoom,
            caption_task=caption_task,
            caption_all=caption_all,
        ),
        proposer=_make_proposer_table(proposer_component, proposer_options, text or ()),
        metrics=metrics and split_names(metrics),
        metric_options=parsed_options["scores"],
        out=out,
    )
    protocol = None
    if _is_protocol(dataset):
        if split or prompt_type:
            raise ValueError(f"the protocol {dataset} defines its splits and prompts; omit --split and --prompt-type")
        protocol = protocols.select_runs(protocols.read_protocol(dataset), runs and split_names(runs))
        planned_runs = _plan_protocol_runs(protocol, requested, proposer_options, quiet)
    else:
        if runs:
            raise ValueError(f"--runs selects runs of a protocol, and {dataset!r} is a dataset; omit --runs")
        if proposer_options and not proposer:
            raise _make_missing_proposer_error(proposer_options)
        planned_runs = [requested]
    run_options = {"batch_size": batch_size, "max_images": max_images, "device": device, "overwrite": overwrite}
    run_options |= {"trust_remote_code": trust_remote_code, "allow_external": allow_external}
    reports = [_evaluate_with_progress(model, each, quiet, run_options) for each in planned_runs]
    own_reports = [report for report in reports if report is not None]  # with several processes, only one has them
    if as_json and own_reports:
        report_dicts = [report.to_dict() for report in own_reports]
        print_json(report_dicts if protocol else report_dicts[0])
    elif own_reports:
        for index, report in enumerate(own_reports):
            print_table(report.build_table())
            if protocol and protocol.runs[index].scores:
                protocol_run = protocol.runs[index]
                print_table(
                    protocols.build_comparison_table(protocol_run, report.run["model"], report.scores, protocol.source)
                )


def score(
    predictions: Annotated[
        Path,
        typer.Argument(
            parser=parse_input_path,
            help="Predictions file (predictions.jsonl), or its folder. Use - for standard input.",
        ),
    ],
    options: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help=METRIC_OPTIONS_HELP)] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Check that the predictions cover exactly the regions of this dataset. Set its options as "
            "dataset.key=value.",
            rich_help_panel="Data",
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Dataset split.", rich_help_panel="Data")] = "val",
    metrics: Metrics = None,
    as_json: AsJson = False,
) -> None:
    """Score a predictions file without running a model.

    The file is JSON Lines with one region per line. Each line needs at least {"image_id": 1, "region_id": 2,
    "caption": "a red car", "references": ["the red car"]}. Two further formats are recognized: samples that lmms-eval
    logs for region captioning tasks, and the judge's answers that the evaluation of DLC-Bench or ParaDLC-Bench writes.
    """
    from sca.evaluation.evaluate import score_file
    from sca.evaluation.judge_results import score_judge_results

    parsed_options = parse_evaluation_options(options or (), dataset, table_names=("dataset",))
    if parsed_options["dataset"] and dataset is None:
        raise ValueError(
            f"dataset options such as {next(iter(parsed_options['dataset']))} require --dataset; add --dataset NAME"
        )
    expected_dataset = {"name": dataset, **parsed_options["dataset"]} if dataset else None
    metric_names, metric_options = metrics and split_names(metrics), parsed_options["scores"]
    reports = score_judge_results(predictions, metric_names, metric_options)
    if reports is None:
        reports = [score_file(predictions, metric_names, metric_options, expected_dataset, split)]
    elif dataset:
        raise ValueError(
            f"{predictions} contains judge results, which are not checked against a dataset; omit --dataset"
        )
    if as_json:
        report_dicts = [report.to_dict() for report in reports]
        print_json(report_dicts[0] if len(report_dicts) == 1 else report_dicts)
    else:
        for report in reports:
            print_table(report.build_table())


class PlannedRun(NamedTuple):
    """One evaluation of a command.

    Attributes:
        dataset: Name and options of the dataset.
        split: Split of the dataset.
        prompting: Prompt type, tasks, controls and generation options.
        proposer: Name and options of the proposer; None without one.
        metrics: Names of the metrics; None for all that the data supports.
        metric_options: Options of the metrics.
        out: Output folder.
    """

    dataset: Mapping[str, Any]
    split: str
    prompting: PromptingOptions
    proposer: Mapping[str, Any] | None
    metrics: Sequence[str] | None
    metric_options: Mapping[str, Any]
    out: Path | None


def _plan_protocol_runs(
    protocol: EvaluationProtocol, requested: PlannedRun, proposer_options: Mapping[str, Any], quiet: bool
) -> list[PlannedRun]:
    """Return the runs of a protocol with the options of the command, whose proposer replaces that of the protocol."""
    from dataclasses import replace

    from sca.evaluation.protocol import find_available_metrics

    if not any(map(_accepts_proposer, protocol.runs)) and (requested.proposer or proposer_options):
        option = "--proposer" if requested.proposer else f"the option proposer.{next(iter(proposer_options))}"
        raise ValueError(f"the protocol {protocol.name} prompts the regions of its datasets; omit {option}")
    if proposer_options and not requested.proposer and not any(run.proposer for run in protocol.runs):
        raise _make_missing_proposer_error(proposer_options)
    metric_options = {**protocol.metric_options, **requested.metric_options}
    metrics = requested.metrics
    if not metrics:
        metrics, missing = find_available_metrics(protocol, metric_options)
        if missing and not quiet:
            print_stderr(
                f"skipped the metrics {', '.join(missing)} of {protocol.name}; pass one with --metrics to see the "
                "reason"
            )
    dataset_options = {key: value for key, value in requested.dataset.items() if key != "name"}
    caption_task = requested.prompting.caption_task
    if caption_task != "caption" and not any("caption" in run.tasks for run in protocol.runs):
        raise ValueError(f"the protocol {protocol.name} generates no captions; omit --caption-task")
    if requested.prompting.caption_all:
        raise ValueError(f"the protocol {protocol.name} defines the regions to caption; omit --caption-all")
    planned_runs = []
    for run in protocol.runs:
        proposer = requested.proposer if _accepts_proposer(run) else None
        if proposer is None and run.proposer:
            proposer = _make_proposer_table(ComponentSpec(run.proposer), proposer_options, ())
        prompting = replace(
            run.prompting,
            controls=requested.prompting.controls,
            seed=requested.prompting.seed,
            generation={**run.generation, **requested.prompting.generation},
            zoom=requested.prompting.zoom,
            caption_task=caption_task if "caption" in run.tasks else "caption",
        )
        dataset = {"name": run.dataset, **run.dataset_options, **dataset_options}
        folder = requested.out and requested.out / run.name
        planned_runs.append(PlannedRun(dataset, run.split, prompting, proposer, metrics, metric_options, folder))
    return planned_runs


def _make_missing_proposer_error(proposer_options: Mapping[str, Any]) -> ValueError:
    name = next(iter(proposer_options))
    return ValueError(f"the option proposer.{name} requires --proposer; add --proposer NAME")


def _accepts_proposer(run: ProtocolRun) -> bool:
    from sca.evaluation.predictions import COMPREHENSION_TASK

    return run.proposer is not None or list(run.tasks) == [COMPREHENSION_TASK]


def _make_proposer_table(
    proposer: ComponentSpec | None, options: Mapping[str, Any], text: Sequence[str]
) -> dict[str, Any] | None:
    """Return the name and all options of a proposer; None without one."""
    if proposer is None:
        return None
    from sca.inference.proposer import add_text

    return add_text(ComponentSpec(proposer.name, {**proposer.options, **options}), text).to_dict()


def _evaluate_with_progress(
    model: str, run: PlannedRun, quiet: bool, run_options: Mapping[str, Any]
) -> EvaluationReport | None:
    from rich.console import Console
    from rich.progress import Progress

    from sca.evaluation.evaluate import SCORES_NAME
    from sca.evaluation.evaluate import evaluate as evaluate_model
    from sca.io.atomic import create_writable_folder, write_file

    if run.out:
        create_writable_folder(run.out)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        progress_task = progress.add_task("images", total=None)
        report = evaluate_model(
            model,
            run.dataset,
            run.split,
            prompting=run.prompting,
            proposer=run.proposer,
            metrics=run.metrics,
            metric_options=run.metric_options,
            folder=run.out,
            **run_options,
            progress=lambda done, total: progress.update(progress_task, completed=done, total=total),
            report=None if quiet else print_stderr,
        )
    if run.out and report is not None:
        write_file(run.out / SCORES_NAME, f"{json.dumps(report.to_dict(), indent=1)}\n")
        if not quiet:
            print_stderr(f"wrote {run.out / 'predictions.jsonl'} and {run.out / SCORES_NAME}")
    return report


def _is_protocol(name: str) -> bool:
    import sca_registry

    from sca.evaluation import protocol

    if name in protocol.list_protocols():
        return True
    if name not in sca_registry.datasets.list_names() and ":" not in name:
        from sca_registry.errors import make_unknown_name_error

        known = [*sca_registry.datasets.list_names(), *protocol.list_protocols()]
        raise make_unknown_name_error(f"unknown dataset or protocol {name!r}", name, known)
    return False


def _get_process_device(device: str) -> str:
    """Return the device of this process: under a launcher, each process has its own GPU."""
    import os

    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device
