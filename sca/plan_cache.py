"""Cost estimates of models, and their cache.

Importing this module does not import torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sca_registry import get_registry
from sca_registry.errors import make_unknown_name_error
from sca_registry.plugins import BUILTIN_DISTRIBUTION, is_installed
from sca_registry.spec import ModelSpec

from sca.io.atomic import write_file
from sca.io.cache import get_cache_folder
from sca.io.json import parse_json, read_regular_file

GIB = 2**30
GPU_MEMORY_GIB = {  # GiB that torch reports, from data sheets or measured
    "b200": 178.0,
    "h200": 139.8,
    "h100": 79.1,
    "a100-80": 79.1,
    "a100-40": 39.4,
    "l40s": 44.4,
    "a6000": 47.4,
    "rtx5090": 31.4,
    "rtx4090": 23.5,
    "rtx3090": 23.6,
    "l4": 22.0,
    "v100-32": 31.7,
    "v100-16": 15.8,
    "t4": 14.6,
}
MAX_PLANNED_REGIONS = 2**14  # upper limit of the search for the maximum number of regions per image
FILE_OPTIONS = {"weights", "tokenizer", "config", "revision"}  # options that refer to files, which may change
SOURCE_SUFFIXES = (".py", ".toml", ".so", ".pyd")  # files that a plan depends on
MAX_CACHED_PLANS = 200  # the latest are kept


@dataclass(frozen=True)
class Plan:
    """Cost estimate of `plan_model`.

    Attributes:
        model: Names of the components.
        batch_size: Images per batch.
        regions_per_image: Regions per image.
        max_new_tokens: Tokens per caption.
        precision: Precision of the model; in training, dtype of autocast.
        training: Whether this is a training step.
        parameters: Number of parameters per group.
        trainable_parameters: Number of trainable parameters.
        weight_bytes: Bytes of all weights in float32. The download may be half as large, or contain unused components.
        quantization: Quantization of the weights of the language model; None for none.
        quantized_bytes: Bytes of its quantized weights and their scales, which are not in float32 in memory.
        checkpoint_bytes: Bytes of a checkpoint without the pretrained weights that it refers to.
        flops: Floating-point operations per stage for all images and regions; a multiply-add counts as two.
        memory: Peak bytes per stage, weights included.
        gpu: GPU as requested.
        usable_gpu_memory: Usable bytes of the GPU.
        max_regions_per_image: Regions per image that fit, at most 2% below the maximum; 0 if not even one fits, None
            without a GPU or if `MAX_PLANNED_REGIONS` fit.
        zoom_crops: Crops per image that zoom encodes. Their cost is the stage "zoom".
        chunk_size: Regions per chunk of a training step; 0 for all regions at once.
        max_chunk_size: Largest power of two with which a training step that does not fit on the GPU would fit; 0 if
            none does, None for other plans.
    """

    model: str
    batch_size: int
    regions_per_image: int
    max_new_tokens: int
    precision: str
    training: bool
    parameters: dict[str, int]
    trainable_parameters: int
    weight_bytes: int
    checkpoint_bytes: int
    flops: dict[str, int]
    memory: dict[str, int]
    gpu: str | None = None
    usable_gpu_memory: int | None = None
    max_regions_per_image: int | None = None
    zoom_crops: int = 0
    chunk_size: int = 0
    max_chunk_size: int | None = None
    quantization: str | None = None
    quantized_bytes: int = 0

    @property
    def peak_memory(self) -> int:
        """Peak memory over all stages in bytes."""
        return max(self.memory.values())

    @property
    def fits_gpu(self) -> bool | None:
        """Whether the peak memory fits on the GPU; None without a GPU."""
        return None if self.usable_gpu_memory is None else self.peak_memory <= self.usable_gpu_memory

    def to_dict(self) -> dict[str, Any]:
        """Return all fields with `total_parameters`, `peak_memory` and `fits_gpu`."""
        total = sum(self.parameters.values())
        return {**asdict(self), "total_parameters": total, "peak_memory": self.peak_memory, "fits_gpu": self.fits_gpu}


def resolve_gpu_memory(gpu: str | float) -> float:
    """Return the memory of a GPU in GiB.

    Args:
        gpu: Name out of `GPU_MEMORY_GIB`, or GiB.

    Returns:
        GiB.

    Raises:
        RegistryError: The GPU is unknown.
        ValueError: The memory is out of range.
    """
    if isinstance(gpu, str):
        name = gpu
        try:
            gpu = float(name)
        except ValueError:
            if name.lower() not in GPU_MEMORY_GIB:
                raise make_unknown_name_error(
                    f"unknown GPU {name!r}; expected a name or its memory in GiB", name, GPU_MEMORY_GIB
                ) from None
            return GPU_MEMORY_GIB[name.lower()]
    if not 0 < gpu < 2**20:
        raise ValueError(f"the memory of the GPU is {gpu:g} GiB; expected a name, or a number above 0")
    return gpu


def compute_plan_key(spec: ModelSpec, settings: Mapping[str, Any]) -> str | None:
    """Return the key of a plan in the cache: a hash of the spec, the settings and the code that it depends on.

    Args:
        spec: Model.
        settings: Arguments of `sca.plan.plan_model` except the spec, as plain JSON.

    Returns:
        A hash; None if the cost depends on files that the spec names, or if a component is unknown.
    """
    components = {"encoder": spec.encoder, "mixer": spec.mixer, "language_model": spec.language_model}
    components |= {"segmenter": spec.segmenter} if spec.segmenter else {}
    if any(FILE_OPTIONS & component.options.keys() for component in components.values()):
        return None
    entries = [
        entry
        for kind, component in components.items()
        for entry in get_registry(kind).list_entries()
        if entry.name == component.name
    ]
    if len(entries) < len(components):  # unknown names; building raises the error
        return None
    packages = {BUILTIN_DISTRIBUTION, "torch", "transformers", "peft", *(entry.distribution for entry in entries)}
    packages |= {name for name in ("open_clip_torch", "timm") if is_installed(name)}
    factories = [get_registry(kind).get_card(component.name).factory for kind, component in components.items()]
    modules = {"sca", "sca_registry", *(factory.partition(":")[0].partition(".")[0] for factory in factories)}
    key_fields = {
        "spec": spec.to_dict(),
        "settings": dict(settings),
        "versions": {name: version(name) for name in sorted(packages)},
        "sources": {name: hash_source_files(name) for name in sorted(modules)},
    }
    return hashlib.sha256(json.dumps(key_fields, sort_keys=True).encode()).hexdigest()


def hash_source_files(package: str) -> str:
    """Return a hash of the paths, times and sizes of a package's source files, for editable installs.

    Args:
        package: Top-level name; it is located, not imported.

    Returns:
        A hash; "" for a package that cannot be located.
    """
    try:
        spec = find_spec(package)
    except Exception:  # finders of editable installs are third-party code
        return ""
    if spec is None:
        return ""
    files = [
        os.path.join(folder, name)
        for location in spec.submodule_search_locations or ()
        for folder, _, names in os.walk(location)
        for name in names
        if name.endswith(SOURCE_SUFFIXES)
    ]
    digest = hashlib.sha256()
    for file in sorted({*files, *([spec.origin] if spec.has_location and spec.origin else ())}):
        with suppress(OSError):  # deleted meanwhile, or a broken link
            state = os.stat(file)
            digest.update(f"{file}\0{state.st_mtime_ns}\0{state.st_size}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def read_plan(key: str) -> Plan | None:
    """Return a cached plan; None if it is missing or unreadable."""
    with suppress(OSError, ValueError, TypeError):
        content = parse_json(read_regular_file(_get_plan_path(key)), str(_get_plan_path(key)))
        return Plan(**{field.name: content[field.name] for field in fields(Plan) if field.name in content})
    return None


def write_plan(key: str, plan: Plan) -> None:
    """Cache a plan and delete all but the latest `MAX_CACHED_PLANS`; does nothing if the cache is not writable."""
    with suppress(OSError):
        folder = _get_plan_path(key).parent
        folder.mkdir(parents=True, exist_ok=True)
        write_file(_get_plan_path(key), json.dumps(asdict(plan)), sync_folder=False)
        by_age = sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime, reverse=True)
        for file in by_age[MAX_CACHED_PLANS:]:
            file.unlink(missing_ok=True)


def _get_plan_path(key: str) -> Path:
    return get_cache_folder() / "plans" / f"{key}.json"
