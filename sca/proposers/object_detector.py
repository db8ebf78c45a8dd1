"""Object detectors with a fixed set of classes, from transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoModelForObjectDetection
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

from sca.io.dummy_processors import build_dummy_image_processor
from sca.io.processors import load_image_processor
from sca.proposers.detector import Detections, Detector


class ObjectDetector(Detector):
    """Proposer of the boxes of any model of transformers' AutoModelForObjectDetection, with their class names.

    Args:
        weights: Hub id or folder in transformers' format, see `Detector`.
        revision: Revision of the Hub id.
        pretrained: Load `weights`; False for random weights.
        config: Fields of the configuration for random weights, including `model_type`.
        score_thresh: Minimum score.
        max_regions: Maximum number of regions, highest scores first.
        device: Device of the model.

    Raises:
        InputError: The weights cannot be read, or have another model type.
        RegistryError: An option is out of range.
        ValueError: Neither `weights` nor `config` is set.
    """

    model_class = AutoModelForObjectDetection
    model_types = MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
    shown_types = ("detr", "rt_detr", "rt_detr_v2", "d_fine")

    def __init__(
        self,
        weights: str | None = None,
        revision: str | None = None,
        pretrained: bool = True,
        config: Mapping[str, Any] | None = None,
        score_thresh: float = 0.5,
        max_regions: int = 100,
        device: str = "cpu",
    ):
        super().__init__(weights, revision, pretrained, config, score_thresh, max_regions, device)

    def load_processor(self, folder: Path) -> Any:
        return load_image_processor(folder)

    def build_processor(self, config: Any) -> Any:
        return build_dummy_image_processor(config)

    def detect_regions(self, image: Image.Image) -> Detections:
        """Detect the objects of all classes in an image."""
        inputs = self.processor(image, return_tensors="pt").to(self.model.device)
        (result,) = self.processor.post_process_object_detection(
            self.model(**inputs), threshold=0.0, target_sizes=[(image.height, image.width)]
        )
        class_names = self.model.config.id2label
        names = [class_names.get(label) for label in result["labels"].tolist()]
        return Detections(result["boxes"], result["scores"], names)
