"""Region proposals from the boxes of an mmdet detector."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import numpy as np
from PIL import Image
from sca_registry.contracts import Prompt, Proposals

from sca_mmdet.detectors import build_detector, load_mmdet_config, silence_mmdet


class MmdetProposer:
    """Proposer of a detector's boxes, with their scores and class names.

    Args:
        config: Name of a config in mmdet, or path of a file.
        weights: File or URL in the format of mmdet.
        pretrained: Load `weights`; False for random weights.
        score_thr: Minimum score.
        max_per_img: Maximum number of regions, highest scores first.
        device: Device of the detector.

    Raises:
        ValueError: The config or the weights do not exist, or the detector needs compiled operators.
    """

    def __init__(
        self,
        config: str,
        weights: str | None = None,
        pretrained: bool = True,
        score_thr: float = 0.3,
        max_per_img: int = 100,
        device: str = "cpu",
    ):
        if pretrained and weights is None:
            raise ValueError("no weights; set weights=FILE or a URL, or pretrained=false")
        mmdet_config = load_mmdet_config(config)
        _set_score_thresholds(mmdet_config.model.get("test_cfg"), score_thr)
        self.detector, metadata = build_detector(mmdet_config, config, weights if pretrained else None)
        self.detector.cfg = mmdet_config
        self.detector.to(device)
        self.class_names = _read_class_names(mmdet_config, metadata)
        self.score_thresh, self.max_regions = score_thr, max_per_img

    def __call__(self, image: Image.Image, image_id: int | str) -> Proposals:
        """Return boxes of at least 1 pixel per side, best first."""
        from mmdet.apis import inference_detector

        bgr_image = np.asarray(image.convert("RGB"))[..., ::-1].copy()
        with silence_mmdet():
            detections = inference_detector(self.detector, bgr_image).pred_instances
        boxes = detections.bboxes.float().cpu().clamp(min=0)
        boxes = boxes.minimum(boxes.new_tensor([image.width, image.height] * 2))
        is_kept = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1) & (detections.scores.cpu() >= self.score_thresh)
        order = detections.scores.cpu().masked_fill(~is_kept, -1).argsort(descending=True, stable=True)
        rows = order[: min(self.max_regions, int(is_kept.sum()))].tolist()
        names = [
            self.class_names[label] if label < len(self.class_names) else None
            for label in detections.labels[rows].tolist()
        ]
        return Proposals(
            tuple(Prompt(box=tuple(boxes[row].tolist())) for row in rows),
            tuple(float(detections.scores[row]) for row in rows),
            tuple(names),
        )


def _set_score_thresholds(settings: Any, score_thresh: float) -> None:
    """Set the score threshold of every stage of a config."""
    if isinstance(settings, MutableMapping):
        for key, value in settings.items():
            if key == "score_thr":
                settings[key] = score_thresh
            else:
                _set_score_thresholds(value, score_thresh)


def _read_class_names(config, metadata) -> tuple[str, ...]:
    """Return the class names stored with the weights, else those of the dataset in the config."""
    meta = metadata.get("dataset_meta") or {}
    classes = meta.get("classes") or meta.get("CLASSES") or metadata.get("CLASSES")
    if classes:
        return tuple(classes)
    from mmdet.registry import DATASETS

    dataset_type = (config.get("test_dataloader") or {}).get("dataset", {}).get("type")
    dataset_class = DATASETS.get(dataset_type) if isinstance(dataset_type, str) else None
    return tuple((getattr(dataset_class, "METAINFO", None) or {}).get("classes", ()))
