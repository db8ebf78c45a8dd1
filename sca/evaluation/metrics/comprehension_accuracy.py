"""Accuracy of referring expression comprehension (RefCOCO, arXiv 1608.00272)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from sca_registry.contracts import MetricOutput

from sca.evaluation.records import Record, collect_region_ids, compute_nanmean, require_records
from sca.nn.boxes import compute_box_iou

MIN_IOU = 0.5


class ComprehensionAccuracy:
    """Fraction of expressions whose best match has an IoU of at least 0.5 with the box of the region.

    `comprehension/expressions` is the number of expressions. An expression without a match counts as wrong.
    """

    required_fields: tuple[str, ...] = ("task=comprehension", "truth.box")

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        scored_records = require_records(records, self.required_fields, "comprehension")
        rows = [(record, expression["box"]) for record in scored_records for expression in record["expressions"]]
        is_correct = np.array([_is_correct(box, record["truth"]["box"]) for record, box in rows], dtype=float)
        values = {"comprehension/accuracy": compute_nanmean(is_correct), "comprehension/expressions": len(rows)}
        return MetricOutput(
            values, {"comprehension/accuracy": is_correct, **collect_region_ids([record for record, _ in rows])}
        )


def _is_correct(box: Sequence[float] | None, true_box: Sequence[float]) -> bool:
    if box is None:
        return False
    boxes = (torch.tensor([each], dtype=torch.float64) for each in (box, true_box))
    return compute_box_iou(*boxes).item() >= MIN_IOU
