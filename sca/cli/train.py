"""`sca train`: a recipe, changed by `key=value`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from sca.cli.options import AllowExternal, TrustRemoteCode


def train(
    recipe: Annotated[str, typer.Argument(help="a shipped recipe, or a TOML file")],
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="e.g. train.steps=200 mixer.depth=3")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the run; the model is OUT/model")] = None,
    resume: Annotated[bool, typer.Option(help="continue what an interrupted run left in OUT")] = True,
    trust_remote_code: TrustRemoteCode = False,
    allow_external: AllowExternal = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bar")] = False,
) -> None:
    """Trains a model; an interrupted run continues when the same command is given again."""
    from sca.training.recipe import Recipe

    plan = Recipe.read(recipe, changes or ())
    folder = out or Path("runs") / plan.name
    agreed = {"trust_remote_code": trust_remote_code, "allow_external": allow_external}
    import torch

    from sca.training.trainer import budget_each, images_each, prepare
    from sca.training.trainer import train as run

    processes = torch.cuda.device_count() or plan.train.processes
    if processes > 1 and "RANK" not in os.environ:
        images_each(plan.train, processes)
        budget_each(plan.train, processes)
        prepare(plan, **agreed)  # so that a mistake is told once, and before anything is started
        arguments = ["train", recipe, *(changes or ()), "--out", str(folder), "--resume" if resume else "--no-resume"]
        flags = {"--quiet": quiet, "--trust-remote-code": trust_remote_code, "--allow-external": allow_external}
        raise typer.Exit(_start(processes, arguments + [flag for flag, given in flags.items() if given]))
    first = os.environ.get("RANK", "0") == "0"
    model = run(plan, folder, resume=resume, quiet=quiet, **agreed)
    if first:
        typer.echo(model.freeze_report())
        written = os.path.join(folder, "model")  # with a separator, also of "."
        typer.echo(f"wrote {written}; use it with: sca caption IMAGE --model {written}")


def _start(processes: int, arguments: list[str]) -> int:
    """The same command in several processes of this machine, each with its share of the cores."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "sca"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads_each(processes))}
    return subprocess.run([sys.executable, *launcher, *arguments], env=environment, check=False).returncode


def threads_each(processes: int) -> int:
    """What OMP_NUM_THREADS says, at most a process's share of the cores: threads that share one wait for each other."""
    share = max(1, (os.cpu_count() or 1) // processes)
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(asked)) if asked.isdecimal() and int(asked) else share
