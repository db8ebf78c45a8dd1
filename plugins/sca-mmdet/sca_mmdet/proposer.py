"""The boxes of a detector as regions worth captioning."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import numpy as np
from PIL import Image
from sca_registry.contracts import Prompt, Proposals

from sca_mmdet.detectors import build_detector, read_config, silent


class MmdetProposer:
    """What a detector finds in a picture: boxes, how sure it is, and the names of their classes.

    config: the name of one of mmdet's configs, or a file. weights: a file or a URL, in mmdet's format; with
    `pretrained=False` they are random. score: the least. largest: how many regions at most, the surest.
    """

    def __init__(
        self,
        config: str,
        weights: str | None = None,
        pretrained: bool = True,
        score: float = 0.3,
        largest: int = 100,
        device: str = "cpu",
    ):
        if pretrained and weights is None:
            raise ValueError("there are no weights: give weights=FILE or a URL, or pretrained=false")
        read = read_config(config)
        _set_least(read.model.get("test_cfg"), score)
        self.detector, said = build_detector(read, config, weights if pretrained else None)
        self.detector.cfg = read
        self.detector.to(device)
        self.names = _names(read, said)
        self.score, self.largest = score, largest

    def __call__(self, image: Image.Image, image_id: int | str) -> Proposals:
        from mmdet.apis import inference_detector

        picture = np.asarray(image.convert("RGB"))[..., ::-1].copy()  # BGR
        with silent():
            found = inference_detector(self.detector, picture).pred_instances
        boxes = found.bboxes.float().cpu().clamp(min=0)
        boxes = boxes.minimum(boxes.new_tensor([image.width, image.height] * 2))
        wide = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1) & (found.scores.cpu() >= self.score)
        order = found.scores.cpu().masked_fill(~wide, -1).argsort(descending=True, stable=True)
        chosen = order[: min(self.largest, int(wide.sum()))].tolist()
        names = [self.names[label] if label < len(self.names) else None for label in found.labels[chosen].tolist()]
        return Proposals(
            tuple(Prompt(box=tuple(boxes[row].tolist())) for row in chosen),
            tuple(float(found.scores[row]) for row in chosen),
            tuple(names),
        )


def _set_least(settings: Any, score: float) -> None:
    """The least score of every stage is that which was asked for, where a config has another."""
    if isinstance(settings, MutableMapping):
        for key, value in settings.items():
            if key == "score_thr":
                settings[key] = score
            else:
                _set_least(value, score)


def _names(config, said) -> tuple[str, ...]:
    """The classes, as the weights say, or the dataset that the config names."""
    meta = said.get("dataset_meta") or {}
    classes = meta.get("classes") or meta.get("CLASSES") or said.get("CLASSES")
    if classes:
        return tuple(classes)
    from mmdet.registry import DATASETS

    kind = (config.get("test_dataloader") or {}).get("dataset", {}).get("type")
    known = DATASETS.get(kind) if isinstance(kind, str) else None
    return tuple((getattr(known, "METAINFO", None) or {}).get("classes", ()))
