"""Find, download and load pretrained weights by Hub id or folder.

Downloads are stored in the cache of huggingface_hub and reused from there, online or offline. `HF_HOME`, `HF_TOKEN` and
`HF_ENDPOINT` have their usual meaning.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from huggingface_hub import model_info, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sca.io.atomic import write_file
from sca.io.cache import get_cache_folder
from sca.io.errors import InputError, LockedError
from sca.io.file_lock import hold_lock
from sca.io.json import read_json
from sca.io.weight_files import (
    ADAPTER_CONFIG_FILE,
    NATIVE_SPEC_FILE,
    NATIVE_WEIGHTS_FILE,
    RUN_CHECKPOINT,
    SAFETENSORS_FILE,
    SPECIAL_TOKEN_ID_FIELDS,
    check_is_not_lfs_pointer,
    check_regular_files,
    describe_run_folder,
    find_weight_files,
    format_first_names,
    has_complete_weights,
    read_token_ids,
    require_weight_files,
    translate_load_errors,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

logger: logging.Logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound="PreTrainedModel")
Config = TypeVar("Config", bound="PretrainedConfig")

TIMEOUT_SECONDS = 10  # timeout of requests to the Hub and of the lock
CONFIG_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja")  # configurations and tokenizers
OPEN_CLIP_PREFIX = "open_clip_"  # prefix of open_clip's files, stored next to those of transformers or timm
PINNED_COMMITS_FILE = "pulled.json"  # commits pinned by `sca pull`, in the user's cache
COMMIT_PATTERN = re.compile("[0-9a-f]{40}")


def fetch_model_folder(
    source: str | Path,
    revision: str | None = None,
    include_weights: bool = True,
    include_code: bool = False,
    prefix: str = "",
) -> Path:
    """Return a folder of pretrained weights; download it if it is missing or incomplete.

    Args:
        source: Folder, returned unchanged, or Hub id.
        revision: Hub revision. Defaults to the pinned commit.
        include_weights: Whether weights are needed, or only configurations and tokenizers.
        include_code: Whether to download Python files, for users who trust them.
        prefix: Prefix of the file names, if a repository contains a model in several formats.

    Returns:
        The folder, or the copy of the Hub id in the cache.

    Raises:
        InputError: The folder is invalid, or the download failed.
    """
    folder = find_local_folder(source)
    if folder is not None:
        check_regular_files(folder)
        return folder
    revision = revision or get_pinned_commit(str(source))
    cached = _find_cached_folder(str(source), revision, prefix)
    is_sufficient = cached and (has_complete_weights(cached, prefix) if include_weights else any(cached.glob("*.json")))
    return (
        cached
        if cached and is_sufficient
        else download_model_files(str(source), revision, include_weights, include_code, prefix)
    )


def resolve_local_path(source: str | Path) -> Path | None:
    """Return the path that a name refers to, or None.

    A path is a `Path`, or text with a separator, such as ./model or runs/x/model. A bare name is never a path, even if
    the current directory contains an entry of that name. The same applies to the Hub id OWNER/NAME of a card.
    """
    if isinstance(source, Path):
        return source.expanduser()
    if not any(sign in source for sign in {"/", os.sep}) and source not in (".", "..", "~"):
        return None
    return None if "\0" in source or source in get_known_sources() else Path(source).expanduser()


def suggest_path(name: str) -> str:
    """Return a hint on how to write the path of an entry of the current directory; empty if no such entry exists."""
    if "\0" in name or not os.path.exists(name):
        return ""
    folder = Path(name)
    if describe_run_folder(folder):
        return f"; for the model of the training run, write ./{folder / RUN_CHECKPOINT}"
    hint = f"; for the local path, write ./{name}"
    try:
        if (folder / ADAPTER_CONFIG_FILE).exists() or find_weight_files(folder):
            require_weight_files(folder, folder)
    except InputError as error:
        hint += f", but {error}"
    return hint


def find_local_folder(source: str | Path) -> Path | None:
    """Return the folder that a name refers to, see `resolve_local_path`; None if none exists."""
    path = resolve_local_path(source)
    return path if path is not None and path.is_dir() else None


def find_local_file(source: str | Path) -> Path | None:
    """Return the file that a name refers to, see `resolve_local_path`; None if none exists."""
    path = resolve_local_path(source)
    return path if path is not None and path.is_file() else None


def get_known_sources() -> Mapping[str, str]:
    """Return the Hub ids and URLs of weights in cards, by the source itself and by the names of its cards."""
    from sca_registry import REGISTRIES

    return _collect_known_sources(tuple((plural, tuple(each.list_names())) for plural, each in REGISTRIES.items()))


@functools.cache
def _collect_known_sources(names: tuple[tuple[str, tuple[str, ...]], ...]) -> Mapping[str, str]:
    from sca_registry import REGISTRIES, zoo

    cards = [REGISTRIES[plural].get_card(name) for plural, listed in names for name in listed]
    weights = {card.name: card.options["weights"] for card in cards if card.options.get("weights")}
    checkpoints = [zoo.get_entry(name).checkpoint for name in zoo.list_names() if zoo.get_entry(name).folder is None]
    return weights | {source: source for source in (*weights.values(), *checkpoints)}


def get_pinned_commit(name: str) -> str | None:
    """Return the commit of a Hub id pinned by the last `sca pull`; None if it was never pulled."""
    return _read_pinned_commits().get(name)


def pin_commit(name: str, folder: Path) -> str | None:
    """Store the commit of a Hub id in the cache, for later loads that name no revision.

    Args:
        name: Hub id.
        folder: Folder in the Hub's cache that contains the commit.

    Returns:
        The commit; None for a folder that is not named by a commit.
    """
    commit = get_folder_commit(folder)
    if commit is not None and _read_pinned_commits().get(name) != commit:
        file = get_cache_folder() / PINNED_COMMITS_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        with _wait_for_lock(file):
            write_file(file, json.dumps({**_read_pinned_commits(), name: commit}, indent=1) + "\n")
    return commit


@contextmanager
def _wait_for_lock(file: Path) -> Iterator[None]:
    """Hold the lock of a file that other processes change briefly; raise LockedError after TIMEOUT_SECONDS."""
    end = time.monotonic() + TIMEOUT_SECONDS
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(hold_lock(file.with_name(f".{file.name}.sca-lock"), str(file)))
                break
            except LockedError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
        yield


def get_folder_commit(folder: Path) -> str | None:
    """Return the commit that names a folder in the Hub's cache; None for any other folder."""
    return folder.name if COMMIT_PATTERN.fullmatch(folder.name) else None


def _read_pinned_commits() -> dict[str, str]:
    try:
        pins = read_json(get_cache_folder() / PINNED_COMMITS_FILE)
    except FileNotFoundError:
        return {}
    commits = pins.values() if isinstance(pins, dict) else [pins]
    if not all(isinstance(commit, str) and COMMIT_PATTERN.fullmatch(commit) for commit in commits):
        raise InputError(
            f"{get_cache_folder() / PINNED_COMMITS_FILE} is not a valid list of pinned commits; delete it and run "
            "`sca pull` again"
        )
    return pins


def download_model_files(
    name: str, revision: str | None = None, include_weights: bool = True, include_code: bool = False, prefix: str = ""
) -> Path:
    """Download the files of a Hub id with a progress bar.

    Files in the cache are not downloaded again, and interrupted downloads resume.

    Args:
        name: Hub id.
        revision: Hub revision. Defaults to the newest.
        include_weights: Whether to download weights, or only configurations and tokenizers.
        include_code: Whether to download Python files.
        prefix: Prefix of the file names.

    Returns:
        The folder in the cache.

    Raises:
        InputError: The download failed.
    """
    for usage_terms in list_usage_terms(name):
        logger.warning("sca: %s", usage_terms)
    with _translate_hub_errors(name, revision):
        files = [each.rfilename for each in model_info(name, revision=revision, timeout=TIMEOUT_SECONDS).siblings or ()]
    patterns = [*CONFIG_PATTERNS, *(["*.py"] if include_code else [])]
    if include_weights and NATIVE_SPEC_FILE in files:
        patterns.append(NATIVE_WEIGHTS_FILE)
    elif include_weights:
        has_safetensors = any(
            file in (prefix + SAFETENSORS_FILE, f"{prefix}{SAFETENSORS_FILE}.index.json") for file in files
        )
        patterns.append(prefix + ("model*.safetensors*" if has_safetensors else "pytorch_model*.bin*"))
    with _translate_hub_errors(name, revision):
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))


def list_usage_terms(name: str) -> list[str]:
    """List the usage terms of a Hub id, in its cards and in the zoo, to show before a download."""
    from sca_registry import REGISTRIES, zoo

    cards = [registry.get_card(part) for registry in REGISTRIES.values() for part in registry.list_names()]
    matching_cards = [card for card in cards if card.terms and card.options.get("weights") == name]
    entry = zoo.find_hub_entry(name)
    matching: list[Any] = [*matching_cards, *([entry] if entry is not None and entry.is_noncommercial else [])]
    return [f"{name} ({each.license}): {each.terms}" for each in matching][:1]


def fetch_weight_file(source: str | Path, revision: str | None = None, prefix: str = "") -> Path:
    """Return the single file with the weights.

    Args:
        source: The file itself, a folder or a Hub id.
        revision: Hub revision.
        prefix: Prefix of the file name.

    Returns:
        Path of the local file.

    Raises:
        InputError: The weights are missing or sharded.
    """
    file = find_local_file(source)
    if file is not None:
        check_is_not_lfs_pointer(file)
        return file
    files = require_weight_files(fetch_model_folder(source, revision, prefix=prefix), source, prefix)
    if len(files) > 1:
        raise InputError(f"{source} has its weights in {len(files)} shards; use weights in a single file")
    return files[0]


@overload
def load_pretrained(
    cls: type[Model],
    source: str | Path,
    revision: str | None = None,
    ignored_prefixes: Sequence[str] = (),
    **options: Any,
) -> Model: ...


@overload
def load_pretrained(
    cls: type[_BaseAutoModelClass],
    source: str | Path,
    revision: str | None = None,
    ignored_prefixes: Sequence[str] = (),
    **options: Any,
) -> PreTrainedModel: ...


def load_pretrained(
    cls: Any,
    source: str | Path,
    revision: str | None = None,
    ignored_prefixes: Sequence[str] = (),
    **options: Any,
) -> Any:
    """Call `cls.from_pretrained` and reject weights that do not match the model.

    Every tensor of the model must be among the weights, so that none is initialized at random. Every weight must belong
    to the model, except those with an ignored prefix. Of the generation settings in the folder, only the ids of special
    tokens are used.

    Args:
        cls: Model class of transformers.
        source: Folder or Hub id.
        revision: Hub revision.
        ignored_prefixes: Prefixes of weights that the model does not need.
        **options: Options of `from_pretrained`.

    Returns:
        The model, in eval mode.

    Raises:
        InputError: Weights are missing, unexpected or damaged.
    """
    from transformers import GenerationConfig

    options = {"trust_remote_code": False, **options}  # None would prompt on the terminal
    folder = fetch_model_folder(source, revision, include_code=options["trust_remote_code"])
    require_weight_files(folder, source)
    ids = read_token_ids(folder)
    with translate_load_errors(source), silence_transformers():
        model, loading_info = cls.from_pretrained(
            folder,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with the names of the tensors
            generation_config=GenerationConfig(),
            **options,
        )
    if model.can_generate():
        model_defaults = GenerationConfig.from_model_config(model.config)
        model.generation_config = GenerationConfig(
            **{name: getattr(model_defaults, name, None) for name in SPECIAL_TOKEN_ID_FIELDS} | ids
        )
    unexpected = [name for name in loading_info["unexpected_keys"] if not name.startswith(tuple(ignored_prefixes))]
    for problem, names in (
        ("lacks", loading_info["missing_keys"]),
        ("has other shapes for", [str(each[0]) for each in loading_info["mismatched_keys"]]),
        ("has unexpected tensors", unexpected),
    ):
        if names:
            raise InputError(
                f"{source} does not fit a {cls.__name__}: it {problem} {format_first_names(sorted(names))}"
            )
    return model


@overload
def fetch_pretrained_config(cls: type[Config], source: str | Path, revision: str | None = None) -> Config: ...


@overload
def fetch_pretrained_config(
    cls: type[AutoConfig], source: str | Path, revision: str | None = None
) -> PretrainedConfig: ...


def fetch_pretrained_config(cls: Any, source: str | Path, revision: str | None = None) -> Any:
    """Call `cls.from_pretrained` of a configuration class.

    Args:
        cls: Configuration class of transformers.
        source: Folder or Hub id.
        revision: Hub revision.

    Returns:
        The configuration.

    Raises:
        InputError: The configuration is missing or invalid.
    """
    folder = fetch_model_folder(source, revision, include_weights=False)
    with translate_load_errors(f"the configuration of {source}"):
        return cls.from_pretrained(folder, trust_remote_code=False)


def fetch_config_fields(
    weights: str | None, revision: str | None = None, config: Mapping[str, Any] | None = None
) -> Mapping[str, Any]:
    """Return the stored fields of a configuration, without defaults; nested configurations are dicts.

    Args:
        weights: Hub id or folder whose configuration is used if `config` is None.
        revision: Revision of the Hub id.
        config: Fields of the configuration.

    Returns:
        The fields; empty if neither `weights` nor `config` is set.

    Raises:
        InputError: The configuration is missing or invalid.
    """
    if config is not None or weights is None:
        return config or {}
    from transformers import PretrainedConfig

    folder = fetch_model_folder(weights, revision, include_weights=False)
    with translate_load_errors(f"the configuration of {weights}"):
        return PretrainedConfig.get_config_dict(folder)[0]


def make_config(weights: str | None, revision: str | None, config: Mapping[str, Any] | None) -> PretrainedConfig:
    """Return the configuration of a model.

    Args:
        weights: Hub id or folder whose configuration is used if `config` is None.
        revision: Revision of the Hub id.
        config: Fields of the configuration, including `model_type`.

    Returns:
        The configuration of transformers.

    Raises:
        ValueError: Neither `weights` nor `config` is set.
    """
    from transformers import AutoConfig

    if config is not None:
        return AutoConfig.for_model(**config)
    if weights is None:
        raise ValueError("neither weights nor config is set; set weights to a folder or a Hub id")
    return fetch_pretrained_config(AutoConfig, weights, revision)


def initialize_model(cls: Any, config: PretrainedConfig) -> Any:
    """Build a model of transformers with random weights from a fixed seed.

    Args:
        cls: Model class, or one of the automatic classes.
        config: Configuration of the model.

    Returns:
        The model.
    """
    import torch

    with silence_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls.from_config(config, trust_remote_code=False) if hasattr(cls, "from_config") else cls(config)


def check_model_type(
    source: str | Path, revision: str | None, model_types: Collection[str], shown_types: Collection[str] = ()
) -> str:
    """Check the model type of weights in transformers' format.

    Args:
        source: Folder or Hub id.
        revision: Hub revision.
        model_types: Accepted model types.
        shown_types: Model types that the error message names; empty for all.

    Returns:
        The model type.

    Raises:
        InputError: The configuration is missing or invalid, or has another model type.
    """
    from transformers import AutoConfig

    model_type = str(fetch_pretrained_config(AutoConfig, source, revision).model_type)
    if model_type not in model_types:
        accepted = " or ".join(map(repr, shown_types or model_types))
        raise InputError(f"{source} has the model type {model_type!r}; this component requires {accepted}")
    return model_type


def compute_weights_fingerprint(source: str | Path, revision: str | None = None, prefix: str = "") -> dict[str, Any]:
    """Return a fingerprint of weights: their commit, if they come from the Hub, and a hash of each file.

    Args:
        source: File, folder or Hub id.
        revision: Hub revision.
        prefix: Prefix of the file names.

    Returns:
        JSON-serializable fingerprint.

    Raises:
        InputError: The weights are missing or cannot be read.
    """
    single_file = find_local_file(source)
    folder = single_file.parent if single_file else fetch_model_folder(source, revision, prefix=prefix)
    hashes = {}
    for file in [single_file] if single_file else find_weight_files(folder, prefix) or ():
        with file.open("rb") as stream:
            hashes[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    commit = get_folder_commit(folder)
    identity = {"weights": str(source), "revision": revision, "commit": commit, "sha256": hashes}
    return {key: value for key, value in identity.items() if value is not None}


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Silence warnings of transformers that do not concern the user, such as those about generation from embeddings."""
    from transformers import logging

    level, had_progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_progress_bar:
            logging.enable_progress_bar()


@contextmanager
def _translate_hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Convert errors of the Hub to one-line InputErrors."""
    description = repr(name) + (f" at revision {revision!r}" if revision else "")
    try:
        yield
    except (HFValidationError, RepositoryNotFoundError) as error:
        if isinstance(error, GatedRepoError):
            raise InputError(
                f"{description} is gated: accept its terms at https://huggingface.co/{name}, then set HF_TOKEN to your "
                "token"
            ) from error
        raise InputError(
            f"{description} is neither a folder nor a model on the Hub; for a private model, set HF_TOKEN to your token"
            f"{suggest_path(name)}"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"the Hub has no {description}") from error
    except (HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:150]
        raise InputError(
            f"{description} is not a folder, and the Hub could not be reached ({reason}); connect to a network, or "
            f"set weights=FOLDER{suggest_path(name)}"
        ) from error


def is_cached(name: str, revision: str | None = None, prefix: str = "") -> bool:
    """Return whether the complete weights of a Hub id are in the cache; the arguments are those of the download."""
    folder = _find_cached_folder(name, revision or get_pinned_commit(name), prefix)
    return folder is not None and (folder / prefix).is_dir() and has_complete_weights(folder, prefix)


def _find_cached_folder(name: str, revision: str | None, prefix: str) -> Path | None:
    """Return the folder of a Hub id in the cache, complete or not."""
    for file in (f"{prefix}config.json", NATIVE_SPEC_FILE, "tokenizer.json", "tokenizer_config.json"):
        try:
            cached_path = try_to_load_from_cache(name, file, revision=revision)
        except HFValidationError:  # not a Hub id
            return None
        if isinstance(cached_path, str):
            return Path(cached_path).parents[file.count("/")]
    return None
