"""Base of the proposers that run a detection model of transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from sca_registry.contracts import Prompt, Proposals
from torch import Tensor

from sca.io.dummy_processors import build_dummy_processor
from sca.io.hub import (
    check_model_type,
    fetch_model_folder,
    initialize_model,
    load_pretrained,
    make_config,
    silence_transformers,
)
from sca.io.processors import load_processor
from sca.io.validation import check_range
from sca.io.weight_files import hash_tensors

MIN_BOX_SIZE = 1  # pixels per side


class Detections(NamedTuple):
    """Detections in one image.

    Attributes:
        boxes: (N, 4) x1 y1 x2 y2 in image pixels; they may exceed the image.
        scores: (N,) scores.
        names: Class name or phrase of each detection; None if it has none.
        masks: (N, height, width) bool; None if the model predicts none.
    """

    boxes: Tensor
    scores: Tensor
    names: Sequence[str | None]
    masks: Tensor | None = None


class Detector(ABC):
    """Proposer that runs a model of transformers. Subclasses implement `detect_regions`.

    Args:
        weights: Hub id or folder in transformers' format.
        revision: Revision of the Hub id.
        pretrained: Load `weights`; False for random weights with a fixed seed.
        config: Fields of the configuration for random weights, including `model_type`.
        score_thresh: Minimum score.
        max_regions: Maximum number of regions, highest scores first.
        device: Device of the model.

    Attributes:
        model_class: Model class of transformers.
        model_types: Accepted model types of the weights.
        shown_types: Model types that error messages name; empty for all.
        model: The model.
        processor: Its processor.

    Raises:
        InputError: The weights cannot be read, or have another model type.
        RegistryError: An option is out of range.
        ValueError: Neither `weights` nor `config` is set.
    """

    model_class: Any
    model_types: Collection[str]
    shown_types: Collection[str] = ()

    def __init__(
        self,
        weights: str | None,
        revision: str | None,
        pretrained: bool,
        config: Mapping[str, Any] | None,
        score_thresh: float,
        max_regions: int,
        device: str,
    ):
        check_range("score_thresh", score_thresh, float, 0, 1)
        check_range("max_regions", max_regions, int, 1)
        self.score_thresh, self.max_regions = score_thresh, max_regions
        if pretrained:
            if weights is None:
                raise ValueError("no weights; set weights to a folder or a Hub id, or pretrained=false")
            check_model_type(weights, revision, self.model_types, self.shown_types)
            # Any unused tensor is ignored, such as old buffers and other heads.
            model = load_pretrained(self.model_class, weights, revision, ("",), dtype=torch.float32)
            self.processor: Any = self.load_processor(fetch_model_folder(weights, revision))
        else:
            model = initialize_model(self.model_class, make_config(weights, revision, config))
            self.processor = self.build_processor(model.config)
        self.model: Any = model.to(device).eval()

    def load_processor(self, folder: Path) -> Any:
        """Load the processor stored with the weights."""
        return load_processor(folder)

    def build_processor(self, config: Any) -> Any:
        """Build a processor for random weights."""
        return build_dummy_processor(config)

    @property
    def weights_hash(self) -> str:
        """SHA-256 of the weights."""
        return hash_tensors(self.model.state_dict())

    @abstractmethod
    def detect_regions(self, image: Image.Image) -> Detections:
        """Detect regions in an RGB image, in any order and of any score."""

    @torch.inference_mode()
    def __call__(self, image: Image.Image, image_id: int | str) -> Proposals:
        """Return the regions with the highest scores, best first, with boxes of at least 1 pixel per side."""
        with silence_transformers():
            detections = self.detect_regions(image.convert("RGB"))
        return select_proposals(detections, image.size, self.score_thresh, self.max_regions)


def select_proposals(
    detections: Detections, image_size: tuple[int, int], score_thresh: float, max_regions: int
) -> Proposals:
    """Select detections by score and convert them to proposals.

    Args:
        detections: Detections in any order.
        image_size: Width and height of the image. Boxes are clipped to it.
        score_thresh: Minimum score.
        max_regions: Maximum number of regions.

    Returns:
        The regions with the highest scores, best first. The prompt of a detection with a mask is its mask, else its
        box. Boxes smaller than 1 pixel per side and empty masks are left out.
    """
    boxes, scores = detections.boxes.float().cpu(), detections.scores.float().cpu()
    boxes = boxes.clamp(min=0).minimum(boxes.new_tensor(image_size * 2))
    is_kept = scores >= score_thresh
    if detections.masks is None:
        is_kept &= ((boxes[:, 2:] - boxes[:, :2]) >= MIN_BOX_SIZE).all(1)
    else:
        is_kept &= detections.masks.flatten(1).any(1).cpu()
    order = scores.masked_fill(~is_kept, -1).argsort(descending=True, stable=True)
    rows = order[: min(max_regions, int(is_kept.sum()))].tolist()
    prompts = [
        Prompt(box=tuple(boxes[row].tolist()))
        if detections.masks is None
        else Prompt(mask=_to_array(detections.masks[row]))
        for row in rows
    ]
    return Proposals(
        tuple(prompts),
        tuple(float(scores[row]) for row in rows),
        tuple(detections.names[row] or None for row in rows),
    )


def _to_array(mask: Tensor) -> np.ndarray:
    return mask.bool().cpu().numpy()
