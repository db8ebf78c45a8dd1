"""Pretrained weights by hub id or folder: found, fetched once, and read without guessing.

What is fetched lies in the cache of huggingface_hub and is used from there ever after, with or without a network.
`HF_HOME`, `HF_TOKEN` and `HF_ENDPOINT` have their usual meaning.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

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
from safetensors import SafetensorError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PretrainedConfig, PreTrainedModel

Model = TypeVar("Model", bound="PreTrainedModel")
Config = TypeVar("Config", bound="PretrainedConfig")

TIMEOUT = 10  # seconds that the hub has for its first answer
SAFE, OLD = "model.safetensors", "pytorch_model.bin"
OWN, SPEC = "weights.safetensors", "spec.json"  # of a checkpoint in our own layout
TEXTS = ("*.json", "*.txt", "*.model", "*.jinja")  # configurations and tokenizers


class HubError(ValueError):
    """Weights that cannot be found, fetched or read; the message is one line that says which, why and what to do."""


def fetch(source: str | Path, revision: str | None = None, weights: bool = True, code: bool = False) -> Path:
    """The folder of pretrained weights: `source` itself if it is one, else the copy of a hub id in the cache, which is
    fetched if it is not there or not whole. weights: False where configurations and tokenizers will do. code: whether
    Python files are wanted, too, by those who trust them.

    Raises HubError.
    """
    if Path(source).expanduser().is_dir():
        return Path(source).expanduser()
    cached = _cached(str(source), revision)
    enough = cached and (whole(cached) if weights else any(cached.glob("*.json")))
    return cached if cached and enough else pull(str(source), revision, weights, code)


def pull(name: str, revision: str | None = None, weights: bool = True, code: bool = False) -> Path:
    """Fetches the newest files of a hub id, with a progress bar; what is here already is not fetched again, and what
    was cut off goes on. The folder in the cache. Raises HubError.
    """
    with _reaching(name, revision):
        files = [each.rfilename for each in model_info(name, revision=revision, timeout=TIMEOUT).siblings or ()]
    wanted = [*TEXTS, *(["*.py"] if code else [])]
    if weights and SPEC in files:
        wanted.append(OWN)
    elif weights:
        safe = any(file in (SAFE, f"{SAFE}.index.json") for file in files)
        wanted.append("model*.safetensors*" if safe else "pytorch_model*.bin*")
    with _reaching(name, revision):
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))


def whole(folder: Path) -> bool:
    """Whether a configuration, or the spec of a checkpoint, and all the weights that it asks for are in the folder."""
    if (folder / SPEC).is_file():
        return (folder / OWN).is_file()
    return (folder / "config.json").is_file() and weight_files(folder) is not None


def weight_files(folder: Path) -> list[Path] | None:
    """The files that hold the weights of a folder in transformers' format, in one piece or in shards; None if some are
    not there.
    """
    for name in (SAFE, OLD):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}.index.json").is_file():
            shards = [folder / shard for shard in _shards(folder / f"{name}.index.json")]
            return shards if all(shard.is_file() for shard in shards) else None
    return None


def load_pretrained(
    cls: type[Model], source: str | Path, revision: str | None = None, elsewhere: Sequence[str] = (), **options: Any
) -> Model:
    """`cls.from_pretrained` that leaves nothing at random: every tensor of the model must be among the weights, and
    every weight must have its place, but for those whose name begins with one of `elsewhere`.

    Raises HubError.
    """
    folder = fetch(source, revision, code=bool(options.get("trust_remote_code")))
    if weight_files(folder) is None:
        raise HubError(f"{source} has no whole weights: {absent(folder)}. Copy or download it again")
    try:
        with quiet():
            model, found = cls.from_pretrained(folder, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, pickle.UnpicklingError) as error:
        raise HubError(f"{source} cannot be read: {' '.join(str(error).split())[:300]}") from error
    unexpected = [name for name in found["unexpected_keys"] if not name.startswith(tuple(elsewhere))]
    for what, names in (
        ("lacks", found["missing_keys"]),
        ("has another shape of", [str(each[0]) for each in found["mismatched_keys"]]),
        ("has no place for", unexpected),
    ):
        if names:
            raise HubError(f"{source} does not fit a {cls.__name__}: it {what} {some(sorted(names))}")
    return model


def read_config(cls: type[Config], source: str | Path, revision: str | None = None) -> Config:
    """`cls.from_pretrained` of a configuration. Raises HubError."""
    folder = fetch(source, revision, weights=False)
    try:
        return cls.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HubError(
            f"{source} has no configuration that can be read: {' '.join(str(error).split())[:300]}"
        ) from error


def fingerprint(source: str | Path, revision: str | None = None) -> dict[str, Any]:
    """What tells these weights from any others: the commit, if they came from the hub, and a hash of each file.

    Raises HubError.
    """
    folder = fetch(source, revision)
    hashes = {}
    for file in weight_files(folder) or ():
        with file.open("rb") as stream:
            hashes[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    commit = {"commit": folder.name} if re.fullmatch("[0-9a-f]{40}", folder.name) else {}
    return {"weights": str(source), **({"revision": revision} if revision else {}), **commit, "sha256": hashes}


def some(names: Sequence[str]) -> str:
    """The first of many names."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "nothing"


@contextmanager
def quiet() -> Iterator[None]:
    """transformers remarks on much that is not a user's business, such as generation from embeddings."""
    from transformers import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


@contextmanager
def _reaching(name: str, revision: str | None) -> Iterator[None]:
    """What the hub raises, as one line."""
    which = repr(name) + (f" at revision {revision!r}" if revision else "")
    try:
        yield
    except (HFValidationError, RepositoryNotFoundError) as error:
        if isinstance(error, GatedRepoError):
            raise HubError(
                f"{which} is gated: accept its terms at https://huggingface.co/{name}, then set HF_TOKEN to your token"
            ) from error
        raise HubError(
            f"{which} is neither a folder here nor a model on the hub; for a private one set HF_TOKEN to your token"
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"the hub has no {which}") from error
    except (HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:150]
        raise HubError(
            f"{which} is no folder here, and the hub could not be reached ({reason}). Try again with a network, or "
            "give a folder that has it: weights=FOLDER"
        ) from error


def _cached(name: str, revision: str | None) -> Path | None:
    """The folder of a hub id in the cache, whole or not."""
    for file in ("config.json", SPEC, "tokenizer.json", "tokenizer_config.json"):
        try:
            found = try_to_load_from_cache(name, file, revision=revision)
        except HFValidationError:  # no hub id at all
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HubError(f"{index} is not the index of a model in shards ({error!r}): copy it again") from error


def absent(folder: Path) -> str:
    """What a folder without whole weights lacks."""
    for name in (SAFE, OLD):
        if (folder / f"{name}.index.json").is_file():
            shards = [shard for shard in _shards(folder / f"{name}.index.json") if not (folder / shard).is_file()]
            return f"no {some(shards)}"
    return f"neither {SAFE} nor {OLD}"
