"""Sweeps: every combination of components and options, as rows that are run one at a time.

A sweep is a TOML file, bundled in `benchmarks/sweeps` or your own:

    summary = "what is compared"
    seeds = [0, 1, 2]
    num_threads = 1           # CPU threads per row; 0: the cores divided among the workers

    [model]                   # a ModelSpec shared by all rows
    encoder = "tiny-vit"

    [axes]                    # a field of the model, a dotted option, or `model` for several fields that change
    mixer = ["query", { name = "resampler", depth = 2 }]  # together: every combination is a row
    "encoder.image_size" = [64, 96]

    [train]                   # optional: a recipe by name and overrides of its [train] table
    recipe = "sca-tiny"
    steps = 100

    [evaluate]                # optional: dataset, prompt type and metrics
    dataset = { name = "scenes", num_images = 20 }
    split = "val"
    prompt_type = "box"
    metrics = ["attributes", "mask-iou"]

    [benchmark]               # optional: timing
    batch_size = 1            # images
    regions_per_image = [1, 8, 64]
    max_new_tokens = 16       # tokens per caption
    num_repeats = 5
    dtype = "float32"
    training_step = true      # also time a training step
    plan = true               # estimate memory and FLOPs first; takes seconds per row
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

from sca_registry import RegistryError, get_registry
from sca_registry.errors import make_unknown_name_error
from sca_registry.overrides import MODEL_COMPONENTS, SHORTHAND_KEYS
from sca_registry.spec import ComponentSpec, ModelSpec, check_generation

from sca.devices import DTYPES
from sca.io.toml import parse_toml, read_toml_text
from sca.io.validation import check_choice, check_keys, check_list, check_range, check_same_type, check_type
from sca.training.recipe import MAX_SEED, Recipe, TrainOptions

SECTION_KEYS = {
    "train": (
        *("recipe", "steps", "batch_size", "learning_rate", "warmup_steps"),
        *("max_regions", "captions_per_region", "precision", "prompt_weights", "num_workers"),
    ),
    "evaluate": ("dataset", "split", "prompt_type", "tasks", "metrics", "max_images", "batch_size", "generation"),
    "benchmark": (
        *("batch_size", "regions_per_image", "max_new_tokens", "num_repeats", "dtype", "training_step", "plan"),
    ),
}
ROW_ORDERS = ("cheapest", "listed")
JOINT_AXIS = "model"  # the axis whose values are several fields of the model that change together
MAX_ROWS = 10_000  # a week at one minute per row


@dataclass(frozen=True)
class SweepRow:
    """One row of a sweep as plain values; its key is a hash of them."""

    config: Mapping[str, Any]  # model, train, evaluate, benchmark, seed, num_threads, device

    @property
    def key(self) -> str:
        """Hash of the configuration as sixteen hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def recipe(self) -> Recipe | None:
        """Training recipe of the row; None without training.

        Raises:
            RegistryError: An invalid value.
        """
        if "train" not in self.config:
            return None
        options = dict(self.config["train"])
        name = options.pop("recipe", "sca-tiny")
        table = Recipe.read(name).to_dict() | {"model": self.config["model"]}
        table["train"] |= {**options, "seed": self.config["seed"], "num_processes": 1}
        table["train"]["save_steps"] = table["train"]["steps"]
        return Recipe.from_dict(name, table)

    @property
    def label(self) -> str:
        """Components, their options and the seed, for display."""
        model = self.config["model"]
        components = [_format_component(model[kind]) for kind in MODEL_COMPONENTS if model.get(kind)]
        suffixes = [f"lora={model['lora']['rank']}"] if model.get("lora") else []
        return " ".join(["+".join(components), *suffixes, f"seed={self.config['seed']}"])

    @property
    def num_listed_parameters(self) -> int:
        """Parameters according to the component cards, used to run the cheapest rows first."""
        num_parameters = 0
        for kind in MODEL_COMPONENTS:
            component = self.config["model"].get(kind)
            if component and component["name"] in get_registry(kind):
                num_parameters += get_registry(kind).get_card(component["name"]).parameters or 0
        return num_parameters


@dataclass(frozen=True)
class Sweep:
    """A sweep over combinations of components, options and seeds.

    Attributes:
        name: Name of the sweep.
        model: Fields of a ModelSpec shared by all rows.
        axes: Field of the model, or dotted option -> its values. The values of `model` are mappings of several fields
            that change together.
        seeds: Random seeds; each is a row of every combination.
        num_threads: CPU threads per row; 0 divides the cores among the workers.
        summary: One line for lists.
        train: Recipe and overrides, see the module docstring.
        evaluate: Evaluation options.
        benchmark: Timing options.
        device: A torch device.
    """

    name: str
    model: Mapping[str, Any]
    axes: Mapping[str, Sequence[Any]]
    seeds: Sequence[int] = (0,)
    num_threads: int = 1
    summary: str = ""
    train: Mapping[str, Any] | None = None
    evaluate: Mapping[str, Any] | None = None
    benchmark: Mapping[str, Any] | None = None
    device: str = field(default="cpu", kw_only=True)

    @classmethod
    def read(cls, name: str, device: str = "cpu") -> Sweep:
        """Read a bundled sweep by name, or a TOML file.

        Args:
            name: Name of a bundled sweep, or path of a TOML file.
            device: Device of the rows.

        Returns:
            The sweep.

        Raises:
            RegistryError: An unknown name or key, or an invalid value.
        """
        text, stem = _read_sweep_text(name)
        try:
            table = parse_toml(text)
        except ValueError as error:
            raise RegistryError(f"the sweep {name} is not valid TOML: {error}") from error
        check_keys("the sweep", table, [each.name for each in fields(cls) if each.name not in ("name", "device")])
        table = {"model": {}, "axes": {}, **table}
        _check_fields(name, table)
        sweep = cls(stem, **table, device=device)
        sweep.check_size()
        sweep.list_rows()
        return sweep

    def check_size(self) -> None:
        """Check the number of combinations.

        Raises:
            RegistryError: More than `MAX_ROWS` combinations; the message contains the size of every axis.
        """
        sizes = {**{axis: len(values) for axis, values in self.axes.items()}, "seeds": len(self.seeds)}
        count = math.prod(sizes.values())
        if count > MAX_ROWS:
            axis_sizes = " x ".join(f"{axis} {size:,}" for axis, size in sizes.items())
            raise RegistryError(
                f"the sweep {self.name} has {count:,} combinations ({axis_sizes}), and the maximum is {MAX_ROWS:,}; "
                "shorten an axis"
            )

    def list_rows(self, order: str = "cheapest") -> list[SweepRow]:
        """Return every combination once.

        Args:
            order: "cheapest" for the fewest parameters first, or "listed" for the order of the axes in the sweep.

        Returns:
            The rows.

        Raises:
            RegistryError: An unknown component.
        """
        rows = []
        for values in product(*self.axes.values()):
            model = json.loads(json.dumps(self.model))
            for axis, value in zip(self.axes, values, strict=True):
                _set_axis_value(model, axis, value)
            spec = ModelSpec.from_dict(model)
            for kind in MODEL_COMPONENTS:
                component = getattr(spec, kind)
                if component is not None:
                    get_registry(kind).get_card(component.name)
            for seed in self.seeds:
                config = {
                    "model": spec.to_dict(),
                    "seed": seed,
                    "num_threads": self.num_threads,
                    "device": self.device,
                    **{table: dict(value) for table in SECTION_KEYS if (value := getattr(self, table)) is not None},
                }
                rows.append(SweepRow(config))
        unique = list({row.key: row for row in rows}.values())
        return sorted(unique, key=lambda row: row.num_listed_parameters) if order == "cheapest" else unique


def list_sweeps() -> list[str]:
    """Return the names of the bundled sweeps, sorted."""
    return sorted(
        file.name.removesuffix(".toml") for file in _get_sweeps_folder().iterdir() if file.name.endswith(".toml")
    )


def _read_sweep_text(name: str) -> tuple[str, str]:
    if name in list_sweeps():
        return (_get_sweeps_folder() / f"{name}.toml").read_text("utf-8"), name
    if name.endswith(".toml") and Path(name).is_file():
        return read_toml_text(Path(name)), Path(name).stem
    raise make_unknown_name_error(f"unknown sweep {name!r}, and no such TOML file", name, list_sweeps())


def _check_fields(name: str, table: Mapping[str, Any]) -> None:
    """Raise RegistryError with the name of the field for a value of the wrong type or out of range."""
    for section in ("model", "axes", *SECTION_KEYS):
        check_type(f"{section} of the sweep {name}", table.get(section, {}), Mapping)
    for axis, values in table["axes"].items():
        if not isinstance(values, list) or not values:
            raise RegistryError(f"the axis {axis!r} of the sweep {name} is {values!r}; expected a list of one or more")
    check_type("summary", table.get("summary", ""), str)
    check_list("seeds", table.get("seeds", [0]), int, minimum=1)
    for seed in table.get("seeds", ()):
        check_range("seeds", seed, int, 0, MAX_SEED)
    check_range("num_threads", table.get("num_threads", 1), int, 0)
    for section, keys in SECTION_KEYS.items():
        check_keys(f"[{section}] of the sweep", table.get(section, {}), keys)
        for key, value in table.get(section, {}).items():
            SECTION_CHECKS[section](f"{section}.{key}", key, value)
    if "evaluate" in table and "dataset" not in table["evaluate"]:
        raise RegistryError("[evaluate] of a sweep has no dataset; add dataset = { name = ..., ... }")


def _check_train_value(location: str, key: str, value: Any) -> None:
    check_same_type(location, value, "" if key == "recipe" else getattr(TrainOptions(), key))


def _check_evaluate_value(location: str, key: str, value: Any) -> None:
    if key == "dataset":
        ComponentSpec.from_dict(value, "dataset of evaluate")
    elif key in ("max_images", "batch_size"):
        check_range(location, value, int, 1)
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


def _get_sweeps_folder():
    return files("sca_bench") / "sweeps"


def _set_axis_value(model: dict[str, Any], axis: str, value: Any) -> None:
    """Set a field of the model, an option of a component such as `encoder.image_size`, or several fields together."""
    field_name, _, option = axis.partition(".")
    if axis == JOINT_AXIS:
        check_type(f"each value of the axis {axis!r}", value, Mapping)
        model |= value
        return
    if not option:
        model[field_name] = value
        return
    part_table = model.get(field_name, {})
    if field_name in MODEL_COMPONENTS:
        part_table = ComponentSpec.from_dict(part_table, field_name).to_dict()
    elif field_name in SHORTHAND_KEYS and not isinstance(part_table, Mapping):
        part_table = {SHORTHAND_KEYS[field_name]: part_table}
    check_type(f"model.{field_name}", part_table, Mapping)
    model[field_name] = {**part_table, option: value}


def _format_component(component: Mapping[str, Any]) -> str:
    options = ",".join(
        f"{key}={value}" for key, value in component.items() if key != "name" and not isinstance(value, dict)
    )
    return component["name"] + (f"({options})" if options else "")
