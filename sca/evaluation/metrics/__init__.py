"""What can be measured from records; `sca.evaluation.predictions` says what a record is.

A metric's `needs` are those of `sca.evaluation.records`. Its `Scores` follow one rule. `total` has shares in 0..1 as
floats, NaN where nothing was there to be counted, and counts as whole numbers. The arrays of `each` have one row a
thing that was judged (a record, a region, a pair), with `image_id` and `region_id` to say which; an array named like a
share of `total` has that share as its mean over the rows that are not NaN.
"""
