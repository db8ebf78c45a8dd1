"""Facts about a checkpoint, read from its files without loading weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sca_registry.overrides import MODEL_COMPONENTS
from sca_registry.spec import ComponentSpec, ModelSpec

from sca.io.errors import InputError
from sca.io.json import read_json
from sca.io.score_format import format_score

TRAINING_SETTINGS = ("train.steps", "train.batch_size", "train.learning_rate", "train.seed")
MODEL_FOLDERS = ("model", "best")  # folders of checkpoints in the folder of a training run


def describe_checkpoint(folder: Path) -> dict[str, Any]:
    """Return the facts of a checkpoint folder, or of the model in the folder of a training run.

    Args:
        folder: Checkpoint folder, or folder of a training run.

    Returns:
        The components, the number of parameters and the version that wrote the checkpoint. For a layout of another
        program, its name, the components, and the command that imports the checkpoint. For a checkpoint in the folder
        of a training run, also its training settings and best validation score.

    Raises:
        InputError: There is no checkpoint, or one of its files or the marker of the run is damaged.
    """
    from sca.checkpoints.layout import ORIGIN_FILE, read_layout
    from sca.checkpoints.load import open_checkpoint, read_foreign_spec
    from sca.io.run_folder import MARKER_FILE, read_runs

    is_run = (folder / MARKER_FILE).is_file() and "train" in read_runs(folder)
    if is_run:
        folder = next((path for name in MODEL_FOLDERS if (path := folder / name).is_dir()), folder)
        if folder.name not in MODEL_FOLDERS:
            raise InputError(f"{folder} contains a training run without a model yet; repeat its command to resume")
    folder, spec = open_checkpoint(folder)
    facts: dict[str, Any] = {"name": str(folder), "kind": "model"}
    if spec is None:
        facts |= {"layout": read_layout(folder), "use": f"sca import {folder}"}
        return facts | describe_spec(read_foreign_spec(folder))
    facts |= describe_spec(spec)
    facts |= count_parameters(spec)
    if (folder / ORIGIN_FILE).is_file():
        facts |= _read_fields(folder / ORIGIN_FILE, ("written_by", "commit"))
    is_run_output = folder.resolve().name in MODEL_FOLDERS  # only these are stored in the folder of a training run
    return facts | (describe_training(folder.resolve().parent) if is_run_output else {})


def describe_spec(spec: ModelSpec) -> dict[str, str]:
    """Return the components of a model with their options, its LoRA, and its trainable groups."""
    facts = {
        name: format_component(component) for name in MODEL_COMPONENTS if (component := getattr(spec, name)) is not None
    }
    if spec.lora is not None:
        facts["lora"] = format_options(spec.to_dict()["lora"])
    facts["tasks"] = ", ".join(spec.task_names)
    if spec.geometry is not None:
        facts["geometry"] = spec.geometry
    if inputs := [name for name in ("questions", "lengths") if getattr(spec, name)]:
        facts["supports"] = ", ".join(inputs)
    return facts | {"trainable": ", ".join(spec.trainable)}


def describe_training(run: Path) -> dict[str, Any]:
    """Return the training facts of a run folder; empty for any other folder."""
    from sca.io.run_folder import read_runs

    training = read_runs(run).get("train")
    if training is None:
        return {}
    settings = training.settings
    data = settings.get("data")
    options = {name.removeprefix("train."): value for name, value in settings.items() if name in TRAINING_SETTINGS}
    facts = {
        "trained_by": f"sca train, {'finished' if training.finished else 'not finished'}, in {run}",
        "trained_on": ", ".join(map(str, data)) if isinstance(data, Mapping) else None,
        "training": format_options(options),
        "trained_from": settings.get("model") if isinstance(settings.get("model"), str) else None,
    }
    if (run / "best.json").is_file():
        best = _read_fields(run / "best.json", ("metric", "score", "step"))
        facts["best_score"] = f"{best['metric']} {_format_stored_score(best['score'])} at step {best['step']}"
    return facts


def count_parameters(spec: ModelSpec) -> dict[str, Any]:
    """Return the number of parameters, or the reason why the model cannot be built; allocate no memory."""
    from sca_registry import RegistryError

    from sca.builder import build

    try:
        parameters = list(build(spec, "meta").parameters())
    except RegistryError as error:
        return {"state": "broken", "reason": str(error)}
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trainable_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "state": "ok",
    }


def _read_fields(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Read fields of an untrusted JSON object as strings."""
    table = read_json(path)
    if not isinstance(table, dict):
        raise InputError(f"{path} does not contain a JSON object; correct the file, or copy it again")
    return {name: str(table.get(name, "")) for name in names}


def _format_stored_score(text: str) -> str:
    try:
        return format_score(float(text))
    except ValueError:
        return text


def format_component(component: ComponentSpec) -> str:
    """Format a component as NAME(OPTION=VALUE, ...)."""
    return f"{component.name}({format_options(component.options)})" if component.options else component.name


def format_options(options: Mapping[str, Any]) -> str:
    """Format options as OPTION=VALUE, ..."""
    return ", ".join(f"{key}={value}" for key, value in options.items())
