"""Plans of combinations, and those that were made before, in the user's cache. Imports no torch."""

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
GPU_MEMORY_GIB = {  # GiB that torch reports of them, from the makers' data sheets or a run
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
MAX_PLANNED_REGIONS = 2**14  # regions an image: as far as is looked
FILE_OPTIONS = {"weights", "tokenizer", "config", "revision"}  # options that refer to files, which may change
SOURCE_SUFFIXES = (".py", ".toml", ".so", ".pyd")  # suffixes of the files that a plan depends on
MAX_CACHED_PLANS = 200  # plans in the cache, the latest of them


@dataclass(frozen=True)
class Plan:
    """What `plan_model` computes. flops: multiplications and additions, each one, for all images and regions; of a
    training step, forward and backward together. memory: the most bytes at once in each stage, weights and all.
    """

    model: str
    images: int
    regions: int  # an image
    words: int
    dtype: str
    train: bool
    parameters: dict[str, int]  # by part
    trainable: int
    weights: int  # bytes of all of them in float32; what is fetched may be half of it, or have towers that are not kept
    checkpoint: int  # bytes of a checkpoint alone
    flops: dict[str, int]
    memory: dict[str, int]
    gpu: str | None = None
    room: int | None = None  # bytes of the GPU that are planned with
    most_regions: int | None = None  # an image, that the GPU holds, at most 2 % below the largest such; 0: not one

    @property
    def peak(self) -> int:
        return max(self.memory.values())

    @property
    def fits(self) -> bool | None:
        return None if self.room is None else self.peak <= self.room

    def to_dict(self) -> dict[str, Any]:
        total = sum(self.parameters.values())
        return {**asdict(self), "parameters_in_all": total, "peak": self.peak, "fits": self.fits}


def resolve_gpu_memory(gpu: str | float) -> float:
    """GiB of a GPU by name, or as given. Raises RegistryError for neither."""
    if isinstance(gpu, str):
        try:
            gpu = float(gpu)
        except ValueError:
            if gpu.lower() not in GPU_MEMORY_GIB:
                raise make_unknown_name_error(f"no GPU {gpu!r} is known; GiB will do", gpu, GPU_MEMORY_GIB) from None
            return GPU_MEMORY_GIB[gpu.lower()]
    if not 0 < gpu < 2**20:
        raise ValueError(f"a GPU with {gpu:g} GiB: give its name, or more than 0")
    return gpu


def compute_plan_key(spec: ModelSpec, settings: Mapping[str, Any]) -> str | None:
    """Return what identifies a plan in the cache: the spec, the settings and the code that it depends on.

    Args:
        spec: The model.
        settings: Arguments of `sca.plan.plan_model` except the spec, as plain JSON.

    Returns:
        A hash; None if the cost depends on files that the spec names, or a component is unknown.
    """
    parts = {"encoder": spec.encoder, "segmenter": spec.segmenter, "mixer": spec.mixer}
    parts = {kind: part for kind, part in {**parts, "language_model": spec.language_model}.items() if part}
    if any(FILE_OPTIONS & part.options.keys() for part in parts.values()):
        return None
    entries = [
        entry for kind, part in parts.items() for entry in get_registry(kind).list_entries() if entry.name == part.name
    ]
    if len(entries) < len(parts):  # unknown names, which building explains
        return None
    packages = {BUILTIN_DISTRIBUTION, "torch", "transformers", "peft", *(entry.distribution for entry in entries)}
    packages |= {name for name in ("open_clip_torch", "timm") if is_installed(name)}
    factories = [get_registry(kind).get_card(part.name).factory for kind, part in parts.items()]
    modules = {"sca", "sca_registry", *(factory.partition(":")[0].partition(".")[0] for factory in factories)}
    key_fields = {
        "spec": spec.to_dict(),
        "settings": dict(settings),
        "versions": {name: version(name) for name in sorted(packages)},
        "sources": {name: hash_source_files(name) for name in sorted(modules)},
    }
    return hashlib.sha256(json.dumps(key_fields, sort_keys=True).encode()).hexdigest()


def hash_source_files(package: str) -> str:
    """Return a value that changes when a source file of a package changes, as in an editable install.

    Args:
        package: Top-level name; located and not imported.

    Returns:
        A hash, or "" for a package that cannot be located.
    """
    try:
        spec = find_spec(package)
    except Exception:  # finders of editable installs are other people's code
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
        with suppress(OSError):  # removed meanwhile, or a link to nothing
            state = os.stat(file)
            digest.update(f"{file}\0{state.st_mtime_ns}\0{state.st_size}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def read_plan(key: str) -> Plan | None:
    """Return a plan that was made before; None if there is none, or it cannot be read."""
    with suppress(OSError, ValueError, TypeError):
        content = parse_json(read_regular_file(_get_plan_path(key)), str(_get_plan_path(key)))
        return Plan(**{field.name: content[field.name] for field in fields(Plan) if field.name in content})
    return None


def write_plan(key: str, plan: Plan) -> None:
    """Keep a plan, and the latest `MAX_CACHED_PLANS` of all, if the cache can be written."""
    with suppress(OSError):
        folder = _get_plan_path(key).parent
        folder.mkdir(parents=True, exist_ok=True)
        write_file(_get_plan_path(key), json.dumps(asdict(plan)), sync_folder=False)
        by_age = sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime, reverse=True)
        for file in by_age[MAX_CACHED_PLANS:]:
            file.unlink(missing_ok=True)


def _get_plan_path(key: str) -> Path:
    return get_cache_folder() / "plans" / f"{key}.json"
