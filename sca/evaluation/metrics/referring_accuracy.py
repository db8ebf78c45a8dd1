"""Whether captions of generated shapes pick out their own region among all regions of the scene."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sca_registry.contracts import MetricOutput, Region

from sca.data.referring_scenes import is_statement_true
from sca.data.scenes import parse_statement
from sca.evaluation.records import Record, collect_region_ids, require_records


class ReferringAccuracy:
    """`true` is the fraction of captions that are true of their region; `unambiguous`, of no other region as well.

    A caption is true of a region if all attributes, the location and the relation that it states are
    (`sca.data.referring_scenes.is_statement_true`). A caption that states nothing is not true. The ground truth of all
    regions of an image is part of each record, so that regions without referring expressions count, too.
    """

    required_fields: tuple[str, ...] = ("task=caption", "caption", "truth.attributes.distractors")

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        scored_records = require_records(records, self.required_fields, "referring")
        matches = [_match_regions(record) for record in scored_records]
        is_true = np.array([own for own, _ in matches], dtype=float)
        is_unambiguous = np.array([own and num_others == 0 for own, num_others in matches], dtype=float)
        per_record = {"referring/unambiguous": is_unambiguous, "referring/true": is_true}
        total = {name: float(values.mean()) for name, values in per_record.items()}
        return MetricOutput(
            total | {"referring/captions": len(scored_records)}, per_record | collect_region_ids(scored_records)
        )


def _match_regions(record: Record) -> tuple[bool, int]:
    """Return whether the caption of a record is true of its region, and the number of other regions it is true of."""
    statement = parse_statement(record["caption"])
    if statement is None:
        return False, 0
    truth = record["truth"]
    own_region = Region(record["region_id"], tuple(truth["box"]), attributes=truth["attributes"])
    distractors = [
        Region(attributes["id"], own_region.box, attributes=attributes)
        for attributes in truth["attributes"]["distractors"]
    ]
    regions = [own_region, *distractors]
    own, *others = (is_statement_true(statement, region, regions) for region in regions)
    return own, sum(others)
