"""What tasks and metrics need of a dataset, checked before anything is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import sca_registry
from sca_registry import RegistryError
from sca_registry.contracts import Dataset
from sca_registry.messages import unknown

from sca.data.summary import summarize_dataset
from sca.evaluation.predictions import Questions, draft_records
from sca.evaluation.records import lack, meets
from sca.evaluation.scoring import ready


def check_truth(dataset: Dataset, what: str, tasks: Sequence[str] = Questions.tasks, limit: int | None = None) -> None:
    """Check that a dataset has a region with the truth that a task asks for.

    Args:
        dataset: Any dataset, see `draft_records`.
        what: What the message calls it.
        tasks: What every region is asked.
        limit: Only the first images; by default all.

    Raises:
        ValueError: No region has.
    """
    if hasattr(dataset, "annotations_of_all") and next(draft_records(dataset, tasks, limit), None) is None:
        raise ValueError(describe_missing_truth(dataset, what, tasks))


def describe_missing_truth(dataset: Dataset, what: str, tasks: Sequence[str]) -> str:
    """Return the error for a dataset without a region that has what tasks ask for."""
    return (
        f"nothing to evaluate: no region of {what} has what {' or '.join(tasks)} asks for (phrases for captions, a "
        f"name for recognition); {summarize_dataset(dataset)}"
    )


def check_needs(
    metrics: Sequence[str], dataset: Dataset, tasks: Sequence[str] = Questions.tasks, limit: int | None = None
) -> None:
    """Check that metrics find what they need in a dataset, before anything is predicted.

    Args:
        metrics: Registered names.
        dataset: Any dataset, see `draft_records`.
        tasks: What every region is asked.
        limit: Only the first images; by default all.

    Raises:
        ValueError: A metric needs a task or a truth that no region has.
    """
    for name in metrics:
        reason = _find_lack(name, dataset, tasks, limit)
        if reason:
            raise ValueError(f"metric {name!r}: {reason}; choose other metrics or other data")


def check_best(names: Sequence[str], metrics: Sequence[str] | None, dataset: Dataset, limit: int | None = None) -> None:
    """Check that the scores of `validate.best` exist and that at least one can be computed on a dataset.

    Args:
        names: Scores such as "class/count".
        metrics: Those that are computed; None for all that can be.
        dataset: Any dataset, see `draft_records`.
        limit: Only the first images; by default all.

    Raises:
        RegistryError: A score that no metric has, or none that can be computed.
    """
    declared = {name: _score_names(name) for name in sca_registry.metrics.names()}
    makers = {each: [name for name, made in declared.items() if made is None or _matches(each, made)] for each in names}
    for each, found in makers.items():
        if not found:
            known = [score for made in declared.values() for score in made or ()]
            raise unknown(f"validate.best: no metric has a score {each!r}", each, known)
    missing = "it is not among validate.metrics"
    problems = {
        name: missing if metrics is not None and name not in metrics else _find_problem(name, dataset, limit)
        for name in dict.fromkeys(name for found in makers.values() for name in found)
    }
    if all(problems.values()):
        reasons = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        raise RegistryError(
            f"validate.best is {list(names)}, and none of these scores is computed ({reasons}); name another score"
        )


def _score_names(metric: str) -> tuple[str, ...] | None:
    """The names of a metric's scores, as it declares them; () for a metric that does not work."""
    try:
        return sca_registry.metrics.stated(metric, "scores")
    except RegistryError:
        return ()


def _matches(score: str, names: Sequence[str]) -> bool:
    return any(fnmatchcase(score, name) for name in names)


def _find_problem(metric: str, dataset: Dataset, limit: int | None) -> str | None:
    try:
        ready([metric], None)
    except RegistryError as error:
        return str(error)
    return _find_lack(metric, dataset, Questions.tasks, limit)


def _find_lack(metric: str, dataset: Dataset, tasks: Sequence[str], limit: int | None) -> str | None:
    """Why no record of a dataset can meet the needs of a metric; None if one can, or if that cannot be known yet."""
    known = [need for need in sca_registry.metrics.stated(metric, "needs") or () if _is_of_dataset(need)]
    if next(draft_records(dataset, tasks, limit), None) is None:
        return None
    if any(all(meets(record, need) for need in known) for record in draft_records(dataset, tasks, limit)):
        return None
    return lack(list(draft_records(dataset, tasks, limit)), known)


def _is_of_dataset(need: str) -> bool:
    """Whether a need depends on the tasks and the dataset alone, and not on what is predicted."""
    return all(choice.startswith(("task=", "truth.")) for choice in need.split(" or "))
