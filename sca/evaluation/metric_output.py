"""Output of metrics that are means of per-record scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from sca_registry.contracts import MetricOutput

from sca.evaluation.records import Record, collect_region_ids, compute_nanmean


def make_mean_output(per_record: Mapping[str, np.ndarray], records: Sequence[Record]) -> MetricOutput:
    """Build a `MetricOutput` whose values are means over records.

    Args:
        per_record: Score name -> (R,) array with one value per record, NaN for records that were not judged.
        records: The R records.

    Returns:
        The output; each value is the mean over the rows that are not NaN.
    """
    return MetricOutput(
        {name: compute_nanmean(values) for name, values in per_record.items()},
        {**per_record, **collect_region_ids(records)},
    )
