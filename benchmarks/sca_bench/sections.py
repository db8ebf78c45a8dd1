"""Tables [train], [evaluate] and [benchmark] of sweeps: their keys, and checks of the values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from sca_registry import RegistryError
from sca_registry.spec import ComponentSpec, check_generation

from sca.devices import DTYPES
from sca.io.validation import check_choice, check_keys, check_list, check_range, check_same_type, check_type
from sca.training.recipe import TrainOptions
from sca_bench.row import TRAIN_KEYS_OF_SWEEPS

OPTIONS_SET_BY_ROWS = ("seed", "num_processes", "save_steps", "feature_cache_dir", "report_to", "fsdp")
TRAIN_KEYS = (
    *TRAIN_KEYS_OF_SWEEPS,
    *(each.name for each in fields(TrainOptions) if each.name not in OPTIONS_SET_BY_ROWS),
)
PROMPTING_KEYS = ("prompt_type", "tasks", "caption_all", "generation")  # of [evaluate], see `PromptingOptions`
SECTION_KEYS = {
    "train": TRAIN_KEYS,
    "evaluate": ("dataset", "split", "metrics", "max_images", "batch_size", *PROMPTING_KEYS),
    "benchmark": (
        *("batch_size", "regions_per_image", "max_new_tokens", "num_repeats", "dtype", "training_step", "plan"),
    ),
}


def check_section(section: str, table: Mapping[str, Any]) -> None:
    """Check a table [train], [evaluate] or [benchmark]; raise RegistryError with the name of the invalid key."""
    check_keys(f"[{section}] of the sweep", table, SECTION_KEYS[section])
    for key, value in table.items():
        SECTION_CHECKS[section](f"{section}.{key}", key, value)


def _check_train_value(location: str, key: str, value: Any) -> None:
    if key == "stages":
        if not isinstance(value, list) or not value or not all(isinstance(stage, Mapping) for stage in value):
            raise RegistryError(f"{location} is {value!r:.80}; expected a list of one or more tables")
        for number, stage in enumerate(value, 1):
            if "stages" in stage:
                raise RegistryError(f"{location}[{number}] contains stages; list all stages in {location}")
            check_section("train", stage)
    elif key in ("data", "loss"):
        check_type(location, value, Mapping)
    elif key in ("cache_features", "keep_models"):
        check_type(location, value, bool)
    elif key == "stop_step":
        check_range(location, value, int, 1)
    else:
        check_same_type(location, value, "" if key == "recipe" else getattr(TrainOptions(), key))


def _check_evaluate_value(location: str, key: str, value: Any) -> None:
    if key == "dataset":
        ComponentSpec.from_dict(value, "dataset of evaluate")
    elif key in ("max_images", "batch_size"):
        check_range(location, value, int, 1)
    elif key == "caption_all":
        check_type(location, value, bool)
    elif key in ("tasks", "metrics"):
        check_list(location, value, str, minimum=1)
    elif key == "generation":
        check_type(location, value, Mapping)
        check_generation(location, value)
    else:
        check_type(location, value, str)


def _check_benchmark_value(location: str, key: str, value: Any) -> None:
    if key == "regions_per_image":
        check_list(location, value, int, minimum=1)
        for count in value:
            check_range(location, count, int, 1)
    elif key == "dtype":
        check_choice(location, value, DTYPES)
    elif key in ("training_step", "plan"):
        check_type(location, value, bool)
    else:
        check_range(location, value, int, 1)


SECTION_CHECKS: dict[str, Callable[[str, str, Any], None]] = {
    "train": _check_train_value,
    "evaluate": _check_evaluate_value,
    "benchmark": _check_benchmark_value,
}
