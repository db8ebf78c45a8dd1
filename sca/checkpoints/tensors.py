"""Tensors of a checkpoint: selection, validation, assignment and hashes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from sca_registry import get_registry
from sca_registry.overrides import MODEL_COMPONENTS
from sca_registry.spec import ComponentSpec, ModelSpec
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from sca.io.errors import InputError, NonFiniteWeightsError
from sca.io.hub import resolve_local_path
from sca.io.weight_files import format_first_names, hash_tensors
from sca.model import SegmentCaptioner
from sca.nn.quantized_layers import list_inner_tensors

COMPARABLE_DTYPES = (  # dtypes that torch.aminmax supports
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
)
MAX_EXPANSION = 8  # bytes in memory per byte of a file: float64 for an 8-bit format
EXTRA_BYTES = 2**28  # buffers, tied weights and temporary tensors, which files do not contain
MAX_DOWNLOAD_BYTES = 2**37  # assumed size of weights that are not downloaded yet


def check_finite_weights(model: torch.nn.Module, subject: str) -> None:
    """Check that no tensor of a model has NaN and no parameter is infinite; buffers may be infinite.

    Args:
        model: Model.
        subject: Subject of the error message.

    Raises:
        NonFiniteWeightsError: A tensor is not finite.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    non_finite_names = [
        name for name, tensor in model.state_dict().items() if not _is_finite(tensor, name in parameters)
    ]
    if non_finite_names:
        raise NonFiniteWeightsError(
            f"{subject} has NaN or infinite weights: {format_first_names(non_finite_names)}; copy or train it again"
        )


def _is_finite(tensor: Tensor, forbid_infinity: bool) -> bool:
    """Check a tensor in one pass without a copy; minimum and maximum are NaN if any element is."""
    if is_traceable_wrapper_subclass(tensor):
        return all(_is_finite(inner, forbid_infinity) for inner in list_inner_tensors(tensor))
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor.detach() if tensor.dtype in COMPARABLE_DTYPES else tensor.detach().float())
    extremes = torch.stack((low, high))
    return bool(extremes.isfinite().all() if forbid_infinity else not extremes.isnan().any())


class BuildSizeLimit(TorchDispatchMode):
    """Context manager that aborts building a model far larger than its weight files.

    A spec consists of a few numbers; a wrong one could otherwise exhaust memory before the weights are compared.
    Pretrained weights of components count too; those not downloaded yet count as `MAX_DOWNLOAD_BYTES`.

    Args:
        files: Weight files of the checkpoint.
        spec: Spec of the model.

    Raises:
        ValueError: The model being built exceeds the limit.
    """

    def __init__(self, files: Sequence[Path], spec: ModelSpec):
        super().__init__()
        sizes = [file.stat().st_size for file in files if file.is_file()]
        for kind in MODEL_COMPONENTS:
            component = getattr(spec, kind)
            sizes += [] if component is None else _list_source_sizes(kind, component)
        self.remaining_bytes: int = sum(sizes) * MAX_EXPANSION + EXTRA_BYTES
        self.tracked_storages: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler, which takes as long as importing torch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._track_storage(tensor.untyped_storage())
        return result

    def _track_storage(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.tracked_storages:
            return
        self.tracked_storages.add(key)
        self.remaining_bytes -= size
        weakref.finalize(storage, self._release_storage, key, size)
        if self.remaining_bytes < 0:
            raise ValueError(
                "the model needs far more memory than its weight files contain; the files are incomplete or belong to "
                "a smaller model. Copy or download the checkpoint again"
            )

    def _release_storage(self, key: int, size: int) -> None:
        self.tracked_storages.discard(key)
        self.remaining_bytes += size


def _list_source_sizes(kind: str, component: ComponentSpec) -> list[int]:
    """Return the sizes in bytes of the pretrained weights of a component."""
    options = {**get_registry(kind).get_card(component.name).options, **component.options}
    path = resolve_local_path(str(options["weights"])) if options.get("weights") else None
    if path is not None and path.exists():
        return [file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]) if file.is_file()]
    return (
        [MAX_DOWNLOAD_BYTES]
        if any(options.get(name) not in (None, True, False) for name in ("weights", "pretrained"))
        else []
    )


def assign_tensors(
    model: SegmentCaptioner,
    tensors: dict[str, Tensor],
    expected: set[str],
    location: Path,
    config_name: str,
    format_name: Callable[[str], str] = str,
) -> None:
    """Load the tensors of a checkpoint into a model.

    Args:
        model: Model.
        tensors: Tensors by name.
        expected: Names that the checkpoint must have, no more and no less.
        location: File or folder of the tensors, for error messages.
        config_name: File that defines the model, for error messages.
        format_name: Returns the name in the file of a tensor of the model, for error messages.

    Raises:
        InputError: Tensors are missing, unexpected, or of a different shape than in the model.
    """
    missing, unexpected = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
    if missing or unexpected:
        raise InputError(
            f"{location} does not fit its {config_name}: missing {format_first_names(missing)}; "
            f"unexpected {format_first_names(unexpected)}"
        )
    model_tensors = model.state_dict()
    for name, tensor in tensors.items():
        if model_tensors[name].shape != tensor.shape:
            raise InputError(
                f"{location}: {format_name(name)} is {tuple(tensor.shape)} and the {config_name} requires "
                f"{tuple(model_tensors[name].shape)}"
            )
    model.load_state_dict(model_tensors | tensors)


def list_stored_tensors(model: SegmentCaptioner) -> set[str]:
    """Return the names of the tensors that a checkpoint stores: all except frozen ones with a pretrained source.

    Buffers of a trainable component are stored, because training may change them. Tensors added to a pretrained
    component, a segmenter's neck or LoRA, are always stored.
    """
    sourced_names = set()
    for kind in ("encoder", "segmenter", "language_model"):
        component = getattr(model, kind)
        if getattr(component, "checkpoint", None):
            is_trainable = any(parameter.requires_grad for parameter in component.parameters())
            names = dict(component.named_parameters(remove_duplicate=False)) if is_trainable else component.state_dict()
            sourced_names |= {f"{kind}.{name}" for name in names}
    trainable_names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    added_names = {name for name in sourced_names if name.startswith("segmenter.neck.") or "lora_" in name}
    return set(model.state_dict()) - (sourced_names - trainable_names - added_names)


def hash_weights(model: SegmentCaptioner) -> str:
    """Return the SHA-256 of the tensors that a checkpoint of a model stores, on any device."""
    state = model.state_dict()
    return hash_tensors({name: state[name] for name in list_stored_tensors(model)})
