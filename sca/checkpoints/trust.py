"""What a checkpoint from elsewhere may do: it is data, so its spec names components, runs no code, and stays inside.

The caller's own specs (`sca.compose`, recipes, options of a captioner) are not restricted; what is read from a
checkpoint is, and only the caller can lift that.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from sca_registry import get_registry
from sca_registry.cards import NAME_PATTERN
from sca_registry.overrides import MODEL_PARTS
from sca_registry.spec import ModelSpec, Part

from sca.io.errors import InputError
from sca.io.hub import get_known_sources
from sca.io.json import read_json
from sca.io.validation import is_finite_number

TRUST_OPTION = "trust_remote_code"
SOURCE_OPTIONS = ("weights", "tokenizer", "config")  # options that name a file, folder, hub id or URL in any component
TOKEN_PATTERN = re.compile(r"</?[\w|-]+>")  # such as </s>, which is no path
MAX_NUMBER = 2**26  # of any whole number in a spec: no dimension, count or position of a model is larger
MAX_LAYERS = 2**10  # of any number of layers or blocks
MAX_FOLDER_DEPTH = 6  # folders of a checkpoint inside each other
CODE_REMEDY = "pass trust_remote_code=True (--trust-remote-code) if you trust its author"
EXTERNAL_REMEDY = "pass allow_external=True (--allow-external) if you agree; it does not allow code"
REMOTE_KEYS = (  # fields of a configuration by which a library takes code or weights from elsewhere
    *("base_model_name_or_path", "architecture", "backbone"),
    *("timm_model_name", "hf_model_name", "hf_tokenizer_name"),
)
SAFE_IMPLEMENTATIONS = ("", "eager", "sdpa")  # that never load a kernel from a hub, as flash_attention_2 may


class Trust(NamedTuple):
    """What the caller agrees to.

    remote_code: A checkpoint may run code. external: A checkpoint may name files outside its folder, other repositories
    and URLs.
    """

    remote_code: bool = False
    external: bool = False


NO_TRUST = Trust()


class TrustError(InputError):
    """A checkpoint that asks for more than the caller agreed to; one line that names the option that agrees."""


def confine_spec(spec: ModelSpec, folder: Path, trust: Trust) -> ModelSpec:
    """Check the spec of a checkpoint folder before anything is imported or built from it.

    Returns:
        The spec, in which what lies in the folder has an absolute path.

    Raises:
        TrustError: For an option that runs code, and for one that names something outside the folder other than the
            weights of a known card, unless the caller agreed.
        RegistryError: For a component that does not exist.
    """
    parts = {kind: getattr(spec, kind) for kind in MODEL_PARTS}
    confined = {kind: _confine_part(kind, part, folder, trust) for kind, part in parts.items() if part is not None}
    _check_numbers([spec.lora, spec.generation, spec.everything, spec.task_tokens])
    return replace(spec, **confined)


def is_settable(kind: str, name: str, option: str, value: Any) -> bool:
    """Whether a checkpoint may set an option of a component to a plain value without any agreement.

    Plain are truth values, finite numbers, strings that can only name something that is installed, and lists of them. A
    revision is not: the card of a later version may have another.
    """
    values = value if isinstance(value, list | tuple) else (value,)
    if option == "revision" or not all(_is_plain(each) for each in values):
        return False
    try:
        _confine_part(kind, Part(name, {option: value}), Path(), NO_TRUST)
    except TrustError:
        return False
    return True


def resolve_source(name: str, folder: Path, trust: Trust) -> str:
    """Resolve the name of weights or a tokenizer that a checkpoint refers to.

    Returns:
        The absolute path of what lies in the folder, the hub id of a known card, or the name itself.

    Raises:
        TrustError: For anything else, unless the caller agreed.
    """
    if "\0" in name:
        raise TrustError(f"{_shorten_value(name)} is no path; copy the checkpoint again")
    path = _find_inside(name, folder)
    if path is not None:
        return str(path)
    sources = get_known_sources()
    if name in sources:
        return sources[name]
    if not trust.external:
        raise TrustError(f"{_shorten_value(name)} is outside its folder; {EXTERNAL_REMEDY}")
    return name


def check_folder(folder: Path, trust: Trust) -> None:
    """Check the files of a checkpoint folder before a library reads them.

    Raises:
        TrustError: For anything but regular files and folders, for folders nested too deep, and for a link that leaves
            the folder, unless the caller agreed.
        InputError: For JSON that cannot be read.
    """
    root = resolve_real_root(folder)
    for path in _iter_files(folder, MAX_FOLDER_DEPTH):
        check_file(path, root, trust)
        if path.suffix == ".json" and path.is_file() and path.name != "tokenizer.json":
            _check_configuration(read_json(path), path, trust)


def check_file(path: Path, root: Path, trust: Trust) -> None:
    """Check the kind of a file in a checkpoint folder before it is read.

    Args:
        path: The file; it need not exist.
        root: What links may refer to, see `resolve_real_root`.
        trust: What the caller agrees to.

    Raises:
        TrustError: For anything but a regular file or a folder, and for a link that leaves `root`, unless the caller
            agreed.
    """
    mode = path.stat().st_mode if path.exists() else 0
    if mode and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise TrustError(f"{path} is not a regular file; copy the checkpoint again")
    if path.is_symlink() and not trust.external and not path.resolve().is_relative_to(root):
        raise TrustError(f"{path} is a link to outside of its folder; {EXTERNAL_REMEDY}")


def _confine_part(kind: str, part: Part, folder: Path, trust: Trust) -> Part:
    card = get_registry(kind).get_card(part.name)
    subject = f"{kind.replace('_', ' ')} {part.name!r}"
    _check_numbers(part.options)
    _check_configuration(part.options, f"the {subject}", trust)
    options = dict(part.options)
    revision = options.get("revision", card.options.get("revision"))
    if revision != card.options.get("revision") and not trust.external:
        raise TrustError(f"{subject} sets revision={_shorten_value(revision)}, not that of its card; {EXTERNAL_REMEDY}")
    for option, value in part.options.items():
        if option == TRUST_OPTION or option in card.code_options:
            if value is False or (option != TRUST_OPTION and _is_plain_name(value)):
                continue
            if not trust.remote_code:
                raise TrustError(f"{subject} sets {option}={_shorten_value(value)}, which runs code; {CODE_REMEDY}")
        options[option] = _confine_value(subject, option, value, folder, trust)
    return Part(part.name, options)


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
    """Raise TrustError if a configuration makes a library read files or fetch code or weights from elsewhere."""
    for key, value in _iter_pairs(content):
        is_kernel = "_implementation" in key and any(text not in SAFE_IMPLEMENTATIONS for text in _iter_texts(value))
        is_remote = key.endswith(REMOTE_KEYS) and isinstance(value, str) and _is_reference(value)
        if (is_kernel or is_remote) and not trust.remote_code:
            raise TrustError(
                f"{subject} sets {key}={_shorten_value(value)}, which can fetch and run code; {CODE_REMEDY}"
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
            raise TrustError(f"{subject} more than any model has; copy the checkpoint again")


def _format_number(value: int) -> str:
    return str(value) if abs(value) < 10**20 else "a number of many digits"


def _is_plain(value: Any) -> bool:
    return (
        isinstance(value, bool) or (isinstance(value, int | float) and is_finite_number(value)) or _is_plain_name(value)
    )


def _is_plain_name(value: Any) -> bool:
    """Whether a value can only name something that is installed."""
    return isinstance(value, str) and bool(NAME_PATTERN.fullmatch(value))


def _is_reference(text: str) -> bool:
    """Whether text looks like a path, a hub id or a URL, and not like a name or a token."""
    return not TOKEN_PATTERN.fullmatch(text) and (
        text.startswith("~") or any(character in text for character in "/\\:\0")
    )


def _find_inside(name: str, folder: Path) -> Path | None:
    """The absolute path of what lies in a folder; None if it does not exist, or lies elsewhere."""
    if not name or name.startswith("~"):
        return None
    path = folder.absolute() / name
    root = resolve_real_root(folder)
    try:
        real = path.resolve()
        return path if path.exists() and ".." not in path.parts and real.is_relative_to(root) else None
    except (OSError, ValueError, RuntimeError):  # a name that is too long, or a loop of links
        return None


def resolve_real_root(folder: Path) -> Path:
    """What a folder may refer to: itself, or of one in the hub's cache its repository, where the content is stored."""
    real = folder.resolve()
    return real.parent.parent if real.parent.name == "snapshots" and (real.parent.parent / "blobs").is_dir() else real


def _iter_files(folder: Path, depth: int) -> Iterator[Path]:
    """Every file and folder at most `depth` folders below `folder`; TrustError for deeper ones."""
    for path in sorted(folder.iterdir()):
        yield path
        if path.is_dir() and not path.is_symlink():
            if not depth:
                raise TrustError(f"{path} is nested deeper than {MAX_FOLDER_DEPTH} folders; copy the checkpoint again")
            yield from _iter_files(path, depth - 1)


def _iter_pairs(content: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, and every member of a list with the key of the list, at any depth."""
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
