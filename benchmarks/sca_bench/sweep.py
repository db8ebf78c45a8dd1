"""Sweeps: combinations of components and options, as rows that are run one at a time.

A sweep is a TOML file, bundled in `benchmarks/sweeps` or your own:

    summary = "what is compared"
    seeds = [0, 1, 2]
    num_threads = 1           # CPU threads per row; 0: the cores divided among the workers

    [model]                   # a ModelSpec shared by all rows
    encoder = "tiny-vit"

    [axes]                    # a field of the model or a dotted option: every combination is a row
    mixer = ["query", { name = "resampler", depth = 2 }]
    "encoder.image_size" = [64, 96]
    "train.steps" = [100, 200]

    [variants.shallow]        # optional: named changes of several values; each variant is combined with the axes
    model = { task_tokens = 2 }
    train = { learning_rate = 1e-4 }

    [train]                   # optional: a recipe by name and overrides of its tables
    recipe = "sca-tiny"
    steps = 100
    stages = [{ class_name_prob = 1.0 }, {}]  # optional: stages that follow each other, as changes of this table
    cache_features = true     # of a frozen encoder; the rows share the cache
    keep_models = true        # keep trained models; rows with an equal training share them
    stop_step = 50            # evaluate after this step; rows that differ only in it continue one training run

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

    [[comparisons]]           # optional: an expected effect, tested on rows that differ only in these settings
    claim = "A query mixer is better than a resampler"
    source = "the paper"
    better = { mixer = "query" }
    worse = { mixer = "resampler" }

Instead of axes, variants and comparisons, a sweep can have several studies, [studies.NAME], which have these tables and
change the shared ones. A row that is part of several studies is run once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

from sca_registry import RegistryError, captioners, get_registry
from sca_registry.errors import make_unknown_name_error
from sca_registry.overrides import MODEL_COMPONENTS, SHORTHAND_KEYS
from sca_registry.spec import ComponentSpec, ModelSpec

from sca.io.toml import parse_toml, read_toml_text
from sca.io.validation import check_choice, check_keys, check_list, check_range, check_type
from sca.training.recipe import MAX_SEED
from sca_bench.row import SweepRow
from sca_bench.sections import SECTION_KEYS, check_section

SHARED_TABLES = ("model", *SECTION_KEYS)  # tables that studies and variants change
VARIANT_KEYS = (*SHARED_TABLES, "captioner")
STUDY_KEYS = ("summary", "axes", "variants", "comparisons", *SHARED_TABLES)
COMPARISON_KEYS = ("claim", "source", "better", "worse", "score")
VARIANT_AXIS = "variant"
ROW_ORDERS = ("cheapest", "listed")
MAX_ROWS = 10_000  # a week at one minute per row


@dataclass(frozen=True)
class Comparison:
    """An expected effect: rows with the settings `better` score higher than rows with the settings `worse`.

    Attributes:
        claim: The effect as a sentence.
        better: Axis, or "variant" -> value of the rows that are expected to be better.
        worse: The same for the rows that they are compared with.
        source: Where the effect was published, with its size.
        score: Score to compare; None for the one that measures quality.
    """

    claim: str
    better: Mapping[str, Any]
    worse: Mapping[str, Any]
    source: str = ""
    score: str | None = None


@dataclass(frozen=True)
class Combination:
    """A row of a study, and its settings: axis, or "variant" -> value."""

    settings: Mapping[str, Any]
    row: SweepRow


@dataclass(frozen=True)
class Study:
    """A part of a sweep: every combination of its variants, its axes and the seeds.

    Attributes:
        name: Name; empty for a sweep without studies.
        tables: The tables "model", "train", "evaluate" and "benchmark", those that the sweep has.
        axes: Field of the model, or dotted option -> its values.
        variants: Name -> changes of the tables, or a captioner that replaces the model.
        comparisons: Expected effects.
        summary: One line.
    """

    name: str
    tables: Mapping[str, Mapping[str, Any]]
    axes: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    comparisons: Sequence[Comparison] = ()
    summary: str = ""

    @property
    def settings(self) -> dict[str, Sequence[Any]]:
        """Values of each axis; the names of the variants are the axis "variant"."""
        return {**({VARIANT_AXIS: list(self.variants)} if self.variants else {}), **self.axes}

    def iter_combinations(self, shared: Mapping[str, Any], seeds: Sequence[int]) -> Iterator[Combination]:
        """Yield every combination in the order of the sweep.

        Args:
            shared: Values of all rows, such as the device.
            seeds: Random seeds.

        Yields:
            Combinations.

        Raises:
            RegistryError: An unknown component or an invalid value.
        """
        for values in product(*self.settings.values()):
            settings = dict(zip(self.settings, values, strict=True))
            tables = self._make_tables(settings)
            for seed in seeds:
                yield Combination(settings, SweepRow({**tables, **shared, "seed": seed}))

    def _make_tables(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        tables: dict[str, Any] = copy.deepcopy({name: dict(table) for name, table in self.tables.items()})
        for axis, value in settings.items():
            if axis == VARIANT_AXIS:
                _apply_variant(tables, self.variants[value])
            else:
                _set_axis_value(tables, axis, value)
        if ("evaluate" in tables or "captioner" in tables) and "dataset" not in tables.get("evaluate", {}):
            raise RegistryError("[evaluate] of a sweep has no dataset; add dataset = { name = ..., ... }")
        if "captioner" in tables:
            component = ComponentSpec.from_dict(tables["captioner"], "captioner")
            captioners.get_card(component.name)
            if "url" in component.options:
                raise RegistryError(
                    f"a sweep cannot set the url of the captioner {component.name!r}; set the environment variable "
                    "OPENAI_BASE_URL"
                )
            return {"captioner": component.to_dict(), "evaluate": tables.get("evaluate", {})}
        spec = ModelSpec.from_dict(tables["model"])
        for kind in MODEL_COMPONENTS:
            component = getattr(spec, kind)
            if component is not None:
                get_registry(kind).get_card(component.name)
        return {"model": spec.to_dict(), **_select_tables(tables, tuple(SECTION_KEYS))}


@dataclass(frozen=True)
class Sweep:
    """A sweep over combinations of components, options and seeds.

    Attributes:
        name: Name of the sweep.
        studies: The studies; one without a name for a sweep without the table [studies].
        seeds: Random seeds; each is a row of every combination.
        num_threads: CPU threads per row; 0 divides the cores among the workers.
        summary: One line for lists.
        table: The tables of the TOML file that the sweep was created from.
        device: A torch device.
    """

    name: str
    studies: Sequence[Study]
    seeds: Sequence[int] = (0,)
    num_threads: int = 1
    summary: str = ""
    table: Mapping[str, Any] = field(default_factory=dict, repr=False)
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
        text, stem = read_sweep_text(name)
        return cls.parse(text, stem, device)

    @classmethod
    def parse(cls, text: str, name: str, device: str = "cpu") -> Sweep:
        """Parse the text of a sweep.

        Args:
            text: TOML.
            name: Name of the sweep.
            device: Device of the rows.

        Returns:
            The sweep.

        Raises:
            RegistryError: An unknown key, or an invalid value.
        """
        try:
            table = parse_toml(text)
        except ValueError as error:
            raise RegistryError(f"the sweep {name} is not valid TOML: {error}") from error
        return cls.from_dict(table, name, device)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any], name: str, device: str = "cpu") -> Sweep:
        """Create a sweep from the tables of a TOML file.

        Args:
            table: Tables and values.
            name: Name of the sweep.
            device: Device of the rows.

        Returns:
            The sweep.

        Raises:
            RegistryError: An unknown key, or an invalid value.
        """
        general_keys = ("summary", "seeds", "num_threads")
        check_keys("the sweep", table, (*general_keys, *STUDY_KEYS, "studies"))
        _check_general_fields(table)
        shared_tables = _read_tables(f"the sweep {name}", table)
        study_tables = table.get("studies")
        if study_tables is None:
            part_of_sweep = {key: value for key, value in table.items() if key not in (*general_keys, *SHARED_TABLES)}
            study_tables = {"": part_of_sweep}
        else:
            check_type(f"studies of the sweep {name}", study_tables, Mapping)
            for key in ("axes", "variants", "comparisons"):
                if key in table:
                    raise RegistryError(f"the sweep {name} has {key} beside studies; move them into a study")
        studies = [_read_study(study_name, each, shared_tables) for study_name, each in study_tables.items()]
        general_fields = {key: table[key] for key in general_keys if key in table}
        sweep = cls(name, studies, **general_fields, table=table, device=device)
        sweep.check_size()
        _check_comparisons(sweep)
        return sweep

    def check_size(self) -> None:
        """Check the number of combinations.

        Raises:
            RegistryError: More than `MAX_ROWS` combinations; the message contains the size of every axis.
        """
        sizes = [
            {**{axis: len(values) for axis, values in study.settings.items()}, "seeds": len(self.seeds)}
            for study in self.studies
        ]
        count = sum(math.prod(each.values()) for each in sizes)
        if count > MAX_ROWS:
            text = " + ".join(" x ".join(f"{axis} {size:,}" for axis, size in each.items()) for each in sizes)
            raise RegistryError(
                f"the sweep {self.name} has {count:,} combinations ({text}), and the maximum is {MAX_ROWS:,}; "
                "shorten an axis"
            )

    def list_combinations(self, study: Study) -> list[Combination]:
        """Return every combination of a study in the order of the sweep.

        Args:
            study: One of the studies.

        Returns:
            The combinations.

        Raises:
            RegistryError: An unknown component or an invalid value.
        """
        return list(study.iter_combinations({"num_threads": self.num_threads, "device": self.device}, self.seeds))

    def list_rows(self, order: str = "cheapest") -> list[SweepRow]:
        """Return every row once.

        Args:
            order: "cheapest" for the fewest parameters first, or "listed" for the order of the axes in the sweep.

        Returns:
            The rows.

        Raises:
            RegistryError: An unknown component or an invalid value.
        """
        rows = (each.row for study in self.studies for each in self.list_combinations(study))
        unique = list({row.key: row for row in rows}.values())
        return sorted(unique, key=lambda row: row.num_listed_parameters) if order == "cheapest" else unique


def list_sweeps() -> list[str]:
    """Return the names of the bundled sweeps, sorted."""
    return sorted(
        file.name.removesuffix(".toml") for file in _get_sweeps_folder().iterdir() if file.name.endswith(".toml")
    )


def read_sweep_text(name: str) -> tuple[str, str]:
    """Read the TOML text of a bundled sweep or of a file.

    Args:
        name: Name of a bundled sweep, or path of a TOML file.

    Returns:
        The text, and the name of the sweep.

    Raises:
        RegistryError: Neither exists; the message suggests the closest name.
    """
    if name in list_sweeps():
        return (_get_sweeps_folder() / f"{name}.toml").read_text("utf-8"), name
    if name.endswith(".toml") and Path(name).is_file():
        return read_toml_text(Path(name)), Path(name).stem
    raise make_unknown_name_error(f"unknown sweep {name!r}, and no such TOML file", name, list_sweeps())


def matches_settings(settings: Mapping[str, Any], selection: Mapping[str, Any]) -> bool:
    """Return whether a combination has the selected values; a component can be selected by its name.

    Args:
        settings: Settings of a combination.
        selection: Axis, or "variant" -> value.

    Returns:
        True if all selected values are equal.
    """
    return all(axis in settings and _matches_value(settings[axis], value) for axis, value in selection.items())


def _matches_value(value: Any, selected: Any) -> bool:
    return value == selected or (isinstance(value, Mapping) and value.get("name") == selected)


def _read_study(name: str, table: Any, shared_tables: Mapping[str, Mapping[str, Any]]) -> Study:
    location = f"the study {name}" if name else "the sweep"
    check_keys(location, table, STUDY_KEYS)
    axes, variants = table.get("axes", {}), table.get("variants", {})
    for key, value in (("axes", axes), ("variants", variants)):
        check_type(f"{key} of {location}", value, Mapping)
    for axis, values in axes.items():
        if not isinstance(values, list) or not values:
            raise RegistryError(f"the axis {axis!r} of {location} is {values!r}; expected a list of one or more")
        if axis == VARIANT_AXIS:
            raise RegistryError(f"the axis {axis!r} of {location} is reserved; write [variants.NAME]")
    for variant, changes in variants.items():
        check_keys(f"the variant {variant!r} of {location}", changes, VARIANT_KEYS)
        _read_tables(f"the variant {variant!r}", changes)
    check_type(f"summary of {location}", table.get("summary", ""), str)
    comparisons = _read_comparisons(location, table.get("comparisons", []))
    study_tables = _read_tables(location, table)
    tables = {
        key: {**shared_tables.get(key, {}), **study_tables.get(key, {})}
        for key in SHARED_TABLES
        if key in shared_tables or key in study_tables
    }
    return Study(name, {"model": {}, **tables}, axes, variants, comparisons, table.get("summary", ""))


def _read_comparisons(location: str, tables: Any) -> list[Comparison]:
    if not isinstance(tables, list):
        raise RegistryError(f"comparisons of {location} are {tables!r:.80}; write [[comparisons]]")
    comparisons = []
    for table in tables:
        subject = f"a comparison of {location}"
        check_keys(subject, table, COMPARISON_KEYS)
        for key in ("claim", "better", "worse"):
            if key not in table:
                raise RegistryError(f"{subject} has no {key!r}; it requires claim, better and worse")
        for key, value in table.items():
            check_type(f"{key} of {subject}", value, Mapping if key in ("better", "worse") else str)
        comparisons.append(Comparison(**table))
    return comparisons


def _check_comparisons(sweep: Sweep) -> None:
    """Raise RegistryError for a comparison without two sides; also checks every combination."""
    for study in sweep.studies:
        combinations = sweep.list_combinations(study)
        for comparison in study.comparisons:
            for axis in (*comparison.better, *comparison.worse):
                check_choice("axis of a comparison", axis, study.settings)
            if comparison.better.keys() != comparison.worse.keys():
                raise RegistryError(
                    f"the comparison {comparison.claim!r} selects {dict(comparison.better)} and "
                    f"{dict(comparison.worse)}; select values of the same axes in both"
                )
            sides = comparison.better, comparison.worse
            for selection in sides:
                for axis, value in selection.items():
                    if sum(_matches_value(each, value) for each in study.settings[axis]) > 1:
                        raise RegistryError(
                            f"the comparison {comparison.claim!r} selects {value!r}, which several values of the axis "
                            f"{axis!r} match; write the entire value, or use variants"
                        )
                if not any(matches_settings(each.settings, selection) for each in combinations):
                    raise RegistryError(
                        f"the comparison {comparison.claim!r} selects {dict(selection)}, which no row has; use values "
                        "of the axes"
                    )
            if any(all(matches_settings(each.settings, side) for side in sides) for each in combinations):
                raise RegistryError(
                    f"the comparison {comparison.claim!r} selects the same rows as better and as worse; select "
                    "different values"
                )


def _read_tables(location: str, table: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Check and return the tables [model], [train], [evaluate] and [benchmark] of a sweep, study or variant."""
    tables = {key: table[key] for key in SHARED_TABLES if key in table}
    for section, values in tables.items():
        check_type(f"{section} of {location}", values, Mapping)
        if section != "model":
            check_section(section, values)
    return tables


def _check_general_fields(table: Mapping[str, Any]) -> None:
    check_type("summary", table.get("summary", ""), str)
    check_list("seeds", table.get("seeds", [0]), int, minimum=1)
    for seed in table.get("seeds", ()):
        check_range("seeds", seed, int, 0, MAX_SEED)
    check_range("num_threads", table.get("num_threads", 1), int, 0)


def _get_sweeps_folder():
    return files("sca_bench") / "sweeps"


def _select_tables(tables: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: tables[name] for name in names if name in tables}


def _apply_variant(tables: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Change tables by the keys of a variant."""
    for name, change in copy.deepcopy(dict(changes)).items():
        tables[name] = {**tables.get(name, {}), **change} if name in SHARED_TABLES else change


def _set_axis_value(tables: dict[str, Any], axis: str, value: Any) -> None:
    """Set a field of the model, an option of a component such as `encoder.image_size`, or a key such as `train.steps`.

    Raises RegistryError for a value on the path that is not a table, and for an unknown key.
    """
    section, _, path = axis.partition(".")
    if section not in SECTION_KEYS:
        _set_model_value(tables["model"], axis, value)
        return
    if section not in tables:
        raise RegistryError(f"the axis {axis!r} changes [{section}], which the sweep does not have; add it")
    *parents, key = path.split(".")
    table = tables[section]
    for parent in parents:
        check_type(f"{parent} of the axis {axis!r}", table.get(parent), Mapping)
        table[parent] = dict(table[parent])
        table = table[parent]
    table[key] = value
    check_section(section, tables[section])


def _set_model_value(model: dict[str, Any], axis: str, value: Any) -> None:
    field_name, _, option = axis.partition(".")
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
