"""Files in a folder of pretrained weights: tensors in one file or in shards, token ids, tokenizers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from safetensors import safe_open

from sca.io.errors import InputError
from sca.io.json import open_regular_file, read_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

SAFETENSORS_FILE, PYTORCH_BIN_FILE = "model.safetensors", "pytorch_model.bin"
NATIVE_WEIGHTS_FILE, NATIVE_SPEC_FILE = "weights.safetensors", "spec.json"  # checkpoint in our own layout
RUN_CHECKPOINT = "model"  # folder of the checkpoint in that of a training run
ADAPTER_CONFIG_FILE = "adapter_config.json"  # transformers would download the weights that it names
SPECIAL_TOKEN_ID_FIELDS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
)
SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")  # any of these makes a tokenizer


class TensorInfo(NamedTuple):
    """Dtype, such as "float32", and shape of a tensor in a file."""

    dtype: str
    shape: tuple[int, ...]


def check_regular_files(folder: Path) -> None:
    """Raise InputError if a folder of weights contains anything but files and folders: opening a FIFO blocks."""
    for path in folder.iterdir():
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise InputError(f"{path} is not a regular file; remove it or copy the folder again")


def describe_run_folder(folder: Path) -> str:
    """Return where the checkpoint is if a folder is that of a training run; "" for any other folder."""
    checkpoint = folder / RUN_CHECKPOINT
    if (folder / NATIVE_SPEC_FILE).exists() or not (checkpoint / NATIVE_SPEC_FILE).is_file():
        return ""
    return f"{folder} is a run folder of `sca train`; the checkpoint is in {checkpoint}"


def has_complete_weights(folder: Path, prefix: str = "") -> bool:
    """Return whether a folder contains a configuration or a checkpoint spec, and all the weights that it requires."""
    if (folder / NATIVE_SPEC_FILE).is_file():
        return (folder / NATIVE_WEIGHTS_FILE).is_file()
    return (folder / f"{prefix}config.json").is_file() and find_weight_files(folder, prefix) is not None


def find_weight_files(folder: Path, prefix: str = "") -> list[Path] | None:
    """Return the weight files of a folder in transformers' format, single or sharded; None if any is missing."""
    for name in (prefix + SAFETENSORS_FILE, prefix + PYTORCH_BIN_FILE):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}.index.json").is_file():
            shards = [(folder / name).parent / shard for shard in _read_shard_names(folder / f"{name}.index.json")]
            return shards if all(shard.is_file() for shard in shards) else None
    return None


def require_weight_files(folder: Path, source: str | Path, prefix: str = "") -> list[Path]:
    """Return the weight files of a folder in transformers' format.

    Args:
        folder: Folder.
        source: Name of the folder in messages.
        prefix: Prefix of the file names.

    Returns:
        Paths of the weight files.

    Raises:
        InputError: Files are missing or Git LFS pointers, or the folder contains an adapter of other weights.
    """
    if (folder / ADAPTER_CONFIG_FILE).exists():
        raise InputError(
            f"{source} is a peft adapter of other weights ({ADAPTER_CONFIG_FILE}); merge it first: "
            "load the base with it in peft, call merge_and_unload(), and save the result"
        )
    files = find_weight_files(folder, prefix)
    if files is None:
        raise InputError(
            f"{source} has incomplete weights: {describe_missing_weights(folder, prefix)}; copy or download it again"
        )
    for file in files:
        check_is_not_lfs_pointer(file)
    return files


def check_is_not_lfs_pointer(file: Path) -> None:
    """Raise InputError for a weight file that is a Git LFS pointer."""
    open_regular_file(file).close()


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read all tensors of a weight file, without running code that it may contain."""
    import torch
    from safetensors.torch import load_file

    return load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)


def read_tensor_names(file: Path) -> list[str]:
    """Read the tensor names of a weight file, without their content."""
    import torch

    if file.suffix != ".safetensors":
        return list(torch.load(file, "meta", weights_only=True))
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def read_tensor_infos(file: Path) -> dict[str, TensorInfo]:
    """Read the dtype and shape of each tensor of a weight file, without their content.

    Args:
        file: Weight file.

    Returns:
        Dtypes and shapes by name.

    Raises:
        InputError: The file cannot be read.
    """
    import torch

    with translate_load_errors(file):
        if file.suffix != ".safetensors":
            tensors = torch.load(file, "meta", weights_only=True)
            return {
                name: TensorInfo(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
                for name, tensor in tensors.items()
            }
        with safe_open(file, framework="pt") as reader:
            slices = {name: reader.get_slice(name) for name in list(reader.keys())}
            return {
                name: TensorInfo(SAFETENSORS_DTYPES.get(each.get_dtype(), each.get_dtype()), tuple(each.get_shape()))
                for name, each in slices.items()
            }


def read_token_ids(folder: Path) -> dict[str, int | list[int]]:
    """Read the ids of special tokens from `generation_config.json`; empty if the file does not exist.

    Its other settings, such as a repetition penalty or a time limit, would change captions: generation follows only the
    spec.

    Args:
        folder: Model folder.

    Returns:
        Token ids by setting, such as `eos_token_id`.

    Raises:
        InputError: An id is not an integer, or the file is not JSON.
    """
    file = folder / "generation_config.json"
    if not file.exists():
        return {}
    with translate_load_errors(file):
        settings = read_json(file)
        ids = {name: settings[name] for name in SPECIAL_TOKEN_ID_FIELDS if settings.get(name) is not None}
    for name, value in ids.items():
        for token in value if isinstance(value, list) else [value]:
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise InputError(f"{name} in {file} is {value!r}; expected the id of a token, or a list of ids")
    return ids


@contextmanager
def translate_load_errors(source: str | Path) -> Iterator[None]:
    """Convert library errors about weights or configurations that do not match to a one-line InputError."""
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # panics of third-party code are not Exceptions
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{source} cannot be read: {reason}") from error


def format_first_names(names: Sequence[str]) -> str:
    """Format the first of many names."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "nothing"


def _read_shard_names(index: Path) -> list[str]:
    try:
        shards = sorted(set(read_json(index)["weight_map"].values()))
        if any(Path(shard).name != shard for shard in shards):
            raise ValueError("a shard is in a different folder")
        return shards
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = "no 'weight_map'" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"{index} is not an index of sharded weights ({reason}); download the weights again"
        ) from error


def describe_missing_weights(folder: Path, prefix: str = "") -> str:
    """Describe what a folder with incomplete weights lacks."""
    for name in (prefix + SAFETENSORS_FILE, prefix + PYTORCH_BIN_FILE):
        if (folder / f"{name}.index.json").is_file():
            shards = [
                shard
                for shard in _read_shard_names(folder / f"{name}.index.json")
                if not ((folder / name).parent / shard).is_file()
            ]
            return f"no {format_first_names(shards)}"
    return f"neither {prefix}{SAFETENSORS_FILE} nor {prefix}{PYTORCH_BIN_FILE}"


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder contains a tokenizer of transformers."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors with their names, dtypes and shapes, on any device."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
