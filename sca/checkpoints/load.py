"""Find a checkpoint by model name, folder or Hub id, and load it in the native layout, the original SCA's or PAM's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

import torch
from sca_registry import zoo
from sca_registry.errors import make_unknown_name_error
from sca_registry.spec import ModelSpec

from sca.builder import build
from sca.checkpoints.layout import (
    CONFIG_FILE,
    ORIGIN_FILE,
    PAM_LAYOUT,
    SIZES_FILE,
    SPEC_FILE,
    UNCERTAINTY_FILE,
    WEIGHTS_FILE,
    find_subfolder,
    read_layout,
)
from sca.checkpoints.native import load_native_checkpoint, read_spec, wrap_spec_errors
from sca.checkpoints.tensors import check_finite_weights
from sca.checkpoints.trust import NO_TRUST, Trust, check_file, check_folder, confine_spec, resolve_real_root
from sca.devices import resolve_device, resolve_precision
from sca.hints import check_argument_names
from sca.io.atomic import get_previous_folder
from sca.io.errors import InputError
from sca.io.hub import fetch_model_folder, find_local_folder, is_cached, resolve_local_path, suggest_path
from sca.language_models.quantization import check_quantization
from sca.model import SegmentCaptioner
from sca.precision import check_int8_support, set_precision

HUB_ID_PATTERN = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
MAX_MESSAGE_LENGTH = 600  # characters of an error message about a checkpoint


@check_argument_names()
def load(
    source: str | Path,
    device: str | torch.device = "cpu",
    precision: str | torch.dtype | None = None,
    *,
    trust_remote_code: bool = False,
    allow_external: bool = False,
    revision: str | None = None,
) -> SegmentCaptioner:
    """Load a model in eval mode, from a checkpoint in the native layout, the original SCA layout or that of PAM.

    A checkpoint refers to installed components by name. Loading it runs none of its code unless `trust_remote_code` is
    set.

    Args:
        source: Model name, Hub id, or folder. A folder is a `Path`, or a string that contains a path separator, such as
            "./model" or "runs/x/model".
        device: Device of the model.
        precision: "float32", "bfloat16" or "float16" for all floating-point tensors; "int8" for the wide linear layers,
            on a CPU; "auto" for the fastest on this device, see `sca.precision.set_precision`. Defaults to each
            component's own dtype.
        trust_remote_code: Allow the checkpoint to run its own code. Use only for checkpoints from authors you trust.
        allow_external: Allow the checkpoint to refer to files outside its folder, to other repositories and to URLs.
            For example, your own checkpoints may refer to weights that are stored elsewhere. Does not let
            them run code.
        revision: Revision of a Hub id: a commit, a branch or a tag.

    Returns:
        The model, in eval mode on `device`.

    Raises:
        TypeError: Unknown keyword argument; the message suggests the closest one.
        InputError: The checkpoint cannot be read, needs `trust_remote_code` or `allow_external` and it is not set, has
            NaN or infinite weights, or has missing or unexpected tensors.
        ValueError: The device is not available, or the precision is unknown or not supported on it.
    """
    trust, resolved_device = Trust(trust_remote_code, allow_external), resolve_device(device)
    if (precision := resolve_precision(precision)) == "int8":
        check_int8_support(resolved_device)
    return _load_model(source, resolved_device, precision, trust, revision)


def load_uncalibrated(
    source: str | Path,
    device: str | torch.device = "cpu",
    *,
    trust_remote_code: bool = False,
    allow_external: bool = False,
) -> SegmentCaptioner:
    """Load a model without its uncertainty.json, which may be damaged or belong to other weights.

    Args:
        source: Model name, Hub id or folder, as for `load`.
        device: Device of the model.
        trust_remote_code: As for `load`.
        allow_external: As for `load`.

    Returns:
        The model, in eval mode on `device`. Its captions have no confidence, and its images no OOD score.

    Raises:
        InputError: As for `load`.
        ValueError: The device is not available.
    """
    trust = Trust(trust_remote_code, allow_external)
    return _load_model(source, resolve_device(device), None, trust, None, with_uncertainty=False)


def _load_model(
    source: str | Path,
    device: torch.device,
    precision: str | None,
    trust: Trust,
    revision: str | None,
    with_uncertainty: bool = True,
) -> SegmentCaptioner:
    folder, spec = open_checkpoint(source, trust, revision)
    with _shorten_errors(folder):
        if spec is None:
            model = _load_foreign_checkpoint(folder, trust)
        else:
            check_quantization(spec, device.type, precision)
            model = load_native_checkpoint(folder, spec, with_uncertainty)
        check_finite_weights(model, str(folder))
        model = model.to(device=device).eval()
        set_precision(model, precision)
        if precision == "float16":
            check_finite_weights(model, f"{folder} in float16, which is too small for it (use bfloat16 or float32),")
    return model


def load_without_weights(
    source: str | Path, *, trust_remote_code: bool = False, allow_external: bool = False
) -> SegmentCaptioner:
    """Build the model of a checkpoint on the meta device, without weights and tokenizer.

    Args:
        source: Model name, Hub id or folder, as for `load`.
        trust_remote_code: As for `load`.
        allow_external: As for `load`.

    Returns:
        The model, on the meta device.

    Raises:
        InputError: The checkpoint cannot be read, or needs a permission that `trust` does not include.
    """
    trust = Trust(trust_remote_code, allow_external)
    folder, spec = open_checkpoint(source, trust)
    if spec is None:
        spec = read_foreign_spec(folder, trust)
        with _shorten_errors(folder):
            return build(spec, "meta")
    with _shorten_errors(folder), wrap_spec_errors(folder):
        return build(spec, "meta")


def open_checkpoint(
    source: str | Path, trust: Trust = NO_TRUST, revision: str | None = None
) -> tuple[Path, ModelSpec | None]:
    """Find a checkpoint, check its files and read its spec. Each file is checked before it is read.

    Args:
        source: Model name, Hub id or folder, as for `load`.
        trust: What the caller allows.
        revision: Revision of a Hub id.

    Returns:
        The folder, and the spec as `confine_spec` returns it; None for a layout of another program.

    Raises:
        InputError: The checkpoint cannot be downloaded or read, or needs a permission that `trust` does not include.
    """
    folder = locate_checkpoint(source, revision, trust)
    is_bundled = isinstance(source, str) and source in zoo.list_names() and zoo.get_entry(source).folder is not None
    file_trust = trust._replace(external=True) if is_bundled else trust  # installers may symlink package files
    with _shorten_errors(folder):
        root = resolve_real_root(folder)
        for name in (CONFIG_FILE, SPEC_FILE, ORIGIN_FILE, UNCERTAINTY_FILE):
            check_file(folder / name, root, file_trust)
        # Read first, to reject arbitrary folders before their files are checked.
        spec = None if read_layout(folder) else read_spec(folder)
        check_folder(folder, file_trust, own_files=[UNCERTAINTY_FILE, SIZES_FILE])
        if spec is not None:
            with wrap_spec_errors(folder):
                spec = confine_spec(spec, folder, trust)
    return folder, spec


def read_local_spec(source: str | Path, trust: Trust = NO_TRUST) -> ModelSpec | None:
    """Read the spec of a checkpoint that is bundled with a package or stored in a folder; download nothing.

    Of the layouts of other programs, that of PAM has a spec, which is read from the headers of its files.

    Args:
        source: Model name or folder.
        trust: What the caller allows.

    Returns:
        The spec; None for everything else, such as a model on the Hub, a captioner or the original SCA layout.

    Raises:
        InputError: The checkpoint cannot be read, or needs a permission that `trust` does not include.
    """
    is_bundled = isinstance(source, str) and source in zoo.list_names()
    folder = zoo.get_entry(str(source)).folder if is_bundled else find_local_folder(source)
    if folder is None:
        return None
    folder = find_subfolder(folder, trust)
    if (folder / SPEC_FILE).exists():
        _, spec = open_checkpoint(source if is_bundled else folder, trust)
        return spec
    if read_layout(folder) != PAM_LAYOUT:
        return None
    folder, _ = open_checkpoint(folder, trust)
    return read_foreign_spec(folder, trust)


def resolve_spec(model: str, trust: Trust = NO_TRUST) -> ModelSpec:
    """Return the spec of a model by name; download nothing.

    Args:
        model: Model name, folder, or combination encoder+mixer+language-model.
        trust: What the caller allows.

    Returns:
        The spec.

    Raises:
        RegistryError: The name is unknown.
        InputError: The checkpoint cannot be read, or needs a permission that `trust` does not include.
        ValueError: The spec is in a checkpoint on the Hub.
    """
    if "+" in model:
        return ModelSpec.parse(model)
    spec = read_local_spec(model, trust)
    if spec is not None:
        return spec
    if model in zoo.list_names():
        if config := zoo.get_entry(model).config:
            from sca.checkpoints.pam import build_published_pam_spec

            return build_published_pam_spec(config)
        raise ValueError(
            f"the spec of {model} is in its checkpoint on the Hub, which is not downloaded; name its components "
            "instead, such as sam-vit-h+query+gpt2-large"
        )
    local_names = [name for name in zoo.list_names() if zoo.get_entry(name).folder]
    raise make_unknown_name_error(
        f"{model!r} is neither a folder with a {SPEC_FILE} nor encoder+mixer+language-model{suggest_path(model)}",
        model,
        local_names,
    )


def read_foreign_spec(folder: Path, trust: Trust = NO_TRUST) -> ModelSpec:
    """Read the spec of a checkpoint in the layout of another program.

    Args:
        folder: Folder for which `open_checkpoint` returns no spec.
        trust: What the caller allows.

    Returns:
        The spec.

    Raises:
        InputError: The checkpoint cannot be read, or needs a permission that `trust` does not include.
    """
    with _shorten_errors(folder):
        if read_layout(folder) == PAM_LAYOUT:
            from sca.checkpoints.pam import read_pam_spec

            return read_pam_spec(folder, trust)
        from sca.checkpoints.published import read_published_spec

        return read_published_spec(folder, trust)


def _load_foreign_checkpoint(folder: Path, trust: Trust) -> SegmentCaptioner:
    """Load a checkpoint in the layout of another program, whose modules import transformers."""
    if read_layout(folder) == PAM_LAYOUT:
        from sca.checkpoints.pam import load_pam_checkpoint

        return load_pam_checkpoint(folder, trust)
    from sca.checkpoints.published import load_published_checkpoint

    return load_published_checkpoint(folder, trust)


@contextmanager
def _shorten_errors(folder: Path) -> Iterator[None]:
    """Convert errors about a checkpoint to an InputError with one line of limited length."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, MemoryError) as error:  # a RecursionError is a RuntimeError
        message = str(error) or type(error).__name__
        if (
            isinstance(error, InputError)
            and str(folder) in message
            and len(message) <= MAX_MESSAGE_LENGTH
            and message.isprintable()
        ):
            raise
        line = "".join(character if character.isprintable() else " " for character in message)
        reason = (
            shorten(line, MAX_MESSAGE_LENGTH, placeholder=" ...")
            if " " in line[:MAX_MESSAGE_LENGTH]
            else line[:MAX_MESSAGE_LENGTH]
        )
        raise InputError(reason if str(folder) in reason else f"{folder}: {reason}") from error


def locate_checkpoint(source: str | Path, revision: str | None = None, trust: Trust = NO_TRUST) -> Path:
    """Return the folder of a checkpoint; download it if it is on the Hub.

    A bare name is never a folder; a path is a `Path`, or text with a separator. Only downloads write to disk: if a save
    was killed between its renames, the previous checkpoint is read from `get_previous_folder`.

    Args:
        source: Model name, Hub id or folder.
        revision: Revision of a Hub id.
        trust: What the caller allows.

    Returns:
        The local checkpoint folder.

    Raises:
        InputError: The checkpoint does not exist, or cannot be downloaded.
    """
    if not isinstance(source, str | Path):
        raise InputError(f"the model is of type {type(source).__name__}; pass a model name, a folder or a Hub id")
    if isinstance(source, str) and source in zoo.list_names():
        entry = zoo.get_entry(source)
        return entry.folder or _fetch_checkpoint(entry.checkpoint, revision or entry.revision)
    path = resolve_local_path(source)
    if path is not None:
        for folder in (path, get_previous_folder(path)):
            if folder.is_dir():
                return find_subfolder(folder, trust)
        if path.exists():
            raise InputError(f"{source} is a file; pass a folder with {SPEC_FILE} and {WEIGHTS_FILE}")
    if isinstance(source, str) and HUB_ID_PATTERN.fullmatch(source):
        return _fetch_checkpoint(source, revision)
    if isinstance(source, str) and "+" in source and "/" not in source:
        raise InputError(_describe_composition(source))
    reason = make_unknown_name_error(f"no model or folder named {str(source)!r}", str(source), zoo.list_names())
    hint = "" if isinstance(source, Path) else suggest_path(source)
    raise InputError(f"{reason} A folder written by `sca train` or a Hub id OWNER/NAME is also accepted{hint}.")


def _fetch_checkpoint(hub_id: str, revision: str | None) -> Path:
    """Return the local folder of a checkpoint on the Hub; a repository of PAM has it in a folder of its own name."""
    entry = zoo.find_hub_entry(hub_id)
    subfolder = hub_id.rpartition("/")[2] if entry is None else entry.subfolder
    prefix = f"{subfolder}/"
    if entry is None and not is_cached(hub_id, revision, prefix):
        folder = fetch_model_folder(hub_id, revision)
        if find_subfolder(folder).name != subfolder:
            return folder
    elif not subfolder:
        return fetch_model_folder(hub_id, revision)
    folder = fetch_model_folder(hub_id, revision, prefix=prefix) / subfolder
    if not folder.is_dir():
        raise InputError(f"{hub_id} has no folder {subfolder}; use another revision")
    return folder


def _describe_composition(source: str) -> str:
    """Return the message for component names in place of a checkpoint."""
    names = ", ".join(repr(name.strip()) for name in source.split("+"))
    if source.count("+") == 1:
        return f"{source!r} names an encoder and a captioner; use sca.load_captioner({source!r})"
    return (
        f"{source!r} is a combination of components whose mixer is untrained; build the model with "
        f"sca.compose({names}), or pass a checkpoint"
    )
