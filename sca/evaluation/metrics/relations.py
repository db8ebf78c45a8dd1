"""Whether what a caption says about a shape's place is true."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sca_registry.contracts import Region, MetricOutput

from sca.data.scenes import Statement, parse, relation_holds
from sca.evaluation.records import Record, by_image, meeting, places, require, share

TRUTH = tuple(f"truth.attributes.{fact}" for fact in ("colour", "form", "centre"))


class Relations:
    """`stated`: the share of captions that state a relation. `right`: the share of those for which it holds.

    It holds if some other region of the image is of the stated colour and form and lies on the stated side
    (`sca.data.scenes.relation_holds`), whatever the caption says of the region itself.
    """

    needs = ("task=caption", "caption", *TRUTH)

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        captions = require(records, self.needs, "relations")
        scenes = {
            image: [_region(each) for each in found] for image, found in by_image(meeting(records, TRUTH)).items()
        }
        stated, right = np.zeros(len(captions)), np.full(len(captions), np.nan)
        for row, record in enumerate(captions):
            statement = parse(record["caption"]) or Statement()
            if statement.relation:
                stated[row] = 1
                right[row] = relation_holds(statement, _region(record), scenes[record["image_id"]])
        each = {"relations/right": right, "relations/stated": stated}
        total = {name: share(values) for name, values in each.items()}
        return MetricOutput(total | {"relations/captions": len(captions)}, each | places(captions))


def _region(record: Record) -> Region:
    truth = record["truth"]
    return Region(record["region_id"], tuple(truth["box"]), attributes=truth["attributes"])
