"""Checkpoints in this package's own layout: what was trained, in one folder that always loads.

spec.json              the names and options of every part, defaults included, and a format version
weights.safetensors    the tensors that have no other source: what was trained, and parts without pretrained weights
origin.json            which distribution and version gave each part
tokenizer/             where the language model was trained here
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from sca_registry import RegistryError, registry
from sca_registry.spec import ModelSpec, Part
from torch import Tensor

from sca.checkpoints.layout import ORIGIN, SPEC, WEIGHTS
from sca.checkpoints.state import BoundedBuild, assign, stored, tensors_hash, weights_hash
from sca.checkpoints.trust import TrustError, is_settable
from sca.composition import build, parts
from sca.devices import find_dtype
from sca.io.atomic import check_replaceable, new_folder
from sca.io.errors import InputError, OutputError
from sca.io.hub import fingerprint
from sca.io.json import open_regular_file, read_json
from sca.io.validation import read_object
from sca.language_models.hf import read_tokenizer
from sca.model import SegmentCaptioner

SPEC_BYTES = 2**20  # of a spec at most
# A distribution and its version as PEP 508 and PEP 440 write them: no URL, no option.
PACKAGE = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,98}[a-z0-9])?==[a-z0-9][a-z0-9.+!_-]{0,49}", re.ASCII | re.IGNORECASE)
MODULE = re.compile(r"[a-z_][\w.]{0,99}", re.ASCII | re.IGNORECASE)
CONTENT = (SPEC, WEIGHTS, ORIGIN, "tokenizer")  # all that `save` writes, and so all that it replaces


def save(
    model: SegmentCaptioner,
    folder: str | Path,
    dtype: str | torch.dtype | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a checkpoint folder; a kill at any moment leaves the old one or the new one, complete.

    Args:
        model: The model.
        folder: New, empty, or an older checkpoint, which is replaced. A folder with other files is never replaced.
        dtype: Of the stored floating-point tensors; by default unchanged.
        tensors: Used in place of the model's own, by name.

    Raises:
        OutputError: The folder contains something else, or cannot be written.
        ValueError: The model or the dtype is something else.
    """
    if not isinstance(model, SegmentCaptioner):
        raise ValueError(
            f"an object of type {type(model).__name__} cannot be saved; give a model, such as `predictor.model`"
        )
    folder, dtype = Path(folder), find_dtype(dtype)
    check_writable(folder)
    with new_folder(folder, CONTENT) as draft:
        _write(model, draft, dtype, tensors)
    return folder


def check_writable(folder: Path) -> None:
    """Check that a checkpoint may be written to a folder: a new or empty one, or one with nothing but a checkpoint.

    Raises:
        OutputError: The folder contains something else.
    """
    try:
        check_replaceable(folder, CONTENT)
        if folder.is_dir() and any(folder.iterdir()):
            read_spec(folder)
    except (OutputError, InputError) as error:
        raise OutputError(f"{error}; what is in it stays") from error


def is_saved(model: SegmentCaptioner, folder: Path) -> bool:
    """Whether a folder contains the checkpoint that `save` would write for a model."""
    try:
        same = read_spec(folder).to_dict() == json.loads(json.dumps(resolve_spec(model).to_dict()))
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (InputError, RegistryError, SafetensorError, OSError):
        return False
    return same and tensors_hash(found) == weights_hash(model)


@contextmanager
def spec_errors(folder: Path) -> Iterator[None]:
    """Raise what is wrong with the spec of a folder as an InputError that names its file."""
    try:
        yield
    except RegistryError as error:
        raise InputError(f"{folder / SPEC}: {error}{_brought_by(folder)}") from error
    except TrustError as error:
        raise InputError(f"{folder / SPEC}: {error}") from error


def load_native(folder: Path, spec: ModelSpec) -> SegmentCaptioner:
    with spec_errors(folder), BoundedBuild([folder / WEIGHTS], spec):
        model = build(spec)
    expected = stored(model)
    try:
        open_regular_file(folder / WEIGHTS).close()
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError as error:
        raise InputError(f"{folder} has no {WEIGHTS}: the checkpoint is incomplete") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / WEIGHTS} is broken ({error}): copy it again") from error
    assign(model, found, expected, folder / WEIGHTS, SPEC)
    if (folder / "tokenizer").is_dir():
        model.language_model.tokenizer = read_tokenizer(folder / "tokenizer")
    return model


def _write(
    model: SegmentCaptioner, folder: Path, dtype: torch.dtype | None, given: Mapping[str, Tensor] | None
) -> None:
    names = stored(model)
    tied: dict[int, str] = {}
    tensors = {}
    for name, tensor in (given or model.state_dict()).items():
        if name in names:
            tensor = tensor.detach().cpu()
            tensor = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
            if tied.setdefault(tensor.data_ptr(), name) != name:
                tensor = tensor.clone()  # tied weights are written twice
            tensors[name] = tensor.contiguous()
    (folder / WEIGHTS).write_bytes(serialise(tensors, metadata={"format": "pt"}))
    _write_json(folder / SPEC, resolve_spec(model).to_dict())
    _write_json(folder / ORIGIN, origin(model))
    tokenizer = model.language_model.tokenizer
    if tokenizer is not None and tokenizer is not getattr(model.language_model, "source_tokenizer", None):
        tokenizer.save(str(folder / "tokenizer"))


def resolve_spec(model: SegmentCaptioner) -> ModelSpec:
    """Return the spec of a model with every option that its parts have by default, so that other defaults in a later
    version of a part do not change the checkpoint.

    What a checkpoint may not set stays with the part, as does None: weights, revisions, paths, and options that run
    code. The segmenter is named, also where it is the encoder's own.
    """
    chosen = parts(model.spec, model.encoder)
    return replace(
        model.spec,
        **{kind: Part(part.name, {**_defaults(kind, part), **part.options}) for kind, part in chosen.items()},
    )


def _defaults(kind: str, part: Part) -> dict[str, Any]:
    """The default options of a part that a checkpoint may set, as JSON has them."""
    defaults = registry(kind).describe(part.name).options
    return {
        option: list(value) if isinstance(value, tuple) else value
        for option, value in defaults.items()
        if is_settable(kind, part.name, option, value)
    }


def origin(model: SegmentCaptioner) -> dict[str, Any]:
    """Which distribution and version gives each part of a model, and which weights those with a source of their own
    have; and the commit of this package, where it is a checkout.
    """
    givers = {}
    for kind, part in parts(model.spec, model.encoder).items():
        entry = registry(kind).describe(part.name)
        givers[kind] = {"name": part.name, "distribution": entry.distribution, "version": entry.version}
        built = getattr(model, kind)
        source = getattr(built, "checkpoint", None)
        if source == registry(kind).card(part.name).options.get("weights"):  # else the card speaks of other weights
            givers[kind] |= {"licence": entry.licence} if entry.licence else {}
        if source:
            try:
                givers[kind] |= fingerprint(source, getattr(built, "revision", None), getattr(built, "prefix", ""))
            except InputError:  # weights that have gone meanwhile, or that a part finds in a way of its own
                givers[kind] |= {"weights": str(source)}
    commit = _commit()
    written_by = f"segment-caption-anything {version('segment-caption-anything')}"
    return {"written_by": written_by, **({"commit": commit} if commit else {}), "parts": givers}


def _commit() -> str | None:
    """Of the checkout that this package lies in; None where it does not."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or a checkout that is not ours to read
        return None
    return asked.stdout.strip()


def read_spec(folder: Path) -> ModelSpec:
    """The spec of a checkpoint folder. Raises InputError if there is none that can be read."""
    try:
        table = read_json(folder / SPEC, SPEC_BYTES, finite=True)
    except FileNotFoundError as error:
        raise InputError(f"{folder} has no {SPEC}, so it is not a model that `sca train` or sca.save wrote") from error
    try:
        return ModelSpec.from_dict(read_object(table, str(folder / SPEC)))
    except RegistryError as error:
        raise InputError(f"{folder / SPEC}: {error}") from error


def _brought_by(folder: Path) -> str:
    """What a checkpoint claims to need for the parts that have no name here; anyone may have written that claim."""
    try:
        parts = read_json(folder / ORIGIN)["parts"]
        absent = [part for kind, part in parts.items() if part["name"] not in registry(kind)]
        packages = {f"{part['distribution']}=={part['version']}" for part in absent}
        modules = sorted({part["distribution"] for part in absent if not part["version"]})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # absent, or not as we write it
        return ""
    named = sorted(package for package in packages if PACKAGE.fullmatch(package))
    if not named and modules and all(MODULE.fullmatch(module) for module in modules):
        code = "the program that saved it" if modules == ["__main__"] else ", ".join(modules)
        return f" Its {ORIGIN} claims that the code of {code} registered them; register them again before loading."
    if not named:
        return ""
    return f" Its {ORIGIN} claims that they come from {', '.join(named)}; install that only if you trust its publisher."


def _write_json(path: Path, table: Any) -> None:
    path.write_text(json.dumps(table, indent=1) + "\n", "utf-8")
