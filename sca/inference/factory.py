"""Factory of captioners: load a checkpoint or a registered captioner by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sca_registry
import torch
from sca_registry import RegistryError, zoo
from sca_registry.contracts import Captioner
from sca_registry.errors import format_choices, make_unknown_name_error, suggest_name
from sca_registry.spec import ComponentSpec

from sca.checkpoints.load import load, locate_checkpoint, read_local_spec
from sca.checkpoints.trust import Trust
from sca.encoders.model_types import find_encoder_of_segmenter
from sca.hints import ARGUMENT_ALIASES
from sca.inference.engine import Engine
from sca.inference.prompt_arguments import check_task
from sca.inference.proposer import make_device_options
from sca.io.hub import resolve_local_path, suggest_path

MASK_ONLY = "none"  # the captioner of a segmenter without a language model
ENGINE_OPTIONS = ("precision", "region_batch_size")
LOAD_ARGUMENTS = ("device", "trust_remote_code", "allow_external", "revision")
NAME_FORMS_HINT = (
    "A folder written by `sca train`, a Hub id OWNER/NAME, encoder+captioner, such as sam-vit-b+blip-base, and an "
    "encoder with masks, such as sam-vit-b, are also accepted."
)


def load_captioner(
    source: str | Path | Mapping[str, Any],
    device: str | torch.device = "cpu",
    *,
    trust_remote_code: bool = False,
    allow_external: bool = False,
    revision: str | None = None,
    **options: Any,
) -> Captioner:
    """Load a captioner: an SCA model, a baseline or a vision-language model with a `caption` method.

    `source` is one of these:

    - A checkpoint: a model name, a folder or a Hub id.
    - The name of a registered captioner, such as "blip-base".
    - "encoder+captioner", such as "sam-vit-b+blip-base". The encoder predicts the masks.
    - To predict masks only: the name of an encoder that has a segmenter, such as "sam-vit-b", or a folder or Hub id of
      a transformers segmentation model.

    Options can follow a name, as in "sam-vit-b+blip-base batch_size=8". A dict has the key `name` and one key per
    option.

    Args:
        source: Captioner to load, in one of the forms above.
        device: Device of the model.
        trust_remote_code: Allow a checkpoint to run its own code; see `sca.load`.
        allow_external: Allow a checkpoint to refer to files outside its folder; see `sca.load`.
        revision: Revision of a Hub id; see `sca.load`.
        **options: Options of a registered captioner. The options of a checkpoint are `precision`, see `sca.load`, and
            `region_batch_size`, see `Engine`.

    Returns:
        An `Engine` for the checkpoint of a model, else an instance of the registered captioner.

    Raises:
        RegistryError: The name or an option is unknown.
        InputError: A file cannot be read.
    """
    trust_options = {"trust_remote_code": trust_remote_code, "allow_external": allow_external, "revision": revision}
    trust_options = {name: value for name, value in trust_options.items() if value}
    path = None if isinstance(source, Mapping) else resolve_local_path(source)
    if isinstance(source, Mapping):
        component = ComponentSpec.from_dict(source, "captioner")
    elif isinstance(source, Path) or (path is not None and path.exists()):
        return _load_checkpoint(source, device, trust_options, **options)
    else:
        component = ComponentSpec.parse(source, "a captioner", "captioners")
    for option in LOAD_ARGUMENTS:
        if option in component.options:
            raise RegistryError(
                f"{option} is not an option of {component.name!r}; pass it separately: "
                f"{option}=... in Python, --{option.replace('_', '-')} on the command line"
            )
    options = {**component.options, **options}
    names = [name.strip() for name in component.name.split("+")]
    if len(names) > 2:
        raise RegistryError(
            f"{component.name!r} is a combination of components whose mixer is untrained; pass a checkpoint folder "
            "or a model name (see `sca list models`)"
        )
    if len(names) == 2:
        options = {"encoder": {"name": names[0], **trust_options} if trust_options else names[0], **options}
    name = names[-1]
    if name in sca_registry.captioners:
        return _build_captioner(name, device, options)
    if len(names) == 2:
        known_names = sca_registry.captioners.list_names()
        raise make_unknown_name_error(
            f"{component.name!r} is encoder+captioner, and no captioner is named {name!r}", name, known_names
        )
    if name in zoo.list_names() or "/" in name or os.sep in name:
        return _load_checkpoint(name, device, trust_options, **options)
    if name in sca_registry.encoders:
        encoder_options = {key: value for key, value in options.items() if key not in ENGINE_OPTIONS}
        engine_options = {key: value for key, value in options.items() if key in ENGINE_OPTIONS}
        return _build_captioner(MASK_ONLY, device, {"encoder": {"name": name, **encoder_options}, **engine_options})
    known_names = [*zoo.list_names(), *sca_registry.captioners.list_names()]
    reason = make_unknown_name_error(f"no model, captioner or folder named {name!r}", name, known_names)
    raise RegistryError(f"{reason} {NAME_FORMS_HINT}{suggest_path(name)}")


def check_local_task(
    source: str | Path, task: str, *, trust_remote_code: bool = False, allow_external: bool = False
) -> None:
    """Check the task of a model before it is loaded, if its spec is on this machine; see `read_local_spec`.

    Args:
        source: Captioner, see `load_captioner`.
        task: Name of the task.
        trust_remote_code: Allow a checkpoint to run its own code; see `sca.load`.
        allow_external: Allow a checkpoint to refer to files outside its folder; see `sca.load`.

    Raises:
        ValueError: The model does not have the task.
        InputError: A file cannot be read.
    """
    spec = read_local_spec(source, Trust(trust_remote_code, allow_external))
    if spec is not None:
        check_task(task, spec.task_names)


def _build_captioner(name: str, device: str | torch.device, options: Mapping[str, Any]) -> Captioner:
    option_names = sca_registry.captioners.load_entry(name).options
    return sca_registry.captioners.build(name, **make_device_options(device, option_names), **options)


def _load_checkpoint(
    source: str | Path, device: str | torch.device, trust_options: Mapping[str, Any], **options: Any
) -> Captioner:
    for option in options:
        if option not in ENGINE_OPTIONS:
            hint = suggest_name(ARGUMENT_ALIASES.get(option, option), (*ENGINE_OPTIONS, *LOAD_ARGUMENTS))
            raise RegistryError(
                f"the model {str(source)!r} has no option {option!r}.{hint}{format_choices(ENGINE_OPTIONS)}"
            )
    folder = locate_checkpoint(source, trust_options.get("revision"))
    if find_encoder_of_segmenter(folder) is not None:
        return _build_captioner(MASK_ONLY, device, {"encoder": {"name": str(source), **trust_options}, **options})
    return Engine(load(source, device, options.pop("precision", None), **trust_options), **options)
