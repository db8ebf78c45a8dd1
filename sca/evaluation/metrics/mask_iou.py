"""IoU of predicted and ground-truth masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pycocotools import mask as rle
from sca_registry.contracts import MetricOutput

from sca.evaluation.records import Record, collect_region_ids, filter_records, require_records


class MaskIou:
    """Mean mask IoU in image pixels, and the fraction of regions with an IoU above 0.5.

    Each region counts once, whatever the number of its tasks, because its prompt and mask are the same. A region with a
    ground-truth mask but no predicted mask scores 0.
    """

    required_fields: tuple[str, ...] = ("mask", "truth.mask")

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        require_records(records, self.required_fields, "mask-iou")
        regions: dict[tuple[int, int], Record] = {}
        for record in filter_records(records, ("truth.mask",)):
            regions.setdefault((record["image_id"], record["region_id"]), record)
        scored_records = list(regions.values())
        ious = np.array([_compute_iou(record) for record in scored_records])
        per_record = {"mask-iou/mean": ious, "mask-iou/above-0.5": (ious > 0.5).astype(float)}
        total = {name: float(values.mean()) for name, values in per_record.items()}
        return MetricOutput(
            total | {"mask-iou/regions": len(scored_records)}, per_record | collect_region_ids(scored_records)
        )


def _compute_iou(record: Record) -> float:
    mask, truth = record["mask"], record["truth"]["mask"]
    if mask is None:
        return 0.0
    if list(mask["size"]) != list(truth["size"]):
        raise ValueError(
            f"metric 'mask-iou': the mask of region {record['region_id']} in image {record['image_id']} has size "
            f"{list(mask['size'])} and the true one {list(truth['size'])} (height, width)"
        )
    return float(rle.iou([mask], [truth], [0])[0, 0])
