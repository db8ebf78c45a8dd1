"""Checkpoints: what was trained, in one folder that always loads.

spec.json              the names and options of every part, defaults included, and a format version
weights.safetensors    the tensors that have no other source: what was trained, and parts without pretrained weights
origin.json            which distribution and version gave each part
tokenizer/             where the language model was trained here
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from sca_registry import RegistryError, registry, zoo
from sca_registry.messages import unknown
from sca_registry.overrides import PARTS
from sca_registry.spec import ModelSpec, Part
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sca.checkpoints.layout import CONFIG, CheckpointError, is_published
from sca.checkpoints.trust import (
    NO_TRUST,
    Trust,
    TrustError,
    check_file,
    check_folder,
    confine_spec,
    find_real_root,
    is_settable,
)
from sca.composition import build, parts
from sca.devices import find_device, find_dtype
from sca.io.atomic import FolderError, check_replaceable, new_folder, previous_folder
from sca.io.hub import HubError, fetch, fingerprint, local_folder, local_path, some, suggest_path
from sca.io.json import IrregularFileError, open_regular_file, read_json
from sca.language_models.hf import read_tokenizer
from sca.model import SegmentCaptioner

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
WEIGHTS, SPEC, ORIGIN = "weights.safetensors", "spec.json", "origin.json"
SPEC_BYTES = 2**20  # of a spec at most
MESSAGE = 600  # characters of what is wrong with a checkpoint at most
WIDE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # of which torch finds the least and the greatest
SPREAD = 8  # bytes in memory for a byte of the file: float64 for an 8-bit format
SLACK = 2**28  # bytes of frozen codes, tied weights and what is tried out, which files need not hold
LARGEST = 2**37  # bytes of weights that are fetched
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
        CheckpointError: The folder contains something else, or cannot be written.
        ValueError: The model or the dtype is something else.
    """
    if not isinstance(model, SegmentCaptioner):
        raise ValueError(
            f"an object of type {type(model).__name__} cannot be saved; give a model, such as `predictor.model`"
        )
    folder, dtype = Path(folder), find_dtype(dtype)
    check_writable(folder)
    try:
        with new_folder(folder, CONTENT) as draft:
            _write(model, draft, dtype, tensors)
    except FolderError as error:
        raise CheckpointError(str(error)) from error
    return folder


def check_writable(folder: Path) -> None:
    """Check that a checkpoint may be written to a folder: a new or empty one, or one with nothing but a checkpoint.

    Raises:
        CheckpointError: The folder contains something else.
    """
    try:
        check_replaceable(folder, CONTENT)
        if folder.is_dir() and any(folder.iterdir()):
            read_spec(folder)
    except (FolderError, CheckpointError) as error:
        raise CheckpointError(f"{error}; what is in it stays") from error


def is_saved(model: SegmentCaptioner, folder: Path) -> bool:
    """Whether a folder contains the checkpoint that `save` would write for a model."""
    try:
        same = read_spec(folder).to_dict() == json.loads(json.dumps(resolve_spec(model).to_dict()))
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (CheckpointError, RegistryError, SafetensorError, OSError):
        return False
    return same and tensors_hash(found) == weights_hash(model)


def load(
    source: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    *,
    trust_remote_code: bool = False,
    allow_external: bool = False,
    revision: str | None = None,
) -> SegmentCaptioner:
    """Load a model in eval mode; folders in the layout of the published system are read, too.

    A checkpoint is data: it names components that are installed, and nothing of it runs unless the caller agrees.

    Args:
        source: A zoo name, a hub id, or a folder: a `Path`, or text with a separator, such as ./model or runs/x/model.
        device: Where the model runs.
        dtype: Of its floating-point tensors, such as "float16"; by default that of each component.
        trust_remote_code: Allow the checkpoint to run code: for authors that you trust as you trust a program.
        allow_external: Allow the checkpoint to refer to files outside its folder, to other repositories and to URLs,
            as your own do whose weights you keep elsewhere. It does not allow code.
        revision: Of a hub id: a commit, a branch or a tag.

    Raises:
        CheckpointError: If the checkpoint cannot be read, asks for more than was agreed to, has NaN or infinite
            weights, lacks a tensor or has one without a place.
        ValueError: If the device or the dtype does not exist.
    """
    device, dtype = find_device(device), find_dtype(dtype)
    trust = Trust(trust_remote_code, allow_external)
    folder, spec = open_checkpoint(source, trust, revision)
    with _one_line(folder):
        model = _load_published(folder, trust) if spec is None else _load_own(folder, spec)
        check_finite(model, str(folder))
        model = model.to(device=device, dtype=dtype).eval()
        if dtype == torch.float16:
            check_finite(model, f"{folder} in float16, which is too small for it (use bfloat16 or float32),")
    return model


def open_checkpoint(
    source: str | Path, trust: Trust = NO_TRUST, revision: str | None = None
) -> tuple[Path, ModelSpec | None]:
    """Find a checkpoint, check its files and read its spec, each file before it is read.

    Args:
        source: What `load` takes.
        trust: What the caller agrees to.
        revision: Of a hub id.

    Returns:
        The folder, and the spec as `confine_spec` returns it; None for the layout of the published system.

    Raises:
        CheckpointError: If the checkpoint cannot be read, or asks for more than was agreed to.
        HubError: If it cannot be fetched.
    """
    folder = locate(source, revision)
    shipped = isinstance(source, str) and source in zoo.names() and zoo.get(source).folder is not None
    files = trust._replace(external=True) if shipped else trust  # installers may link the files of a package
    with _one_line(folder):
        root = find_real_root(folder)
        for name in (CONFIG, SPEC, ORIGIN):
            check_file(folder / name, root, files)
        spec = None if is_published(folder) else read_spec(folder)  # so that no other folder is looked through
        check_folder(folder, files)
        if spec is not None:
            with _naming_spec(folder):
                spec = confine_spec(spec, folder, trust)
    return folder, spec


def read_local_spec(source: str | Path, trust: Trust = NO_TRUST) -> ModelSpec | None:
    """Read the spec of a checkpoint on this machine: of a zoo name that comes with the package, or of a folder.

    Nothing is downloaded.

    Returns:
        The spec; None for everything else, such as a model on the hub, a captioner or the published layout.

    Raises:
        CheckpointError: If the checkpoint cannot be read, or asks for more than was agreed to.
    """
    shipped = isinstance(source, str) and source in zoo.names()
    folder = zoo.get(source).folder if shipped else local_folder(source)
    if folder is None or not (folder / SPEC).exists():
        return None
    _, spec = open_checkpoint(source if shipped else folder, trust)
    return spec


def check_finite(model: torch.nn.Module, subject: str) -> None:
    """Raise CheckpointError, opening with `subject`, for NaN in a tensor of a model or infinity in a parameter."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    wrong = [name for name, tensor in model.state_dict().items() if not _is_finite(tensor, name in parameters)]
    if wrong:
        raise CheckpointError(f"{subject} has NaN or infinite weights: {some(wrong)}; copy or train it again")


def _is_finite(tensor: Tensor, everywhere: bool) -> bool:
    """One pass without a copy: the least and the greatest are NaN if any is."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor.detach() if tensor.dtype in WIDE else tensor.detach().float())
    ends = torch.stack((low, high))
    return bool(ends.isfinite().all() if everywhere else not ends.isnan().any())


@contextmanager
def _one_line(folder: Path) -> Iterator[None]:
    """What is wrong with a checkpoint as one CheckpointError, of whatever length its content is."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, MemoryError) as error:  # a RecursionError is a RuntimeError
        said = str(error) or type(error).__name__
        if isinstance(error, CheckpointError) and len(said) <= MESSAGE and said.isprintable():
            raise
        line = "".join(each if each.isprintable() else " " for each in said)
        reason = shorten(line, MESSAGE, placeholder=" ...") if " " in line[:MESSAGE] else line[:MESSAGE]
        raise CheckpointError(reason if str(folder) in reason else f"{folder}: {reason}") from error


def _load_published(folder: Path, trust: Trust) -> SegmentCaptioner:
    from sca.checkpoints.published import load_published

    return load_published(folder, trust)


@contextmanager
def _naming_spec(folder: Path) -> Iterator[None]:
    """Raise what is wrong with the spec of a folder as a CheckpointError that names its file."""
    try:
        yield
    except RegistryError as error:
        raise CheckpointError(f"{folder / SPEC}: {error}{_brought_by(folder)}") from error
    except TrustError as error:
        raise CheckpointError(f"{folder / SPEC}: {error}") from error


def _load_own(folder: Path, spec: ModelSpec) -> SegmentCaptioner:
    with _naming_spec(folder), BoundedBuild([folder / WEIGHTS], spec):
        model = build(spec)
    expected = stored(model)
    try:
        open_regular_file(folder / WEIGHTS).close()
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no {WEIGHTS}: the checkpoint is incomplete") from error
    except IrregularFileError as error:
        raise CheckpointError(str(error)) from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} is broken ({error}): copy it again") from error
    assign(model, found, expected, folder / WEIGHTS, SPEC)
    if (folder / "tokenizer").is_dir():
        model.language_model.tokenizer = read_tokenizer(folder / "tokenizer")
    return model


class BoundedBuild(TorchDispatchMode):
    """Stop a model that is being built from a checkpoint as soon as it is far larger than the files of its weights.

    A spec is a few numbers, and a wrong one would otherwise fill the memory before its weights are found not to fit.
    Components that take weights from elsewhere are as large as those, so that nothing is known beforehand.
    """

    def __init__(self, files: Sequence[Path], spec: ModelSpec):
        super().__init__()
        sizes = [file.stat().st_size for file in files if file.is_file()]
        for kind in PARTS:
            part = getattr(spec, kind)
            sizes += [] if part is None else _source_sizes(kind, part)
        self.room = sum(sizes) * SPREAD + SLACK
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(given):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._follow(tensor.untyped_storage())
        return given

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.room -= size
        weakref.finalize(storage, self._forget, key, size)
        if self.room < 0:
            raise ValueError("the model is far larger than its weights; copy the checkpoint again")

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.room += size


def _source_sizes(kind: str, part: Part) -> list[int]:
    """Sizes in bytes of the weights that a component takes from elsewhere, as far as they are here."""
    options = {**registry(kind).card(part.name).options, **part.options}
    path = local_path(str(options["weights"])) if options.get("weights") else None
    if path is not None and path.exists():
        return [each.stat().st_size for each in (path.iterdir() if path.is_dir() else [path]) if each.is_file()]
    return [LARGEST] if any(options.get(name) not in (None, True, False) for name in ("weights", "pretrained")) else []


def assign(model: SegmentCaptioner, found: dict[str, Tensor], expected: set[str], where: Path, asked_by: str) -> None:
    """Gives a model the tensors that were found `where`, if they are those that are expected.

    Raises CheckpointError that names what is missing, unexpected or of another shape than `asked_by` says.
    """
    missing, unexpected = sorted(expected - found.keys()), sorted(found.keys() - expected)
    if missing or unexpected:
        raise CheckpointError(
            f"{where} does not fit its {asked_by}: missing {some(missing)}; unexpected {some(unexpected)}"
        )
    own = model.state_dict()
    for name, tensor in found.items():
        if own[name].shape != tensor.shape:
            raise CheckpointError(
                f"{where}: {name} is {tuple(tensor.shape)} and the {asked_by} asks for {tuple(own[name].shape)}"
            )
    model.load_state_dict(own | found)


def locate(source: str | Path, revision: str | None = None) -> Path:
    """Find the folder of a checkpoint: of a zoo name, of a hub id, which is fetched once, or of a path.

    A bare name is never a folder; a path is a `Path`, or text with a separator. Nothing is renamed or written but what
    is fetched: of a save that was killed between its renames, the previous checkpoint is read where it is.

    Raises:
        CheckpointError: If there is none.
        HubError: If it cannot be fetched.
    """
    if not isinstance(source, str | Path):
        raise CheckpointError(f"the model is of type {type(source).__name__}; give a zoo name, a folder or a hub id")
    if isinstance(source, str) and source in zoo.names():
        entry = zoo.get(source)
        return entry.folder or fetch(entry.checkpoint, revision or entry.revision)
    path = local_path(source)
    if path is not None:
        for folder in (path, previous_folder(path)):
            if folder.is_dir():
                return folder
        if path.exists():
            raise CheckpointError(f"{source} is a file, and a model is a folder with {SPEC} and {WEIGHTS}")
    if isinstance(source, str) and HUB_ID.fullmatch(source):
        return fetch(source, revision)
    if isinstance(source, str) and "+" in source and "/" not in source:
        raise CheckpointError(_describe_composition(source))
    reason = unknown(f"no model named {str(source)!r}, and no folder there", str(source), zoo.names())
    hint = "" if isinstance(source, Path) else suggest_path(source)
    raise CheckpointError(
        f"{reason} A folder that `sca train` wrote works too, and so does a hub id, OWNER/NAME{hint}."
    )


def _describe_composition(source: str) -> str:
    """Return the error for names of components in place of a checkpoint."""
    names = ", ".join(repr(name.strip()) for name in source.split("+"))
    if source.count("+") == 1:
        return f"{source!r} names an encoder and a captioner; open it with sca.captioner({source!r})"
    return (
        f"{source!r} names components, which have no trained weights; build a model with sca.compose({names}), or give "
        "a checkpoint"
    )


def stored(model: SegmentCaptioner) -> set[str]:
    """The names of the tensors that a checkpoint must hold: all but the frozen ones that have a pretrained source.

    Statistics and other buffers of a part that trains may have moved, so they are held, too; and what was added here to
    a part with pretrained weights, a segmenter's neck or LoRA, has no source but this.
    """
    elsewhere = set()
    for part_name in ("encoder", "segmenter", "language_model"):
        part = getattr(model, part_name)
        if getattr(part, "checkpoint", None):
            trains = any(parameter.requires_grad for parameter in part.parameters())
            names = dict(part.named_parameters(remove_duplicate=False)) if trains else part.state_dict()
            elsewhere |= {f"{part_name}.{name}" for name in names}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    added = {name for name in elsewhere if name.startswith("segmenter.neck.") or "lora_" in name}
    return set(model.state_dict()) - (elsewhere - trained - added)


def weights_hash(model: SegmentCaptioner) -> str:
    """SHA-256 of the tensors that a checkpoint of the model would hold, whatever their device."""
    state = model.state_dict()
    return tensors_hash({name: state[name] for name in stored(model)})


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors and their names, whatever their device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
            except HubError:  # weights that have gone meanwhile, or that a part finds in a way of its own
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
    """The spec of a checkpoint folder. Raises CheckpointError if there is none that can be read."""
    try:
        table = read_json(folder / SPEC, SPEC_BYTES, finite=True)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} has no {SPEC}, so it is not a model that `sca train` or sca.save wrote"
        ) from error
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{folder / SPEC} is {table!r:.40} and should be a table of parts: copy it again")
    try:
        return ModelSpec.from_dict(table)
    except RegistryError as error:
        raise CheckpointError(f"{folder / SPEC}: {error}") from error


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
