"""Rows of a sweep: a model, how it is trained, evaluated and timed, and a seed, as plain values."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sca_registry import RegistryError, get_registry
from sca_registry.overrides import MODEL_COMPONENTS
from sca_registry.spec import ComponentSpec, ModelSpec

from sca.training.recipe import Recipe

TRAIN_KEYS_OF_SWEEPS = (
    "recipe",
    "stages",
    "data",
    "loss",
    "cache_features",
    "keep_models",
    "stop_step",
)  # keys of [train] of a sweep that are not options of a recipe


@dataclass(frozen=True)
class SweepRow:
    """One row of a sweep as plain values; its key is a hash of them."""

    config: Mapping[str, Any]  # model or captioner, train, evaluate, benchmark, seed, num_threads, device

    @property
    def key(self) -> str:
        """Hash of the configuration as sixteen hexadecimal digits."""
        return _hash_values(self.config)

    @property
    def spec(self) -> ModelSpec | None:
        """Spec of the model; None for a captioner."""
        return ModelSpec.from_dict(self.config["model"]) if "model" in self.config else None

    @property
    def captioner(self) -> ComponentSpec | None:
        """Captioner that is evaluated instead of a model; None for a model."""
        return ComponentSpec.from_dict(self.config["captioner"], "captioner") if "captioner" in self.config else None

    def make_recipes(self, feature_cache_dir: str = "none") -> list[Recipe]:
        """Return the recipe of each training stage; empty without training.

        All recipes contain the spec of the model; every stage but the first starts from the model of the previous one.

        Args:
            feature_cache_dir: Cache of the features, used if the sweep sets `cache_features`.

        Returns:
            One recipe per stage, named "stage-1" and so on.

        Raises:
            RegistryError: An invalid value.
        """
        if "train" not in self.config:
            return []
        train_table = dict(self.config["train"])
        stages = train_table.pop("stages", None) or [{}]
        if self.stop_step is not None and len(stages) > 1:
            raise RegistryError("train.stop_step requires a single training stage; remove it, or train.stages")
        return [
            self._make_recipe(f"stage-{number}", {**train_table, **stage}, feature_cache_dir)
            for number, stage in enumerate(stages, 1)
        ]

    def make_stage_keys(self) -> list[str]:
        """Return a hash for each stage of everything that its training depends on."""
        tables = [recipe.to_dict() for recipe in self.make_recipes()]
        device_type = self.config["device"].partition(":")[0]  # launchers choose the GPU
        runtime = [self.config["num_threads"], device_type]
        return [_hash_values([*runtime, *tables[:number]]) for number in range(1, len(tables) + 1)]

    @property
    def stop_step(self) -> int | None:
        """Step after which training stops; None for the last."""
        return self.config.get("train", {}).get("stop_step")

    @property
    def keeps_models(self) -> bool:
        """Whether trained models are kept for other rows."""
        return self.stop_step is not None or bool(self.config.get("train", {}).get("keep_models"))

    @property
    def combination_key(self) -> str:
        """Text that is equal for rows that differ only in the seed."""
        return json.dumps({key: value for key, value in self.config.items() if key != "seed"}, sort_keys=True)

    @property
    def command(self) -> str:
        """Command that runs the row on its own."""
        return f"sca bench row {shlex.quote(json.dumps(self.config, sort_keys=True))}"

    def _make_recipe(self, name: str, options: Mapping[str, Any], feature_cache_dir: str) -> Recipe:
        table = Recipe.read(options.get("recipe", "sca-tiny")).to_dict() | {"model": self.config["model"]}
        train_options = {key: value for key, value in options.items() if key not in TRAIN_KEYS_OF_SWEEPS}
        table["train"] |= {**train_options, "seed": self.config["seed"], "num_processes": 1}
        table["train"]["save_steps"] = table["train"]["steps"]
        table["train"]["feature_cache_dir"] = feature_cache_dir if options.get("cache_features") else "none"
        table |= {key: options[key] for key in ("data", "loss") if key in options}
        return Recipe.from_dict(name, table)

    @property
    def label(self) -> str:
        """Components, their options and the seed, for display."""
        seed_text = f"seed={self.config['seed']}"
        if "captioner" in self.config:
            return f"{_format_component(self.config['captioner'])} {seed_text}"
        model = self.config["model"]
        components = [_format_component(model[kind]) for kind in MODEL_COMPONENTS if model.get(kind)]
        suffixes = [f"lora={model['lora']['rank']}"] if model.get("lora") else []
        return " ".join(["+".join(components), *suffixes, seed_text])

    @property
    def num_listed_parameters(self) -> int:
        """Parameters according to the component cards, used to run the cheapest rows first."""
        num_parameters = 0
        for kind in MODEL_COMPONENTS:
            component = self.config.get("model", {}).get(kind)
            if component and component["name"] in get_registry(kind):
                num_parameters += get_registry(kind).get_card(component["name"]).parameters or 0
        return num_parameters


def _hash_values(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _format_component(component: Mapping[str, Any]) -> str:
    options = ",".join(
        f"{key}={value}" for key, value in component.items() if key != "name" and not isinstance(value, dict)
    )
    return component["name"] + (f"({options})" if options else "")
