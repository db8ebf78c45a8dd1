"""Open and check the datasets of a recipe before training."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sca_registry import datasets
from sca_registry.contracts import Dataset
from sca_registry.spec import ComponentSpec

from sca.data.summary import check_dataset_not_empty, count_skipped, summarize_dataset
from sca.training.recipe import Recipe, ValidationOptions


def open_training_datasets(recipe: Recipe) -> dict[str, Dataset]:
    """Open the datasets of a recipe.

    Args:
        recipe: Recipe of the training run.

    Returns:
        Datasets by their names in messages, such as "data.scenes (train)", in the order of the recipe.

    Raises:
        EmptyDatasetError: A dataset has no usable image.
        ValueError: A dataset is unknown, cannot be read, or rejects its options.
    """
    datasets_by_name = {}
    for name, source in recipe.data.items():
        dataset = datasets.build(source.dataset.name, source.split, **source.dataset.options)
        check_dataset_not_empty(dataset, f"data.{name} ({source.split})")
        datasets_by_name[f"data.{name} ({source.split})"] = dataset
    return datasets_by_name


def open_validation_dataset(validation: ValidationOptions) -> Dataset:
    """Open the dataset of [validate], which may be empty, and check its prompts, metrics and scores.

    Args:
        validation: Options of [validate].

    Returns:
        The dataset.

    Raises:
        ValueError: The prompt, a metric or a score is unknown; the extra of a metric is not installed; the dataset
            lacks what a metric needs; no score can select the best model; or the dataset rejects its options.
    """
    from sca.evaluation.predictions import PromptingOptions
    from sca.evaluation.requirements import check_best_scores, check_has_truth, check_metric_needs
    from sca.evaluation.scoring import check_metrics

    PromptingOptions(prompt_type=validation.prompt_type)
    check_metrics(validation.metrics or None, None)
    component = ComponentSpec.from_dict(validation.dataset, "dataset of validate")
    dataset = datasets.build(component.name, validation.split, **component.options)
    if len(dataset):
        check_has_truth(dataset, f"validate ({validation.split})", max_images=validation.max_images)
        check_metric_needs(validation.metrics, dataset, max_images=validation.max_images)
        check_best_scores(validation.metric_for_best_model, validation.metrics or None, dataset, validation.max_images)
    return dataset


def report_datasets(
    datasets_by_name: Mapping[str, Dataset], report: Callable[[str], None], only_skipped: bool = False
) -> None:
    """Report one line per dataset.

    Args:
        datasets_by_name: Datasets by their names in messages.
        report: Called with each line.
        only_skipped: Report only datasets with skipped entries.
    """
    for name, dataset in datasets_by_name.items():
        if not only_skipped or count_skipped(dataset):
            report(f"{name}: {summarize_dataset(dataset)}")
