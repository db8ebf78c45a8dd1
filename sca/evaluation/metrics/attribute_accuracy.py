"""Accuracy of the attributes that captions state about generated shapes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sca_registry.contracts import MetricOutput

from sca.data.scenes import Statement, parse_statement
from sca.evaluation.records import Record, collect_region_ids, require_records

ATTRIBUTES = ("color", "shape", "size", "texture")


class AttributeAccuracy:
    """Fraction of captions with the correct color, shape, size and texture: each attribute, and `all` four.

    Captions are parsed by `sca.data.scenes.parse_statement`. An attribute that is not stated counts as wrong.
    """

    required_fields: tuple[str, ...] = ("task=caption", "caption", *(f"truth.attributes.{fact}" for fact in ATTRIBUTES))

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        scored_records = require_records(records, self.required_fields, "attributes")
        correct = {attribute: np.zeros(len(scored_records)) for attribute in ATTRIBUTES}
        for row, record in enumerate(scored_records):
            statement = parse_statement(record["caption"]) or Statement()
            for attribute in ATTRIBUTES:
                correct[attribute][row] = getattr(statement, attribute) == record["truth"]["attributes"][attribute]
        per_record = {"attributes/all": np.minimum.reduce([*correct.values()])}
        per_record |= {f"attributes/{attribute}": values for attribute, values in correct.items()}
        total = {name: float(values.mean()) for name, values in per_record.items()}
        return MetricOutput(
            total | {"attributes/captions": len(scored_records)}, per_record | collect_region_ids(scored_records)
        )
