"""`sca evaluate` and `sca score`: evaluate a model on a dataset, and score a predictions file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from sca_registry.spec import ComponentSpec

from sca.cli.options import (
    AllowExternal,
    AsJson,
    Device,
    Metrics,
    TrustRemoteCode,
    Zoom,
    check_option_choice,
    parse_input_path,
    print_json,
    print_stderr,
    print_table,
)
from sca.devices import resolve_device
from sca.inference.zoom_options import DEFAULT_ZOOM

if TYPE_CHECKING:
    from sca.evaluation.evaluate import EvaluationReport
    from sca.evaluation.protocol import ProtocolRun

OPTIONS_HELP = (
    "Dataset options (root=FOLDER), generation options (generation.num_beams=3), proposer options "
    "(proposer.points_per_side=16) and metric options (references=first, tokenizer=plain, semantic.model=FOLDER)."
)
METRIC_OPTIONS_HELP = "Metric options, such as references=first, tokenizer=plain or semantic.model=FOLDER."


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
        int | None, typer.Option(help="Maximum number of images.", min=1, rich_help_panel="Data")
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

    Under `accelerate launch` or torchrun, every process captions its share of the images. Each protocol is the
    evaluation protocol of a paper; the scores that the paper reports are printed next to the measured ones.
    """
    from sca.evaluation import protocol as protocols
    from sca.evaluation.predictions import CONTROLS, PROMPT_TYPES
    from sca.io.atomic import create_writable_folder

    if prompt_type is not None:
        check_option_choice("prompt-type", prompt_type, list(PROMPT_TYPES))
    for each in control or ():
        check_option_choice("control", each, list(CONTROLS))
    if text and not proposer:
        raise ValueError("--text requires --proposer with a proposer that takes text, such as owlv2-base")
    if proposer and (prompt_type or control):
        raise ValueError("--proposer finds the regions to caption; omit --prompt-type and --control")
    proposer_component = ComponentSpec.parse(proposer, "proposer", "proposers") if proposer else None
    parsed_options = parse_evaluation_options(
        options or (), dataset, proposer_component.name if proposer_component else None
    )
    metric_names = metrics and split_names(metrics)
    device = _get_process_device(device)
    resolve_device(device)
    if out:
        create_writable_folder(out)
    run_options = {"batch_size": batch_size, "max_images": max_images, "device": device, "overwrite": overwrite}
    run_options |= {"trust_remote_code": trust_remote_code, "allow_external": allow_external}
    if _is_protocol(dataset):
        protocol = protocols.select_runs(protocols.read_protocol(dataset), runs and split_names(runs))
        reports = _evaluate_protocol(
            model,
            protocol,
            parsed_options,
            metric_names,
            (split, prompt_type),
            proposer_component,
            text or (),
            control or (),
            seed,
            zoom,
            out,
            quiet,
            run_options,
        )
    else:
        from sca.evaluation.predictions import PromptingOptions

        if runs:
            raise ValueError(f"--runs selects runs of a protocol, and {dataset!r} is a dataset; omit --runs")
        prompting = PromptingOptions(
            prompt_type=prompt_type or "box",
            controls=tuple(control or ()),
            seed=seed,
            generation=parsed_options["generation"],
            zoom=zoom,
        )
        dataset_table = {"name": dataset, **parsed_options["dataset"]}
        if parsed_options["proposer"] and not proposer:
            raise ValueError(
                f"the option proposer.{next(iter(parsed_options['proposer']))} requires --proposer; add --proposer NAME"
            )
        proposer_table = _make_proposer_table(proposer_component, parsed_options["proposer"], text or ())
        reports = [
            _evaluate_with_progress(
                model,
                dataset_table,
                split or "val",
                prompting,
                proposer_table,
                metric_names,
                parsed_options["scores"],
                out,
                quiet,
                run_options,
            )
        ]
        protocol = None
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
    "caption": "a red car", "references": ["the red car"]}.
    """
    from sca.evaluation.evaluate import score_file

    parsed_options = parse_evaluation_options(options or (), dataset, table_names=("dataset",))
    if parsed_options["dataset"] and dataset is None:
        raise ValueError(
            f"dataset options such as {next(iter(parsed_options['dataset']))} require --dataset; add --dataset NAME"
        )
    expected_dataset = {"name": dataset, **parsed_options["dataset"]} if dataset else None
    report = score_file(
        predictions, metrics and split_names(metrics), parsed_options["scores"], expected_dataset, split
    )
    if as_json:
        print_json(report.to_dict())
    else:
        print_table(report.build_table())


def parse_evaluation_options(
    assignments: Sequence[str],
    dataset: str | None = None,
    proposer: str | None = None,
    table_names: Sequence[str] = ("generation", "proposer"),
) -> dict[str, Any]:
    """Parse `key=value` options and group them: dataset, metrics, or one of `table_names` (kind.key=value).

    Args:
        assignments: `key=value` options.
        dataset: Name of the dataset, to read the options that are strings without quotes.
        proposer: Name of the proposer, for the same purpose.
        table_names: Prefixes of options that form a group.

    Returns:
        Options by group: "dataset", "scores" and each of `table_names`.

    Raises:
        ValueError: An option is malformed.
    """
    from sca_registry import datasets, metrics, proposers
    from sca_registry.overrides import parse_assignment

    from sca.evaluation.scoring import SHARED_OPTIONS

    def is_text(path: tuple[str, ...]) -> bool:
        *parents, option = path
        match parents:
            case [] | ["dataset"]:
                return dataset is not None and datasets.is_text_option(dataset, option)
            case ["proposer"]:
                return proposer is not None and proposers.is_text_option(proposer, option)
            case [metric]:
                return metrics.is_text_option(metric, option)
        return False

    options_by_table: dict[str, Any] = {kind: {} for kind in ("dataset", "scores", *table_names)}
    for assignment in assignments:
        path, value = parse_assignment(assignment, is_text)
        if len(path) == 2 and path[0] in table_names:
            options_by_table[path[0]][path[1]] = value
        elif len(path) == 2 or path[0] in SHARED_OPTIONS:
            options_by_table["scores"][".".join(path)] = value
        elif len(path) == 1:
            options_by_table["dataset"][path[0]] = value
        else:
            raise ValueError(f"{assignment!r} is not an option; write option=value, or metric.option=value")
    return options_by_table


def _evaluate_protocol(
    model: str,
    protocol: Any,
    parsed_options: dict[str, Any],
    metrics: Sequence[str] | None,
    overridden: Sequence[str | None],
    proposer: ComponentSpec | None,
    text: Sequence[str],
    controls: Sequence[str],
    seed: int,
    zoom: str,
    out: Path | None,
    quiet: bool,
    run_options: dict[str, Any],
) -> list[EvaluationReport | None]:
    from dataclasses import replace

    from sca.evaluation.protocol import find_available_metrics

    split, prompt_type = overridden
    if split or prompt_type:
        raise ValueError(f"the protocol {protocol.name} defines its splits and prompts; omit --split and --prompt-type")
    if proposer and not any(map(_accepts_proposer, protocol.runs)):
        raise ValueError(f"the protocol {protocol.name} prompts the regions of its datasets; omit --proposer")
    metric_options = {**protocol.metric_options, **parsed_options["scores"]}
    metric_names = metrics
    if not metric_names:
        metric_names, missing = find_available_metrics(protocol, metric_options)
        if missing and not quiet:
            print_stderr(
                f"skipped the metrics {', '.join(missing)} of {protocol.name}; pass one with --metrics to see the "
                "reason"
            )
    reports = []
    for protocol_run in protocol.runs:
        prompting = replace(protocol_run.prompting, controls=tuple(controls), seed=seed, zoom=zoom)
        prompting = replace(prompting, generation={**protocol_run.generation, **parsed_options["generation"]})
        run_proposer = proposer if _accepts_proposer(protocol_run) else None
        if run_proposer is None and protocol_run.proposer:
            run_proposer = ComponentSpec(protocol_run.proposer)
        proposer_table = _make_proposer_table(run_proposer, parsed_options["proposer"], text)
        dataset_table = {"name": protocol_run.dataset, **protocol_run.dataset_options, **parsed_options["dataset"]}
        folder = out and out / protocol_run.name
        reports.append(
            _evaluate_with_progress(
                model,
                dataset_table,
                protocol_run.split,
                prompting,
                proposer_table,
                metric_names,
                metric_options,
                folder,
                quiet,
                run_options,
            )
        )
    return reports


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
    model: str,
    dataset: dict[str, Any],
    split: str,
    prompting: Any,
    proposer: dict[str, Any] | None,
    metrics: Sequence[str] | None,
    metric_options: dict[str, Any],
    out: Path | None,
    quiet: bool,
    run_options: dict[str, Any],
) -> EvaluationReport | None:
    from rich.console import Console
    from rich.progress import Progress

    from sca.evaluation.evaluate import SCORES_NAME
    from sca.evaluation.evaluate import evaluate as evaluate_model
    from sca.io.atomic import create_writable_folder, write_file

    if out:
        create_writable_folder(out)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        progress_task = progress.add_task("images", total=None)
        report = evaluate_model(
            model,
            dataset,
            split,
            prompting=prompting,
            proposer=proposer,
            metrics=metrics,
            metric_options=metric_options,
            folder=out,
            **run_options,
            progress=lambda done, total: progress.update(progress_task, completed=done, total=total),
            report=None if quiet else print_stderr,
        )
    if out and report is not None:
        write_file(out / SCORES_NAME, f"{json.dumps(report.to_dict(), indent=1)}\n")
        if not quiet:
            print_stderr(f"wrote {out / 'predictions.jsonl'} and {out / SCORES_NAME}")
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


def split_names(names: str) -> list[str]:
    """Split comma-separated names."""
    return [name for each in names.split(",") if (name := each.strip())]


def _get_process_device(device: str) -> str:
    """Return the device of this process: under a launcher, each process has its own GPU."""
    import os

    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device
