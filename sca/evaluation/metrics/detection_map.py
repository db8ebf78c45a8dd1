"""Mean average precision of proposed boxes and their class names (Microsoft COCO, arXiv 1405.0312)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sca_registry.contracts import MetricOutput

from sca.evaluation.records import Record, normalize_text, require_records

MAX_DETECTIONS = 100  # per image, as in COCO


class DetectionMap:
    """Mean average precision of detection in [0, 1], averaged over classes and IoU thresholds 0.5 to 0.95.

    - `detection-map`: the class of a box is the class name that the model predicts.
    - `detection-map/proposer`: the class is the name of the proposer; omitted if the proposer returns no names.
    - `detection-map/boxes`: boxes only; classes are ignored.

    Names are compared without case and spacing. The classes are those of the ground truth. The 100 boxes of an image
    with the highest scores count.
    """

    required_fields: tuple[str, ...] = ("task=dense-recognition",)

    def __init__(self) -> None:
        self.implementation = "pycocotools"

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        image_records = require_records(records, self.required_fields, "detection-map")
        proposals = [proposal for record in image_records for proposal in record["proposals"]]
        values: dict[str, float] = {
            "detection-map": compute_detection_map(image_records, lambda proposal: proposal["caption"]),
            "detection-map/boxes": compute_detection_map(image_records, None),
        }
        if any(proposal.get("name") for proposal in proposals):
            values["detection-map/proposer"] = compute_detection_map(image_records, lambda proposal: proposal["name"])
        num_true_boxes = sum(len(record["truth"]["regions"]) for record in image_records)
        return MetricOutput(
            values | {"detection-map/proposals": len(proposals), "detection-map/true-boxes": num_true_boxes}
        )


def compute_detection_map(
    records: Sequence[Record], get_name: Callable[[Mapping[str, Any]], str | None] | None
) -> float:
    """Compute COCO's average precision.

    Args:
        records: One record per image, with its `proposals` and the `regions` of its truth.
        get_name: Returns the class name of a proposal; None to ignore classes.

    Returns:
        The mean over classes and IoU thresholds; NaN without ground-truth boxes.
    """
    names = sorted({normalize_text(region["name"]) for record in records for region in record["truth"]["regions"]})
    if not names:
        return float("nan")
    id_by_name = {name: index for index, name in enumerate(names, 1)}
    truth: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for image_id, record in enumerate(records, 1):
        for region in record["truth"]["regions"]:
            category_id = id_by_name[normalize_text(region["name"])]
            truth.append(_make_annotation(image_id, category_id, region["box"]) | {"id": len(truth) + 1, "iscrowd": 0})
        for proposal in record["proposals"]:
            name = names[0] if get_name is None else normalize_text(get_name(proposal) or "")
            if name in id_by_name:
                detection = _make_annotation(image_id, id_by_name[name], proposal["box"])
                detections.append(detection | {"score": proposal["score"]})
    if not detections:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco = COCO()
        coco.dataset = {
            "images": [{"id": image_id} for image_id in range(1, len(records) + 1)],
            "categories": [{"id": category_id, "name": name} for name, category_id in id_by_name.items()],
            "annotations": truth,
        }
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(detections), "bbox")
        evaluator.params.useCats = int(get_name is not None)
        evaluator.params.maxDets = [MAX_DETECTIONS]
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, np.inf]], ["all"]
        evaluator.evaluate()
        evaluator.accumulate()
    precision = evaluator.eval["precision"]  # (thresholds, recalls, classes, 1, 1); -1 for a class without boxes
    return float(precision[precision > -1].mean())


def _make_annotation(image_id: int, category_id: int, box: Sequence[float]) -> dict[str, Any]:
    x1, y1, x2, y2 = box
    size = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
    return {"image_id": image_id, "category_id": category_id, **size}
