"""The scores of metrics that are means of what single captions have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from sca_registry.contracts import MetricOutput

from sca.evaluation.records import Record, collect_region_ids, compute_nanmean


def make_mean_output(per_record: Mapping[str, np.ndarray], records: Sequence[Record]) -> MetricOutput:
    """Arrays with one number a record, NaN where nothing was to be judged; a value is the mean over the others."""
    return MetricOutput(
        {name: compute_nanmean(values) for name, values in per_record.items()},
        {**per_record, **collect_region_ids(records)},
    )
