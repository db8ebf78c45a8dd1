"""Select the records that a metric can score, and explain which fields are missing.

A need has one of these forms:

- A path into a record, such as `mask` or `truth.attributes.color`. Any value except None and an empty list meets it.
- A path and the required text, such as `task=caption`.
- Alternatives, of which one must be met: `truth.name or task=caption`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Record = Mapping[str, Any]


def meets_need(record: Record, need: str) -> bool:
    """Return whether a record meets a need."""
    return any(_meets_alternative(record, choice) for choice in need.split(" or "))


def filter_records(records: Iterable[Record], needs: Sequence[str]) -> list[Record]:
    """Return the records that meet every need."""
    return [record for record in records if all(meets_need(record, need) for need in needs)]


def describe_missing_needs(records: Sequence[Record], needs: Sequence[str]) -> str | None:
    """Return why a metric with these needs cannot be computed, or None if at least one record meets them all."""
    if filter_records(records, needs):
        return None
    if not records:
        return "no records"
    unmet_needs = [need for need in needs if not any(meets_need(record, need) for record in records)]
    if unmet_needs:
        return f"needs {', '.join(unmet_needs)}, missing in all {len(records)} records"
    return f"needs {', '.join(needs)}, and none of the {len(records)} records has all of them"


def require_records(records: Sequence[Record], needs: Sequence[str], metric: str) -> list[Record]:
    """Return the records that meet every need.

    Args:
        records: Prediction records.
        needs: Needs of the metric, see the module docstring.
        metric: Name of the metric in the message.

    Returns:
        The records, in their order; at least one.

    Raises:
        ValueError: No record meets every need.
    """
    missing = describe_missing_needs(records, needs)
    if missing:
        raise ValueError(f"metric {metric!r}: {missing}")
    return filter_records(records, needs)


def collect_region_ids(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """Return the `image_id` and `region_id` arrays that identify the rows of a metric's `per_record`."""
    return {key: np.array([record[key] for record in records]) for key in ("image_id", "region_id")}


def group_by_image(records: Iterable[Record]) -> dict[int, list[Record]]:
    """Return the records of each `image_id`, in their order."""
    records_by_image: dict[int, list[Record]] = {}
    for record in records:
        records_by_image.setdefault(record["image_id"], []).append(record)
    return records_by_image


def compute_nanmean(values: np.ndarray) -> float:
    """Return the mean over the values that are not NaN; NaN if none is left."""
    numbers = values[~np.isnan(values)]
    return float(numbers.mean()) if len(numbers) else float("nan")


def normalize_text(text: str) -> str:
    """Return text with folded case and single spaces, for comparisons that ignore case and spacing."""
    return " ".join(text.casefold().split())


def _meets_alternative(record: Record, alternative: str) -> bool:
    path, _, expected = alternative.partition("=")
    value: Any = record
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value == expected if expected else value is not None and value != []
