"""`sca train`: train a model from a recipe with `key=value` overrides."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from sca.cli.options import AllowExternal, TrustRemoteCode, print_document, print_line, print_stderr


def train(
    recipe: Annotated[str, typer.Argument(help="Name of a bundled recipe, or a TOML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Recipe overrides, such as train.steps=200 mixer.depth=3."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Run folder; the final model is saved in its subfolder model/. Defaults to runs/RECIPE.",
            rich_help_panel="Output",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(help="Resume an interrupted run in the run folder, or start it over.", rich_help_panel="Output"),
    ] = True,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace a different run in the run folder.", rich_help_panel="Output"),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Suppress the progress bar and the training log.", rich_help_panel="Output")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_external: AllowExternal = False,
) -> None:
    """Train a model from a recipe. The same command resumes an interrupted run.

    If the run folder contains a different run: with --overwrite, the command replaces that run; with only --out, it
    fails; with neither, it renames the existing folder and starts the new run.
    """
    from sca.training.recipe import Recipe

    loaded_recipe = Recipe.read(recipe, overrides or ())
    folder = out or Path("runs") / loaded_recipe.name
    trust_options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "allow_external": allow_external}
    import torch

    from sca.training.processes import join_processes, run_processes
    from sca.training.train import check_recipe, compute_images_per_process, compute_regions_per_process
    from sca.training.train import train as train_recipe

    num_processes = torch.cuda.device_count() or loaded_recipe.train.num_processes
    if num_processes > 1 and "RANK" not in os.environ:
        compute_images_per_process(loaded_recipe.train, num_processes)
        compute_regions_per_process(loaded_recipe.train, num_processes)
        check_recipe(loaded_recipe, **trust_options)  # report a mistake once, before any process starts
        flag_values = {"--quiet": quiet, "--trust-remote-code": trust_remote_code, "--allow-external": allow_external}
        flag_values |= {"--overwrite": overwrite}
        options = ["--resume" if resume else "--no-resume", *(flag for flag, is_set in flag_values.items() if is_set)]
        options += ["--out", str(out)] if out else []
        raise typer.Exit(run_processes(num_processes, ["train", *options, "--", recipe, *(overrides or ())]))
    is_main_process = os.environ.get("RANK", "0") == "0"
    conflict_options: dict[str, Any] = {"overwrite": overwrite, "rename_existing": out is None and not overwrite}
    with join_processes():
        model = train_recipe(
            loaded_recipe, folder, resume=resume, quiet=quiet, report=print_stderr, **conflict_options, **trust_options
        )
    if is_main_process:
        print_document(model.summarize_parameters())
        model_folder = os.path.join(folder, "model")  # with a separator, even for "."
        print_line(f"wrote {model_folder}; use it with: sca caption IMAGE --model {model_folder}")
