"""Metrics over prediction records, see `sca.evaluation.predictions`.

A metric's `needs` are those of `sca.evaluation.records`. In its `MetricOutput`, `values` has shares in 0..1 as floats,
NaN where nothing was counted, and counts as whole numbers. The arrays of `per_record` have one row per judged item (a
record, a region or a pair), identified by `image_id` and `region_id`; an array named like a share of `values` has that
share as its mean over the rows that are not NaN.
"""
