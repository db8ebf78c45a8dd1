"""All that can be known to be wrong with a sweep before its first row is made."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from sca_registry import RegistryError, datasets, registry
from sca_registry.spec import ModelSpec, Part, check_generation

from sca.data.summary import check_not_empty
from sca.evaluation.predictions import Questions
from sca.evaluation.requirements import check_needs, check_truth
from sca.evaluation.scoring import ready
from sca.training.sources import open_training_datasets, open_validation_dataset
from sca_bench.sweep import PARTS, Row, Sweep


def check_rows(sweep: Sweep, rows: Iterable[Row]) -> None:
    """Check the components, options, recipes, datasets, prompts and metrics of rows.

    A component that does not work, and components that do not fit together, are results of a sweep and not refused.

    Raises:
        ValueError: One line that says which field or component is wrong, or which extra is not installed.
    """
    _check_evaluation(sweep)
    checked: set[str] = set()
    for row in rows:
        spec = ModelSpec.from_dict(row.config["model"])
        for kind in PARTS:
            part = getattr(spec, kind)
            if part is not None and _is_new(checked, [kind, part.to_dict()]):
                _check_component(kind, part)
        asked = (sweep.evaluate or {}).get("generation", {})
        for key, options in (("generation", spec.generation), ("evaluate.generation", asked)):
            if _is_new(checked, [key, options, spec.language_model.name]):
                _check_generation(key, options, spec.language_model)
        recipe = row.recipe
        if recipe is not None and _is_new(checked, [recipe.to_dict()["data"], str(recipe.validate)]):
            open_training_datasets(recipe)
            if recipe.validate is not None:
                open_validation_dataset(recipe.validate)


def _check_evaluation(sweep: Sweep) -> None:
    asked = sweep.evaluate
    if asked is None:
        return
    questions = Questions(**{key: asked[key] for key in ("prompt", "tasks", "generation") if key in asked})
    ready(asked.get("metrics"), None)
    part, split = Part.from_dict(asked["dataset"], "dataset of evaluate"), asked.get("split", "val")
    dataset, what = datasets.build(part.name, split, **part.options), f"evaluate.dataset ({split})"
    check_not_empty(dataset, what)
    check_truth(dataset, what, questions.tasks, asked.get("limit"))
    check_needs(asked.get("metrics", ()), dataset, questions.tasks, asked.get("limit"))


def _check_component(kind: str, part: Part) -> None:
    try:
        registry(kind).check(part.name, **part.options)
    except RegistryError:
        if not _is_broken(kind, part):
            raise


def _check_generation(key: str, options: Mapping[str, Any], language_model: Part) -> None:
    """Check options of generation against the class of the language model, before it is built."""
    if not _is_broken("language_model", language_model):
        generate = registry("language_model").stated(language_model.name, "generate")
        check_generation(key, options, generate, upstream=2)


def _is_broken(kind: str, part: Part) -> bool:
    return registry(kind).describe(part.name).state == "broken"


def _is_new(checked: set[str], facts: object) -> bool:
    """Whether this is met for the first time."""
    key = json.dumps(facts, sort_keys=True)
    known = key in checked
    checked.add(key)
    return not known
