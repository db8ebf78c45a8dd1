"""From records to scores: nothing else is read, so records that were stored can be scored again."""

from __future__ import annotations

from collections.abc import Sequence

import sca_registry
from sca_registry.contracts import Metric, Scores

from sca.evaluation.records import Record, lack


def score(records: Sequence[Record], metrics: Sequence[str] | None = None) -> tuple[dict[str, Scores], dict[str, str]]:
    """The scores of each metric, and why each of the others was left out.

    metrics: registered names; each must find what it needs in the records, or ValueError says what is missing. None:
    every registered metric that does, and that can be built.
    """
    scores: dict[str, Scores] = {}
    left_out: dict[str, str] = {}
    for name in sca_registry.metrics.names() if metrics is None else metrics:
        try:
            metric = sca_registry.metrics.build(name)
        except sca_registry.RegistryError as error:
            if metrics is not None:
                raise
            left_out[name] = str(error)
            continue
        reason = lack(records, metric.needs)
        if reason is None:
            try:
                scores[name] = _scores(metric, records, taken=[key for each in scores.values() for key in each.total])
            except Exception as error:  # a plugin's metric that fails costs its own scores and nothing else
                reason = f"it failed: {type(error).__name__}: {error}; `sca check metric {name}` may tell more"
        if reason is not None and metrics is not None:
            raise ValueError(f"metric {name!r}: {reason}")
        if reason is not None:
            left_out[name] = reason
    return scores, left_out


def _scores(metric: Metric, records: Sequence[Record], taken: Sequence[str]) -> Scores:
    """What a metric gives. Raises TypeError or ValueError for what is no `Scores`, or has another metric's names."""
    found = metric(records)
    if not isinstance(found, Scores):
        raise TypeError(f"it gives a {type(found).__name__}, not Scores")
    for key, value in found.total.items():
        if key in taken:
            raise ValueError(f"the score {key!r} is another metric's")
        float(value)
    return found
