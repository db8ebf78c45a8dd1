"""Whether a caption says what a drawn shape looks like."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sca_registry.contracts import MetricOutput

from sca.data.scenes import Statement, parse
from sca.evaluation.records import Record, places, require

FACTS = ("colour", "form", "size", "texture")


class Attributes:
    """The share of captions that name the true colour, form, size and texture: each alone, and `all` four.

    A caption is read by `sca.data.scenes.parse`; what it does not say counts as wrong.
    """

    needs = ("task=caption", "caption", *(f"truth.attributes.{fact}" for fact in FACTS))

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        captions = require(records, self.needs, "attributes")
        right = {fact: np.zeros(len(captions)) for fact in FACTS}
        for row, record in enumerate(captions):
            statement = parse(record["caption"]) or Statement()
            for fact in FACTS:
                right[fact][row] = getattr(statement, fact) == record["truth"]["attributes"][fact]
        each = {"attributes/all": np.minimum.reduce([*right.values()])}
        each |= {f"attributes/{fact}": values for fact, values in right.items()}
        total = {name: float(values.mean()) for name, values in each.items()}
        return MetricOutput(total | {"attributes/captions": len(captions)}, each | places(captions))
