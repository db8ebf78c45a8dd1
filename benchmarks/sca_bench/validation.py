"""Find the errors of a sweep before its first row runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from sca_registry import RegistryError, captioners, datasets, get_registry
from sca_registry.overrides import MODEL_COMPONENTS
from sca_registry.spec import ComponentSpec, check_generation

from sca.data.summary import check_dataset_not_empty
from sca.evaluation.predictions import PromptingOptions
from sca.evaluation.requirements import check_has_truth, check_metric_needs
from sca.evaluation.scoring import check_metrics
from sca.training.datasets import open_training_datasets, open_validation_dataset
from sca_bench.row import SweepRow
from sca_bench.sections import PROMPTING_KEYS


def check_rows(rows: Iterable[SweepRow]) -> None:
    """Check the components, options, recipes, datasets, prompts and metrics of rows.

    Broken components and incompatible components are results of a sweep and not rejected.

    Args:
        rows: Rows to check.

    Raises:
        ValueError: The message names the invalid field or component, or the extra to install.
    """
    checked_keys: set[str] = set()
    for row in rows:
        evaluation = row.config.get("evaluate")
        if evaluation is not None and _is_first_check(checked_keys, ["evaluate", evaluation]):
            _check_evaluation(evaluation)
        if row.captioner is not None:
            captioners.check(row.captioner.name, **row.captioner.options)
        else:
            _check_model(row, checked_keys)


def _check_model(row: SweepRow, checked_keys: set[str]) -> None:
    """Check the components, generation options and recipes of a row, except those that were checked before."""
    spec = row.spec
    assert spec is not None
    for kind in MODEL_COMPONENTS:
        component = getattr(spec, kind)
        if component is not None and _is_first_check(checked_keys, [kind, component.to_dict()]):
            _check_component(kind, component)
    evaluation_generation = row.config.get("evaluate", {}).get("generation", {})
    for key, options in (("generation", spec.generation), ("evaluate.generation", evaluation_generation)):
        if _is_first_check(checked_keys, [key, options, spec.language_model.name]):
            _check_generation(key, options, spec.language_model)
    for recipe in row.make_recipes():
        if _is_first_check(checked_keys, [recipe.to_dict()["data"], str(recipe.validate)]):
            open_training_datasets(recipe)
            if recipe.validate is not None:
                open_validation_dataset(recipe.validate)


def _check_evaluation(evaluation: Mapping[str, Any]) -> None:
    prompting = PromptingOptions(**{key: evaluation[key] for key in PROMPTING_KEYS if key in evaluation})
    check_metrics(evaluation.get("metrics"), None)
    component, split = (
        ComponentSpec.from_dict(evaluation["dataset"], "dataset of evaluate"),
        evaluation.get("split", "val"),
    )
    dataset, dataset_name = datasets.build(component.name, split, **component.options), f"evaluate.dataset ({split})"
    check_dataset_not_empty(dataset, dataset_name)
    options = (prompting.tasks, evaluation.get("max_images"), prompting.caption_all)
    check_has_truth(dataset, dataset_name, *options)
    check_metric_needs(evaluation.get("metrics", ()), dataset, *options)


def _check_component(kind: str, component: ComponentSpec) -> None:
    try:
        get_registry(kind).check(component.name, **component.options)
    except RegistryError:
        if not _is_broken_component(kind, component):
            raise


def _check_generation(key: str, options: Mapping[str, Any], language_model: ComponentSpec) -> None:
    """Check generation options against the class of the language model before building it."""
    if not _is_broken_component("language_model", language_model):
        generate = get_registry("language_model").get_declared(language_model.name, "generate")
        check_generation(key, options, generate, num_positional=2)


def _is_broken_component(kind: str, component: ComponentSpec) -> bool:
    return get_registry(kind).load_entry(component.name).state == "broken"


def _is_first_check(checked_keys: set[str], facts: object) -> bool:
    """Return whether these facts are new, and remember them."""
    key = json.dumps(facts, sort_keys=True)
    is_known = key in checked_keys
    checked_keys.add(key)
    return not is_known
