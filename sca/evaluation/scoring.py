"""From records to scores: nothing else is read, so records that were stored can be scored again."""

from __future__ import annotations

from collections.abc import Sequence

import sca_registry
from sca_registry.contracts import Scores

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
        missing = lack(records, metric.needs)
        if missing is None:
            scores[name] = metric(records)
        elif metrics is None:
            left_out[name] = missing
        else:
            raise ValueError(f"metric {name!r}: {missing}")
    return scores, left_out
