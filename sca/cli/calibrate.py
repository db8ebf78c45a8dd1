"""`sca calibrate`: calibrate the confidences and OOD scores of a checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

from sca.cli.options import (
    AllowExternal,
    AsJson,
    Device,
    TrustRemoteCode,
    check_option_choice,
    parse_evaluation_options,
    print_json,
    print_stderr,
    print_table,
)
from sca.devices import resolve_device


def calibrate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, such as runs/own/model.")],
    dataset: Annotated[str, typer.Argument(help="Dataset (scenes, coco, coco-json, ...) with class names.")],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Dataset options, such as root=FOLDER.")
    ] = None,
    split: Annotated[
        str, typer.Option(help="Split that the model was not trained on.", rich_help_panel="Data")
    ] = "val",
    train_split: Annotated[
        str, typer.Option(help="Split with the training images, for the OOD score.", rich_help_panel="Data")
    ] = "train",
    no_ood: Annotated[
        bool,
        typer.Option(
            "--no-ood", help="Skip the OOD score, which requires the training images.", rich_help_panel="Data"
        ),
    ] = False,
    max_images: Annotated[
        int | None, typer.Option(help="Maximum number of held-out images.", min=2, rich_help_panel="Data")
    ] = None,
    max_training_images: Annotated[
        int, typer.Option(help="Maximum number of training images.", min=20, rich_help_panel="Data")
    ] = 1000,
    prompt_type: Annotated[
        list[str] | None,
        typer.Option(
            help="Prompt type to calibrate, as for `sca evaluate`. Defaults to box, mask-point, box-and-point and "
            "mask. Repeatable.",
            rich_help_panel="Prompts",
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Suppress the progress bar and notes.", rich_help_panel="Output")
    ] = False,
    device: Device = "cpu",
    batch_size: Annotated[int, typer.Option(help="Images per batch.", min=1, rich_help_panel="Runtime")] = 8,
    seed: Annotated[int, typer.Option(help="Random seed of point prompts and crops.", rich_help_panel="Runtime")] = 0,
    trust_remote_code: TrustRemoteCode = False,
    allow_external: AllowExternal = False,
) -> None:
    """Calibrate the confidences and OOD scores of a checkpoint.

    The confidence is fitted on one half of the held-out images; the printed errors are measured on the other half. The
    result is stored in the checkpoint folder. From then on, captions of the model have a confidence, and an OOD
    (out-of-distribution) score above 1 for images that are unlike the training images. Earlier results for the same
    weights that are not measured again are kept.
    """
    from rich.console import Console
    from rich.progress import Progress

    from sca.checkpoints.layout import UNCERTAINTY_FILE
    from sca.evaluation.calibration import DEFAULT_PROMPT_TYPES, calibrate_checkpoint
    from sca.evaluation.predictions import PROMPT_TYPES

    for each in prompt_type or ():
        check_option_choice("prompt-type", each, list(PROMPT_TYPES))
    dataset_options = parse_evaluation_options(options or (), dataset, table_names=())["dataset"]
    resolve_device(device)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as progress_bar:
        progress_task = progress_bar.add_task("images", total=None)
        report = calibrate_checkpoint(
            model,
            {"name": dataset, **dataset_options},
            split,
            train_split=None if no_ood else train_split,
            prompt_types=prompt_type or DEFAULT_PROMPT_TYPES,
            max_images=max_images,
            max_training_images=max_training_images,
            batch_size=batch_size,
            device=device,
            seed=seed,
            progress=lambda step, done, total: progress_bar.update(
                progress_task, description=step, completed=done, total=total
            ),
            trust_remote_code=trust_remote_code,
            allow_external=allow_external,
        )
    if as_json:
        print_json(report.to_dict())
    else:
        print_table(report.build_table())
    if not quiet:
        print_stderr(f"wrote {model.rstrip('/')}/{UNCERTAINTY_FILE}")
