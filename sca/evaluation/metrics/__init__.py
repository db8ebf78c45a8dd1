"""Metrics over prediction records, see `sca.evaluation.predictions`.

The `required_fields` of a metric follow `sca.evaluation.records`. In its `MetricOutput`, `values` contains fractions in
0..1 as floats (NaN if nothing could be scored) and counts as integers. The arrays of `per_record` have one row per
judged unit (a record, a region or a pair), identified by `image_id` and `region_id`. An array named like a fraction has
that fraction as its mean over the rows that are not NaN.
"""
