"""Accuracy of the spatial relations that captions state about generated shapes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sca_registry.contracts import MetricOutput, Region

from sca.data.scenes import Statement, is_relation_true, parse_statement
from sca.evaluation.records import (
    Record,
    collect_region_ids,
    compute_nanmean,
    filter_records,
    group_by_image,
    require_records,
)

TRUTH_NEEDS = tuple(f"truth.attributes.{fact}" for fact in ("color", "shape", "center"))


class RelationAccuracy:
    """`stated` is the fraction of captions that state a relation; `correct` is the fraction of those that are correct.

    A relation is correct if another region of the image has the stated color and shape and is on the stated side
    (`sca.data.scenes.is_relation_true`). What the caption states about the region itself is ignored.
    """

    required_fields: tuple[str, ...] = ("task=caption", "caption", *TRUTH_NEEDS)

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        scored_records = require_records(records, self.required_fields, "relations")
        regions_by_image = {
            image: [_make_region(per_record) for per_record in image_records]
            for image, image_records in group_by_image(filter_records(records, TRUTH_NEEDS)).items()
        }
        stated, correct = np.zeros(len(scored_records)), np.full(len(scored_records), np.nan)
        for row, record in enumerate(scored_records):
            statement = parse_statement(record["caption"]) or Statement()
            if statement.relation:
                stated[row] = 1
                correct[row] = is_relation_true(statement, _make_region(record), regions_by_image[record["image_id"]])
        per_record = {"relations/correct": correct, "relations/stated": stated}
        total = {name: compute_nanmean(values) for name, values in per_record.items()}
        return MetricOutput(
            total | {"relations/captions": len(scored_records)}, per_record | collect_region_ids(scored_records)
        )


def _make_region(record: Record) -> Region:
    truth = record["truth"]
    return Region(record["region_id"], tuple(truth["box"]), attributes=truth["attributes"])
