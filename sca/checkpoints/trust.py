"""Restrictions on untrusted checkpoints: they name installed components, run no code, and refer to no outside files.

The caller's own specs (`sca.compose`, recipes, options of a captioner) are not restricted. Only the caller can lift the
restrictions on checkpoints.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from sca_registry import get_registry
from sca_registry.cards import NAME_PATTERN
from sca_registry.overrides import MODEL_COMPONENTS
from sca_registry.spec import ComponentSpec, ModelSpec

from sca.io.errors import InputError
from sca.io.hub import get_known_sources
from sca.io.json import read_json
from sca.io.validation import is_finite_number

TRUST_OPTION = "trust_remote_code"
SOURCE_OPTIONS = ("weights", "tokenizer", "config")  # options with a file, folder, Hub id or URL in any component
TOKEN_PATTERN = re.compile(r"</?[\w|-]+>")  # such as </s>, which is not a path
MAX_NUMBER = 2**26  # limit of any integer in a spec: sizes, counts and positions of models are smaller
MAX_LAYERS = 2**10  # limit of any number of layers or blocks
MAX_FOLDER_DEPTH = 6  # limit of nested folders in a checkpoint
CODE_REMEDY = "pass trust_remote_code=True (--trust-remote-code) if you trust its author"
EXTERNAL_REMEDY = "pass allow_external=True (--allow-external) if you agree; it does not let the checkpoint run code"
REMOTE_KEYS = (  # configuration fields through which a library loads code or weights from elsewhere
    *("base_model_name_or_path", "architecture", "backbone"),
    *("timm_model_name", "hf_model_name", "hf_tokenizer_name"),
)
SAFE_IMPLEMENTATIONS = ("", "eager", "sdpa")  # never download a kernel, unlike flash_attention_2


class Trust(NamedTuple):
    """Permissions that the caller grants to a checkpoint.

    Attributes:
        remote_code: The checkpoint may run code.
        external: The checkpoint may refer to files outside its folder, to other repositories and to URLs.
    """

    remote_code: bool = False
    external: bool = False


NO_TRUST = Trust()


class TrustError(InputError):
    """Error for a checkpoint that requires more than the caller allows; its message names the option to set."""


def confine_spec(spec: ModelSpec, folder: Path, trust: Trust) -> ModelSpec:
    """Check the spec of a checkpoint folder before anything is imported or built from it.

    Args:
        spec: Spec of the checkpoint.
        folder: Checkpoint folder.
        trust: What the caller allows.

    Returns:
        The spec with absolute paths for files in the folder.

    Raises:
        TrustError: An option runs code, or refers to something outside the folder other than the weights of a
            registered card, and the caller does not allow it. Or a number is too large.
        RegistryError: A component does not exist.
    """
    components = {kind: getattr(spec, kind) for kind in MODEL_COMPONENTS}
    confined: dict[str, Any] = {
        kind: _confine_component(kind, component, folder, trust)
        for kind, component in components.items()
        if component is not None
    }
    _check_numbers([spec.lora, spec.generation, spec.everything, spec.zoom, spec.task_tokens])
    return replace(spec, **confined)


def is_settable(kind: str, name: str, option: str, value: Any) -> bool:
    """Return whether a checkpoint may set an option to a value without any permission.

    Allowed are booleans, finite numbers, strings that can only name something installed, and lists of them. A revision
    is not allowed, because the card of a later version may have another one.

    Args:
        kind: Kind of the component, such as "encoder".
        name: Name of the component.
        option: Name of the option.
        value: Value of the option.

    Returns:
        True if the option needs no permission.
    """
    values = value if isinstance(value, list | tuple) else (value,)
    if option == "revision" or not all(_is_plain(each) for each in values):
        return False
    try:
        _confine_component(kind, ComponentSpec(name, {option: value}), Path(), NO_TRUST)
    except TrustError:
        return False
    return True


def resolve_source(name: str, folder: Path, trust: Trust) -> str:
    """Resolve a reference of a checkpoint to weights or a tokenizer.

    Args:
        name: Path, Hub id or URL.
        folder: Checkpoint folder.
        trust: What the caller allows.

    Returns:
        The absolute path of a file or folder inside `folder`, the Hub id of a registered card, or, if the caller allows
        external references, the name itself.

    Raises:
        TrustError: The reference is external, and the caller does not allow it.
    """
    if "\0" in name:
        raise TrustError(f"the checkpoint contains the invalid path {_shorten_value(name)}; download or save it again")
    path = _find_inside(name, folder)
    if path is not None:
        return str(path)
    sources = get_known_sources()
    if name in sources:
        return sources[name]
    if not trust.external:
        raise TrustError(f"{_shorten_value(name)} is outside its folder; {EXTERNAL_REMEDY}")
    return name


def check_folder(folder: Path, trust: Trust, own_files: Collection[str] = ()) -> None:
    """Check the files of a checkpoint folder before a library reads them.

    Args:
        folder: Checkpoint folder.
        trust: What the caller allows.
        own_files: JSON files in the folder that are read by this package only, which checks their values.

    Raises:
        TrustError: The folder contains anything but regular files and folders, is nested too deep, or has a symlink
            to the outside or a configuration that the caller does not allow.
        InputError: A JSON file cannot be read.
    """
    root = resolve_real_root(folder)
    for path in _iter_files(folder, MAX_FOLDER_DEPTH):
        check_file(path, root, trust)
        is_own_file = path.parent == folder and path.name in own_files
        if path.suffix == ".json" and path.is_file() and path.name != "tokenizer.json" and not is_own_file:
            _check_configuration(read_json(path), path, trust)


def check_file(path: Path, root: Path, trust: Trust) -> None:
    """Check the kind of a file in a checkpoint folder before it is read.

    Args:
        path: File; it need not exist.
        root: Folder that symlinks may refer to, see `resolve_real_root`.
        trust: What the caller allows.

    Raises:
        TrustError: The path is neither a regular file nor a folder, or is a symlink that leaves `root` and that the
            caller does not allow.
    """
    mode = path.stat().st_mode if path.exists() else 0
    if mode and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise TrustError(f"{path} is not a regular file; remove it from the checkpoint")
    if path.is_symlink() and not trust.external and not path.resolve().is_relative_to(root):
        raise TrustError(f"{path} is a link to outside its folder; {EXTERNAL_REMEDY}")


def _confine_component(kind: str, component: ComponentSpec, folder: Path, trust: Trust) -> ComponentSpec:
    card = get_registry(kind).get_card(component.name)
    subject = f"{kind.replace('_', ' ')} {component.name!r}"
    _check_numbers(component.options)
    _check_configuration(component.options, f"the {subject}", trust)
    options = dict(component.options)
    revision = options.get("revision", card.options.get("revision"))
    if revision != card.options.get("revision") and not trust.external:
        raise TrustError(f"{subject} sets revision={_shorten_value(revision)}, not that of its card; {EXTERNAL_REMEDY}")
    for option, value in component.options.items():
        if option == TRUST_OPTION or option in card.code_options:
            if value is False or (option != TRUST_OPTION and _is_plain_name(value)):
                continue
            if not trust.remote_code:
                raise TrustError(f"{subject} sets {option}={_shorten_value(value)}, which runs code; {CODE_REMEDY}")
        options[option] = _confine_value(subject, option, value, folder, trust)
    return ComponentSpec(component.name, options)


def _confine_value(subject: str, option: str, value: Any, folder: Path, trust: Trust) -> Any:
    try:
        if isinstance(value, str) and (option in SOURCE_OPTIONS or _is_reference(value)):
            return resolve_source(value, folder, trust)
        for text in _iter_texts(value):
            if not trust.external and _is_reference(text):
                raise TrustError(f"{_shorten_value(text)} is outside its folder; {EXTERNAL_REMEDY}")
    except TrustError as error:
        raise TrustError(f"{option} of the {subject}: {error}") from error
    return value


def _check_configuration(content: Any, subject: object, trust: Trust) -> None:
    """Raise TrustError if a configuration makes a library read external files or download code or weights."""
    for key, value in _iter_pairs(content):
        is_kernel = "_implementation" in key and any(text not in SAFE_IMPLEMENTATIONS for text in _iter_texts(value))
        is_remote = key.endswith(REMOTE_KEYS) and isinstance(value, str) and _is_reference(value)
        if (is_kernel or is_remote) and not trust.remote_code:
            raise TrustError(
                f"{subject} sets {key}={_shorten_value(value)}, which can download and run code; {CODE_REMEDY}"
            )
        is_file = key.endswith("_file") and key != "special_tokens_map_file"
        if is_file and isinstance(value, str) and _is_reference(value) and not trust.external:
            raise TrustError(
                f"{subject} sets {key}={_shorten_value(value)}, a file outside its folder; {EXTERNAL_REMEDY}"
            )


def _check_numbers(content: Any) -> None:
    for key, value in _iter_pairs({"": content}):
        limit = MAX_LAYERS if any(each in key for each in ("depth", "layer", "blocks")) else MAX_NUMBER
        if isinstance(value, int) and abs(value) > limit:
            subject = f"{key} is {_format_number(value)}, which is" if key else f"the number {_format_number(value)} is"
            raise TrustError(f"{subject} larger than in any model; download or save the checkpoint again")


def _format_number(value: int) -> str:
    return str(value) if abs(value) < 10**20 else "a number with many digits"


def _is_plain(value: Any) -> bool:
    return (
        isinstance(value, bool) or (isinstance(value, int | float) and is_finite_number(value)) or _is_plain_name(value)
    )


def _is_plain_name(value: Any) -> bool:
    """Return whether a value can only name something installed."""
    return isinstance(value, str) and bool(NAME_PATTERN.fullmatch(value))


def _is_reference(text: str) -> bool:
    """Return whether a text looks like a path, a Hub id or a URL, not like a name or a token."""
    return not TOKEN_PATTERN.fullmatch(text) and (
        text.startswith("~") or any(character in text for character in "/\\:\0")
    )


def _find_inside(name: str, folder: Path) -> Path | None:
    """Return the absolute path of a file inside a folder; None if it does not exist or is outside."""
    if not name or name.startswith("~"):
        return None
    path = folder.absolute() / name
    root = resolve_real_root(folder)
    try:
        real = path.resolve()
        return path if path.exists() and ".." not in path.parts and real.is_relative_to(root) else None
    except (OSError, ValueError, RuntimeError):  # too long a name, or a symlink loop
        return None


def resolve_real_root(folder: Path) -> Path:
    """Return the folder that symlinks of `folder` may refer to: itself, or its repository in the Hub cache."""
    real = folder.resolve()
    for snapshots in real.parents[:2]:  # of a snapshot, or of a folder in it
        if snapshots.name == "snapshots" and (snapshots.parent / "blobs").is_dir():
            return snapshots.parent
    return real


def _iter_files(folder: Path, depth: int) -> Iterator[Path]:
    """Yield all files and folders up to `depth` folders below `folder`; TrustError for deeper ones."""
    for path in sorted(folder.iterdir()):
        yield path
        if path.is_dir() and not path.is_symlink():
            if not depth:
                raise TrustError(
                    f"{path} is nested deeper than {MAX_FOLDER_DEPTH} folders; remove it from the checkpoint"
                )
            yield from _iter_files(path, depth - 1)


def _iter_pairs(content: Any) -> Iterator[tuple[str, Any]]:
    """Yield each key with its value, and each list item with the key of the list, at any depth."""
    pending = [("", content)]
    while pending:
        key, value = pending.pop()
        if isinstance(value, Mapping):
            pending += [(str(inner), each) for inner, each in value.items()]
        elif isinstance(value, list | tuple):
            pending += [(key, each) for each in value]
        yield key, value


def _iter_texts(value: Any) -> Iterator[str]:
    return (each for _, each in _iter_pairs(value) if isinstance(each, str))


def _shorten_value(value: Any) -> str:
    return f"{value!r:.80}"
