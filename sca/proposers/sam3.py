"""SAM 3, which segments all objects that match a phrase or example boxes (arXiv 2511.16719)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sca_registry.contracts import Prompt
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import Sam3Model, Sam3Processor

from sca.io.prompts import check_prompt
from sca.io.weight_files import translate_load_errors
from sca.proposers.detector import Detections, Detector
from sca.proposers.phrases import check_num_tokens, parse_phrases

MASK_THRESHOLD = 0.5  # probability above which a pixel belongs to a mask


class Sam3(Detector):
    """Proposer of the masks that SAM 3 predicts for phrases, for example boxes, or for both together.

    The name of a region is its phrase.

    Args:
        weights: Hub id or folder in transformers' format, see `Detector`. The detector of SAM 3's video model is also
            accepted.
        revision: Revision of the Hub id.
        pretrained: Load `weights`; False for random weights.
        config: Fields of the configuration for random weights, including `model_type`.
        text: Phrases to find, such as "red car".
        boxes: Boxes x1, y1, x2, y2 of example objects in pixels of each image.
        box_labels: 1 for an object to find, 0 for one to exclude, for each box. Defaults to 1.
        score_thresh: Minimum score.
        max_regions: Maximum number of regions, highest scores first.
        device: Device of the model.

    Raises:
        ImportError: torchvision, which the model requires, is not installed.
        InputError: The weights cannot be read, or have another model type. Calls raise it for an image that does not
            contain a box.
        RegistryError: An option is out of range.
        ValueError: A box or a label is invalid, `text` is too long, or there are neither `text` nor `boxes`.
    """

    model_class = Sam3Model
    model_types = ("sam3", "sam3_video")

    def __init__(
        self,
        weights: str | None = None,
        revision: str | None = None,
        pretrained: bool = True,
        config: Mapping[str, Any] | None = None,
        text: str | Sequence[str] = (),
        boxes: Sequence[Sequence[float]] = (),
        box_labels: Sequence[int] = (),
        score_thresh: float = 0.5,
        max_regions: int = 100,
        device: str = "cpu",
    ):
        _check_boxes(boxes, box_labels)
        self.phrases: tuple[str | None, ...] = parse_phrases(text) if text or not boxes else (None,)
        self.boxes: list[list[float]] = [list(map(float, box)) for box in boxes]
        self.box_labels: list[int] = list(box_labels) or [1] * len(boxes)
        import_module("torchvision")  # an early error if it is missing
        super().__init__(weights, revision, pretrained, config, score_thresh, max_regions, device)
        texts = [phrase for phrase in self.phrases if phrase is not None]
        max_tokens = self.model.config.get_text_config().max_position_embeddings
        check_num_tokens(self.processor.tokenizer, texts, max_tokens)

    def load_processor(self, folder: Path) -> Any:
        with translate_load_errors(f"the processor in {folder}"):
            return Sam3Processor.from_pretrained(folder)

    def detect_regions(self, image: Image.Image) -> Detections:
        """Segment the objects of all phrases in an image, which is encoded once."""
        boxes = [_clip_box(box, image.size) for box in self.boxes]
        inputs = self.processor(images=image, return_tensors="pt").to(self.model.device)
        features = self.model.get_vision_features(inputs["pixel_values"])
        detections = [
            self._segment_phrase(phrase, boxes, inputs["original_sizes"], features) for phrase in self.phrases
        ]
        return Detections(
            torch.cat([each.boxes for each in detections]),
            torch.cat([each.scores for each in detections]),
            [name for each in detections for name in each.names],
            torch.cat([each.masks for each in detections if each.masks is not None]),
        )

    def _segment_phrase(
        self, phrase: str | None, example_boxes: list[list[float]], original_sizes: Tensor, features: Any
    ) -> Detections:
        """Segment the objects above the score threshold."""
        prompts = {"input_boxes": [example_boxes], "input_boxes_labels": [self.box_labels]} if example_boxes else {}
        inputs = self.processor(text=phrase, original_sizes=original_sizes, return_tensors="pt", **prompts)
        inputs = {name: value.to(self.model.device) for name, value in inputs.items() if name != "original_sizes"}
        outputs = self.model(vision_embeds=features, **inputs)
        scores = (outputs.pred_logits.sigmoid() * outputs.presence_logits.sigmoid())[0]
        (size,) = original_sizes.tolist()
        rows = (scores >= self.score_thresh).nonzero()[:, 0]
        boxes = outputs.pred_boxes[0, rows].cpu() * torch.tensor([size[1], size[0]] * 2)
        masks = [*_iter_masks(outputs.pred_masks[0, rows], size)]
        stacked_masks = torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.bool)
        return Detections(boxes, scores[rows], [phrase] * len(rows), stacked_masks)


def _iter_masks(logits: Tensor, size: Sequence[int]) -> Iterator[Tensor]:
    """Yield the mask (height, width) of each object, resized one by one to limit memory."""
    for each in logits.float():
        probabilities = interpolate(each.sigmoid()[None, None], size=tuple(size), mode="bilinear", align_corners=False)
        yield (probabilities[0, 0] > MASK_THRESHOLD).cpu()


def _clip_box(box: Sequence[float], image_size: tuple[int, int]) -> list[float]:
    """Clip an example box to an image; raise InputError if it is outside."""
    x1, y1, x2, y2 = box
    return [*(check_prompt(Prompt(box=(x1, y1, x2, y2)), *image_size).box or box)]


def _check_boxes(boxes: Sequence[Sequence[float]], labels: Sequence[int]) -> None:
    for box in boxes:
        is_box = isinstance(box, Sequence) and len(box) == 4 and all(isinstance(each, int | float) for each in box)
        if not is_box or not (box[0] < box[2] and box[1] < box[3]):
            raise ValueError(f"boxes contains {box!r:.80}; write boxes as [[x1, y1, x2, y2]] in pixels, with x1 < x2")
    if labels and (len(labels) != len(boxes) or not all(label in (0, 1) for label in labels)):
        raise ValueError(f"box_labels is {labels!r:.80}; set 1 or 0 for each of the {len(boxes)} boxes")
