"""What metrics ask of records: who has what is needed, and words for what is not there.

A need is a path into a record, `mask` or `truth.attributes.color`, met by any value but None and an empty list; or a
path and the text that must stand there, `task=caption`; or several of these, one of which will do: `truth.name or
task=caption`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Record = Mapping[str, Any]


def meets_need(record: Record, need: str) -> bool:
    return any(_meets_alternative(record, choice) for choice in need.split(" or "))


def filter_records(records: Iterable[Record], needs: Sequence[str]) -> list[Record]:
    """The records that meet every need."""
    return [record for record in records if all(meets_need(record, need) for need in needs)]


def describe_missing_needs(records: Sequence[Record], needs: Sequence[str]) -> str | None:
    """Why a metric with these needs cannot be computed, or None if at least one record meets them all."""
    if filter_records(records, needs):
        return None
    if not records:
        return "there are no records"
    unmet_needs = [need for need in needs if not any(meets_need(record, need) for record in records)]
    if unmet_needs:
        return f"needs {', '.join(unmet_needs)}, which none of the {len(records)} records has"
    return f"needs {', '.join(needs)}, and none of the {len(records)} records has all of them"


def require_records(records: Sequence[Record], needs: Sequence[str], metric: str) -> list[Record]:
    """The records that meet every need. ValueError if there are none, naming the metric and what is missing."""
    missing = describe_missing_needs(records, needs)
    if missing:
        raise ValueError(f"metric {metric!r}: {missing}")
    return filter_records(records, needs)


def collect_region_ids(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """Which region each row of a metric's `per_record` is about."""
    return {key: np.array([record[key] for record in records]) for key in ("image_id", "region_id")}


def group_by_image(records: Iterable[Record]) -> dict[int, list[Record]]:
    records_by_image: dict[int, list[Record]] = {}
    for record in records:
        records_by_image.setdefault(record["image_id"], []).append(record)
    return records_by_image


def compute_nanmean(values: np.ndarray) -> float:
    """The mean of what is not NaN; NaN if nothing is left."""
    numbers = values[~np.isnan(values)]
    return float(numbers.mean()) if len(numbers) else float("nan")


def normalize_text(text: str) -> str:
    """Letters in one case, words one space apart: two texts that differ in nothing else are the same."""
    return " ".join(text.casefold().split())


def _meets_alternative(record: Record, alternative: str) -> bool:
    path, _, expected = alternative.partition("=")
    value: Any = record
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value == expected if expected else value is not None and value != []
