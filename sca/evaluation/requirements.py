"""Check that a dataset has what tasks and metrics need, before predicting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import sca_registry
from sca_registry import RegistryError
from sca_registry.contracts import Dataset
from sca_registry.errors import make_unknown_name_error

from sca.data.summary import summarize_dataset
from sca.evaluation.predictions import DENSE_TASKS, PromptingOptions, draft_records
from sca.evaluation.records import describe_missing_needs, filter_records, meets_need
from sca.evaluation.scoring import check_metrics


def check_has_truth(
    dataset: Dataset,
    dataset_name: str,
    tasks: Sequence[str] = PromptingOptions.tasks,
    max_images: int | None = None,
    caption_all: bool = False,
) -> None:
    """Check that a dataset has a region with ground truth for a task.

    Args:
        dataset: Any dataset, see `draft_records`.
        dataset_name: Name of the dataset in the message.
        tasks: Tasks of every region.
        max_images: Maximum number of images to check. Defaults to all.
        caption_all: Whether regions without phrases are captioned, see `PromptingOptions`.

    Raises:
        ValueError: No region has ground truth for any task.
    """
    records = draft_records(dataset, tasks, max_images, caption_all)
    if hasattr(dataset, "iter_annotations") and next(records, None) is None:
        raise ValueError(describe_missing_truth(dataset, dataset_name, tasks))


def select_dense_tasks(dataset: Dataset, tasks: Sequence[str], max_images: int | None = None) -> list[str]:
    """Return the dense tasks of an evaluation with a proposer.

    Args:
        dataset: Any dataset, see `draft_records`.
        tasks: Tasks as in `PromptingOptions`.
        max_images: Maximum number of images to check. Defaults to all.

    Returns:
        The tasks of `DENSE_TASKS` for which a region of the dataset has ground truth, or all if none has it.
    """
    dense_tasks = [dense_task for dense_task, task in DENSE_TASKS.items() if task in tasks]
    with_truth = [task for task in dense_tasks if next(draft_records(dataset, [task], max_images), None) is not None]
    return with_truth or dense_tasks


def describe_missing_truth(dataset: Dataset, dataset_name: str, tasks: Sequence[str]) -> str:
    """Return the error message for a dataset without ground truth for the tasks."""
    return (
        f"no region of {dataset_name} has ground truth for "
        f"{' or '.join(DENSE_TASKS.get(task, task) for task in tasks)} (phrases or judge questions for captions, "
        f"a name for recognition); {summarize_dataset(dataset)}"
    )


def check_metric_needs(
    metrics: Sequence[str],
    dataset: Dataset,
    tasks: Sequence[str] = PromptingOptions.tasks,
    max_images: int | None = None,
    caption_all: bool = False,
) -> None:
    """Check that a dataset meets the needs of metrics.

    Args:
        metrics: Registered names.
        dataset: Any dataset, see `draft_records`.
        tasks: Tasks of every region.
        max_images: Maximum number of images to check. Defaults to all.
        caption_all: Whether regions without phrases are captioned, see `PromptingOptions`.

    Raises:
        ValueError: A metric needs a task or ground truth that no region has, or that of a region is invalid.
    """
    for name in metrics:
        reason = _find_missing_needs(name, dataset, tasks, max_images, caption_all)
        if reason:
            raise ValueError(f"metric {name!r}: {reason}; choose other metrics or other data")
        check_truth = sca_registry.metrics.get_declared(name, "check_truth")
        if check_truth is not None:
            records = draft_records(dataset, tasks, max_images, caption_all)
            for record in filter_records(records, _list_dataset_needs(name)):
                check_truth(record)


def check_best_scores(
    score_names: Sequence[str], metrics: Sequence[str] | None, dataset: Dataset, max_images: int | None = None
) -> None:
    """Check that the scores of `validate.metric_for_best_model` exist and that a dataset supports at least one of them.

    Args:
        score_names: Scores such as "class/accuracy".
        metrics: Metrics to compute; None for all metrics that the data supports.
        dataset: Any dataset, see `draft_records`.
        max_images: Maximum number of images to check. Defaults to all.

    Raises:
        RegistryError: No metric has one of the scores, or none of the scores can be computed.
    """
    score_patterns = {name: _get_score_patterns(name) for name in sca_registry.metrics.list_names()}
    metrics_by_score = {
        each: [name for name, patterns in score_patterns.items() if patterns is None or _matches_any(each, patterns)]
        for each in score_names
    }
    for each, matches in metrics_by_score.items():
        if not matches:
            known_scores = [score for patterns in score_patterns.values() for score in patterns or ()]
            raise make_unknown_name_error(
                f"validate.metric_for_best_model: no metric has a score {each!r}", each, known_scores
            )
    missing = "not in validate.metrics"
    problems = {
        name: missing
        if metrics is not None and name not in metrics
        else _find_metric_problem(name, dataset, max_images)
        for name in dict.fromkeys(name for matches in metrics_by_score.values() for name in matches)
    }
    if all(problems.values()):
        reasons = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        raise RegistryError(
            f"validate.metric_for_best_model is {list(score_names)}, and none of these scores can be computed "
            f"({reasons}); choose another score"
        )


def _get_score_patterns(metric: str) -> tuple[str, ...] | None:
    """Return the score names that a metric declares; () for a metric that fails to load."""
    try:
        return sca_registry.metrics.get_declared(metric, "scores")
    except RegistryError:
        return ()


def _matches_any(score: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(score, name) for name in patterns)


def _find_metric_problem(metric: str, dataset: Dataset, max_images: int | None) -> str | None:
    try:
        check_metrics([metric], None)
    except RegistryError as error:
        return str(error)
    return _find_missing_needs(metric, dataset, PromptingOptions.tasks, max_images)


def _find_missing_needs(
    metric: str, dataset: Dataset, tasks: Sequence[str], max_images: int | None, caption_all: bool = False
) -> str | None:
    """Return why no record of a dataset can meet a metric's needs; None if one can or if it is unknown."""
    dataset_needs = _list_dataset_needs(metric)
    for need in dataset_needs:
        needs_task = all(choice.startswith("task=") for choice in need.split(" or "))
        if needs_task and not any(meets_need({"task": task}, need) for task in tasks):
            return f"needs {need}, and this evaluation has task={' and task='.join(tasks)}"

    def iter_records() -> Iterator[dict[str, Any]]:
        return draft_records(dataset, tasks, max_images, caption_all)

    if next(iter_records(), None) is None or any(
        all(meets_need(each, need) for need in dataset_needs) for each in iter_records()
    ):
        return None
    return describe_missing_needs(list(iter_records()), dataset_needs)


def _list_dataset_needs(metric: str) -> list[str]:
    """Return the needs of a metric that depend on tasks and dataset only, not on predictions."""
    needs = sca_registry.metrics.get_declared(metric, "required_fields") or ()
    return [need for need in needs if all(choice.startswith(("task=", "truth.")) for choice in need.split(" or "))]
