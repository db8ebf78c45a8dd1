"""The scores of metrics that are means of what single captions have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from sca_registry.contracts import MetricOutput

from sca.evaluation.records import Record, places, share


def from_means(each: Mapping[str, np.ndarray], records: Sequence[Record]) -> MetricOutput:
    """Arrays with one number a record, NaN where nothing was to be judged; a total is the mean over the others."""
    return MetricOutput({name: share(values) for name, values in each.items()}, {**each, **places(records)})
