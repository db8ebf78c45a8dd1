"""What metrics ask of records: who has what is needed, and words for what is not there.

A need is a path into a record, `mask` or `truth.attributes.colour`, met by any value but None and an empty list; or a
path and the text that must stand there, `task=caption`; or several of these, one of which will do: `truth.name or
task=caption`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Record = Mapping[str, Any]


def meets(record: Record, need: str) -> bool:
    return any(_meets(record, choice) for choice in need.split(" or "))


def meeting(records: Iterable[Record], needs: Sequence[str]) -> list[Record]:
    """The records that meet every need."""
    return [record for record in records if all(meets(record, need) for need in needs)]


def lack(records: Sequence[Record], needs: Sequence[str]) -> str | None:
    """Why a metric with these needs cannot be computed, or None if at least one record meets them all."""
    if meeting(records, needs):
        return None
    if not records:
        return "there are no records"
    absent = [need for need in needs if not any(meets(record, need) for record in records)]
    if absent:
        return f"needs {', '.join(absent)}, which none of the {len(records)} records has"
    return f"needs {', '.join(needs)}, and none of the {len(records)} records has all of them"


def require(records: Sequence[Record], needs: Sequence[str], metric: str) -> list[Record]:
    """The records that meet every need. ValueError if there are none, naming the metric and what is missing."""
    missing = lack(records, needs)
    if missing:
        raise ValueError(f"metric {metric!r}: {missing}")
    return meeting(records, needs)


def places(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """Which region each row of a metric's `each` is about."""
    return {key: np.array([record[key] for record in records]) for key in ("image_id", "region_id")}


def by_image(records: Iterable[Record]) -> dict[int, list[Record]]:
    images: dict[int, list[Record]] = {}
    for record in records:
        images.setdefault(record["image_id"], []).append(record)
    return images


def share(values: np.ndarray) -> float:
    """The mean of what is not NaN; NaN if nothing is left."""
    counted = values[~np.isnan(values)]
    return float(counted.mean()) if len(counted) else float("nan")


def normalised(text: str) -> str:
    """Letters in one case, words one space apart: two texts that differ in nothing else are the same."""
    return " ".join(text.casefold().split())


def _meets(record: Record, choice: str) -> bool:
    path, _, wanted = choice.partition("=")
    value: Any = record
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value == wanted if wanted else value is not None and value != []
