"""`sca train`: a recipe, changed by `key=value`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from sca.cli.options import AllowExternal, TrustRemoteCode, print_document, print_line, print_stderr


def train(
    recipe: Annotated[str, typer.Argument(help="a shipped recipe, or a TOML file")],
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="e.g. train.steps=200 mixer.depth=3")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the run; the model is OUT/model")] = None,
    resume: Annotated[bool, typer.Option(help="continue what an interrupted run left in OUT")] = True,
    trust_remote_code: TrustRemoteCode = False,
    allow_external: AllowExternal = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another run in OUT.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar and no training log.")] = False,
) -> None:
    """Trains a model; an interrupted run continues when the same command is given again.

    Another run in OUT is never continued: without --out its folder is renamed, with --out it needs --overwrite.
    """
    from sca.training.recipe import Recipe

    loaded_recipe = Recipe.read(recipe, changes or ())
    folder = out or Path("runs") / loaded_recipe.name
    trust_options = {"trust_remote_code": trust_remote_code, "allow_external": allow_external}
    import torch

    from sca.training.processes import join_processes, run_processes
    from sca.training.train import check_recipe, compute_images_per_process, compute_regions_per_process
    from sca.training.train import train as run

    num_processes = torch.cuda.device_count() or loaded_recipe.train.num_processes
    if num_processes > 1 and "RANK" not in os.environ:
        compute_images_per_process(loaded_recipe.train, num_processes)
        compute_regions_per_process(loaded_recipe.train, num_processes)
        check_recipe(
            loaded_recipe, **trust_options
        )  # so that mistakes are reported once, and before anything is started
        flag_values = {"--quiet": quiet, "--trust-remote-code": trust_remote_code, "--allow-external": allow_external}
        flag_values |= {"--overwrite": overwrite}
        options = ["--resume" if resume else "--no-resume", *(flag for flag, is_set in flag_values.items() if is_set)]
        options += ["--out", str(out)] if out else []
        raise typer.Exit(run_processes(num_processes, ["train", *options, "--", recipe, *(changes or ())]))
    is_main_process = os.environ.get("RANK", "0") == "0"
    conflict_options = {"overwrite": overwrite, "set_aside": out is None and not overwrite}
    with join_processes():
        model = run(
            loaded_recipe, folder, resume=resume, quiet=quiet, report=print_stderr, **conflict_options, **trust_options
        )
    if is_main_process:
        print_document(model.summarize_parameters())
        model_folder = os.path.join(folder, "model")  # with a separator, also of "."
        print_line(f"wrote {model_folder}; use it with: sca caption IMAGE --model {model_folder}")
