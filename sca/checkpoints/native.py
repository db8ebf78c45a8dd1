"""Checkpoints in the native layout: one folder with everything that cannot be restored from elsewhere.

spec.json              Names and options of all components, including defaults, and a format version.
weights.safetensors    Trained tensors, and those of components without pretrained weights.
origin.json            Distribution, version and pretrained weights of each component.
uncertainty.json       Calibrations and training domain, if they were measured; see `sca.checkpoints.uncertainty`.
tokenizer/             Tokenizer, unless it belongs to the pretrained language model.
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
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from sca_registry import RegistryError, get_registry
from sca_registry.contracts import Tokenizer
from sca_registry.spec import ComponentSpec, ModelSpec
from torch import Tensor

from sca.builder import build, resolve_components
from sca.checkpoints.layout import (
    CONFIG_FILE,
    ORIGIN_FILE,
    SPEC_FILE,
    UNCERTAINTY_FILE,
    WEIGHTS_FILE,
    find_external_links,
)
from sca.checkpoints.tensors import BuildSizeLimit, assign_tensors, hash_weights, list_stored_tensors
from sca.checkpoints.trust import EXTERNAL_REMEDY, TrustError, is_settable
from sca.checkpoints.uncertainty import hash_as_float32, read_uncertainty, serialize_uncertainty
from sca.devices import resolve_dtype
from sca.encoders.model_types import ENCODER_BY_MODEL_TYPE, find_encoder_of_segmenter, read_model_type
from sca.hints import check_argument_names
from sca.io.atomic import check_folder_replaceable, write_folder
from sca.io.errors import InputError, OutputError
from sca.io.hub import compute_weights_fingerprint
from sca.io.json import open_regular_file, read_json
from sca.io.validation import check_object
from sca.io.weight_files import describe_run_folder, hash_tensors
from sca.language_models.plain_tokenizer import PlainTokenizer, read_plain_tokenizer
from sca.language_models.quantization import QUANTIZATIONS
from sca.model import SegmentCaptioner
from sca.precision import check_has_float_weights

if TYPE_CHECKING:
    from sca.language_models.causal import TextTokenizer

MAX_SPEC_BYTES = 2**20
# Distribution and version as in PEP 508 and PEP 440; excludes URLs and pip options.
PACKAGE_PATTERN = re.compile(
    r"[a-z0-9](?:[a-z0-9._-]{0,98}[a-z0-9])?==[a-z0-9][a-z0-9.+!_-]{0,49}", re.ASCII | re.IGNORECASE
)
MODULE_PATTERN = re.compile(r"[a-z_][\w.]{0,99}", re.ASCII | re.IGNORECASE)
# All that `save` writes, and therefore all that it may replace.
CHECKPOINT_CONTENT = (
    SPEC_FILE,
    WEIGHTS_FILE,
    ORIGIN_FILE,
    UNCERTAINTY_FILE,
    "tokenizer",
)


@check_argument_names()
def save(
    model: SegmentCaptioner,
    folder: str | Path,
    dtype: str | torch.dtype | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    """Save a model as a checkpoint folder.

    The calibrations and the training domain of the model are saved if its weights are those that they were measured
    with. Writing is atomic: if the process is killed, the folder contains either the complete old or the complete new
    checkpoint.

    Args:
        model: Model to save.
        folder: New or empty folder, or an older checkpoint, which is replaced. A folder with other files is never
            replaced.
        dtype: Data type of the stored floating-point tensors; unchanged by default.
        tensors: State dict to store instead of the model's own.

    Returns:
        The folder.

    Raises:
        TypeError: Unknown keyword argument; the message suggests the closest one.
        OutputError: The folder contains other files, or cannot be written.
        ValueError: The model is not a `SegmentCaptioner` or has int8 layers, or the dtype is unknown.
    """
    if not isinstance(model, SegmentCaptioner):
        raise ValueError(
            f"an object of type {type(model).__name__} cannot be saved; pass a model, such as `predictor.model`"
        )
    check_has_float_weights(model, "saved")
    folder, dtype = Path(folder), resolve_dtype(dtype)
    check_writable(folder)
    with write_folder(folder, CHECKPOINT_CONTENT) as draft:
        write_checkpoint_files(model, draft, dtype, tensors)
    return folder


def check_writable(folder: Path) -> None:
    """Check that a folder is new, empty, or contains nothing but a checkpoint.

    Args:
        folder: Folder, which may not exist.

    Raises:
        OutputError: The folder contains other files.
    """
    try:
        check_folder_replaceable(folder, CHECKPOINT_CONTENT)
        if folder.is_dir() and any(folder.iterdir()):
            read_spec(folder)
    except (OutputError, InputError) as error:
        raise OutputError(f"{error}; its content is unchanged") from error


def is_saved(model: SegmentCaptioner, folder: Path) -> bool:
    """Return whether a folder contains the checkpoint that `save` would write for a model.

    The spec, the weights and uncertainty.json are compared.

    Args:
        model: Model.
        folder: Folder, which may contain anything.

    Returns:
        True if all three are equal.
    """
    try:
        is_same_spec = read_spec(folder).to_dict() == json.loads(json.dumps(resolve_spec(model).to_dict()))
        tensors = read_weights(folder)
        path = folder / UNCERTAINTY_FILE
        uncertainty_content = path.read_text("utf-8") if path.exists() else None
    except (InputError, RegistryError, OSError, UnicodeDecodeError):
        return False
    return (
        is_same_spec
        and hash_tensors(tensors) == hash_weights(model)
        and uncertainty_content == _serialize_uncertainty(model, tensors)
    )


@contextmanager
def wrap_spec_errors(folder: Path) -> Iterator[None]:
    """Convert errors about the spec of a folder to an InputError that names its file."""
    try:
        yield
    except RegistryError as error:
        raise InputError(f"{folder / SPEC_FILE}: {error}{_describe_missing_packages(folder)}") from error
    except TrustError as error:
        raise InputError(f"{folder / SPEC_FILE}: {error}") from error


def load_native_checkpoint(folder: Path, spec: ModelSpec, with_uncertainty: bool = True) -> SegmentCaptioner:
    """Load the model of a native checkpoint folder.

    Args:
        folder: Checkpoint folder.
        spec: Its spec, as `confine_spec` returns it.
        with_uncertainty: Read uncertainty.json.

    Returns:
        The model with its weights.

    Raises:
        InputError: The spec, the weights or uncertainty.json cannot be read, or the weights do not fit the model.
    """
    with wrap_spec_errors(folder), BuildSizeLimit([folder / WEIGHTS_FILE], spec):
        model = build(spec)
    expected = list_stored_tensors(model)
    tensors = read_weights(folder)
    assign_tensors(model, tensors, expected, folder / WEIGHTS_FILE, SPEC_FILE)
    if (folder / "tokenizer").is_dir():
        model.language_model.tokenizer = _load_tokenizer(folder / "tokenizer")
    if with_uncertainty:
        model.uncertainty = read_uncertainty(folder, tensors, model.encoder.channels)
    return model


def _load_tokenizer(folder: Path) -> Tokenizer | None:
    if (tokenizer := read_plain_tokenizer(folder)) is not None:
        return tokenizer
    from sca.language_models.hf import load_tokenizer

    return load_tokenizer(folder)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a native checkpoint folder.

    Args:
        folder: Checkpoint folder.

    Returns:
        Tensors by name.

    Raises:
        InputError: The weights are missing or damaged.
    """
    try:
        open_regular_file(folder / WEIGHTS_FILE).close()
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError as error:
        raise InputError(f"{folder} has no {WEIGHTS_FILE}; copy or download the checkpoint again") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / WEIGHTS_FILE} is damaged ({error}); copy it again") from error


def write_checkpoint_files(
    model: SegmentCaptioner,
    folder: Path,
    dtype: torch.dtype | None = None,
    source_tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the files of a checkpoint to an existing folder, not atomically.

    Args:
        model: Model to save.
        folder: Existing folder.
        dtype: Data type of the stored floating-point tensors; unchanged by default.
        source_tensors: State dict to store instead of the model's own.
    """
    stored_names = list_stored_tensors(model)
    names_by_pointer: dict[int, str] = {}
    tensors = {}
    for name, tensor in (source_tensors or model.state_dict()).items():
        if name in stored_names:
            tensor = tensor.detach().cpu()
            tensor = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
            if names_by_pointer.setdefault(tensor.data_ptr(), name) != name:
                tensor = tensor.clone()  # safetensors rejects shared memory: tied weights are stored twice
            tensors[name] = tensor.contiguous()
    (folder / WEIGHTS_FILE).write_bytes(serialize(tensors, metadata={"format": "pt"}))
    write_json(folder / SPEC_FILE, resolve_spec(model).to_dict())
    write_json(folder / ORIGIN_FILE, collect_origin(model))
    if (content := _serialize_uncertainty(model, tensors)) is not None:
        (folder / UNCERTAINTY_FILE).write_text(content, "utf-8")
    tokenizer = model.language_model.tokenizer
    if tokenizer is not None and tokenizer is not getattr(model.language_model, "source_tokenizer", None):
        cast("TextTokenizer | PlainTokenizer", tokenizer).save(str(folder / "tokenizer"))


def _serialize_uncertainty(model: SegmentCaptioner, tensors: Mapping[str, Tensor]) -> str | None:
    """Return the uncertainty.json of a checkpoint with these weights; None if no uncertainty was measured with them."""
    if model.uncertainty is None or model.uncertainty.weights_hash != hash_as_float32(tensors):
        return None
    return serialize_uncertainty(model.uncertainty)


def resolve_spec(model: SegmentCaptioner) -> ModelSpec:
    """Return the spec of a model with all default options, so that later defaults do not change the checkpoint.

    Defaults that a checkpoint may not set are left out: None, weights, revisions, paths, and options that run code. The
    segmenter is always named, even if it is the encoder's default.
    """
    components: dict[str, Any] = {
        kind: ComponentSpec(component.name, {**_get_settable_defaults(kind, component), **component.options})
        for kind, component in resolve_components(model.spec, model.encoder).items()
    }
    return replace(model.spec, **components)


def _get_settable_defaults(kind: str, component: ComponentSpec) -> dict[str, Any]:
    """Return the default options that a checkpoint may set, with tuples as lists for JSON."""
    defaults = get_registry(kind).load_entry(component.name).options
    return {
        option: list(value) if isinstance(value, tuple) else value
        for option, value in defaults.items()
        if is_settable(kind, component.name, option, value)
    }


def collect_origin(model: SegmentCaptioner) -> dict[str, Any]:
    """Return the content of origin.json.

    Args:
        model: Model to describe.

    Returns:
        The version of this package, its commit if it is a git checkout, and for each component its distribution,
        version, license, quantization and a fingerprint of its pretrained weights.
    """
    origins: dict[str, dict[str, Any]] = {}
    for kind, component_spec in resolve_components(model.spec, model.encoder).items():
        entry = get_registry(kind).load_entry(component_spec.name)
        origins[kind] = {"name": component_spec.name, "distribution": entry.distribution, "version": entry.version}
        component = getattr(model, kind)
        if quantization := getattr(component, "quantization", None):
            library = QUANTIZATIONS[quantization].library
            origins[kind]["quantization"] = {"name": quantization, "library": library, "version": version(library)}
        source = getattr(component, "checkpoint", None)
        card_options = get_registry(kind).get_card(component_spec.name).options
        if source == card_options.get("weights"):  # the license is that of the card's weights
            origins[kind] |= {"license": entry.license} if entry.license else {}
        if source:
            try:
                origins[kind] |= compute_weights_fingerprint(
                    source, getattr(component, "revision", None), getattr(component, "file_prefix", "")
                )
            except InputError:  # weights were deleted, or are found by the component itself
                origins[kind] |= {"weights": str(source)}
    commit = _read_commit()
    written_by = f"segment-caption-anything {version('segment-caption-anything')}"
    return {"written_by": written_by, **({"commit": commit} if commit else {}), "components": origins}


def _read_commit() -> str | None:
    """Return the git commit of this package; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        process = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # git is missing, or refuses the checkout
        return None
    return process.stdout.strip()


def read_spec(folder: Path) -> ModelSpec:
    """Read the spec of a checkpoint folder.

    Args:
        folder: Checkpoint folder.

    Returns:
        The spec, as it is stored.

    Raises:
        InputError: The spec is missing or invalid.
    """
    try:
        table = read_json(folder / SPEC_FILE, MAX_SPEC_BYTES, require_finite=True)
    except FileNotFoundError as error:
        if description := describe_run_folder(folder):
            raise InputError(description) from error
        if find_encoder_of_segmenter(folder) is not None:
            raise InputError(f"{folder} is a segmenter without a language model; use sca.load_captioner") from error
        raise InputError(_describe_missing_checkpoint(folder)) from error
    try:
        return ModelSpec.from_dict(check_object(table, str(folder / SPEC_FILE)))
    except RegistryError as error:
        raise InputError(f"{folder / SPEC_FILE}: {error}") from error


def _describe_missing_checkpoint(folder: Path) -> str:
    if model_type := read_model_type(folder):
        return (
            f"{folder} has the model type {model_type!r}, which is not a promptable segmenter; pass one of the "
            f"types {', '.join(ENCODER_BY_MODEL_TYPE)}, or a folder written by `sca train` or sca.save"
        )
    if (folder / CONFIG_FILE).exists():
        return f"{folder} has no {SPEC_FILE}; pass a folder written by `sca train` or sca.save"
    if links := find_external_links(folder):
        return f"{links[0]} is a link to outside its folder; {EXTERNAL_REMEDY}"
    return f"{folder} has no checkpoint; expected {SPEC_FILE}, {CONFIG_FILE}, or one sub-folder with a PAM checkpoint"


def _describe_missing_packages(folder: Path) -> str:
    """Describe what origin.json claims to require for unknown components; the claim is not trusted."""
    try:
        origins = read_json(folder / ORIGIN_FILE)["components"]
        missing_origins = [origin for kind, origin in origins.items() if origin["name"] not in get_registry(kind)]
        packages = {f"{origin['distribution']}=={origin['version']}" for origin in missing_origins}
        modules = sorted({origin["distribution"] for origin in missing_origins if not origin["version"]})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # missing or malformed
        return ""
    package_names = sorted(package for package in packages if PACKAGE_PATTERN.fullmatch(package))
    if not package_names and modules and all(MODULE_PATTERN.fullmatch(module) for module in modules):
        module_names = "the program that saved it" if modules == ["__main__"] else ", ".join(modules)
        claim = f"Its {ORIGIN_FILE} claims that the code of {module_names} registered them"
        return f" {claim}; register them again before loading."
    if not package_names:
        return ""
    claim = f"Its {ORIGIN_FILE} claims that they come from {', '.join(package_names)}"
    return f" {claim}; install that only if you trust its publisher."


def write_json(path: Path, table: Any) -> None:
    """Write a table to a JSON file of a checkpoint.

    Args:
        path: File.
        table: Content.
    """
    path.write_text(json.dumps(table, indent=1) + "\n", "utf-8")
