"""Grounding DINO, which finds objects by phrases (arXiv 2303.05499)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from transformers import AutoModelForZeroShotObjectDetection

from sca.io.validation import check_range
from sca.proposers.detector import Detections, Detector
from sca.proposers.phrases import check_num_tokens, join_phrases, parse_phrases


class GroundingDino(Detector):
    """Proposer of the boxes that Grounding DINO predicts for phrases.

    The name of a region consists of the words of its phrase whose score exceeds `text_thresh`.

    Args:
        weights: Hub id or folder in transformers' format, see `Detector`. MM Grounding DINO is also accepted.
        revision: Revision of the Hub id.
        pretrained: Load `weights`; False for random weights.
        config: Fields of the configuration for random weights, including `model_type`.
        text: Phrases to find, such as "red car". They are converted to lower case. A period separates phrases.
        score_thresh: Minimum score of a box.
        text_thresh: Minimum score of a word in the name of a region.
        max_regions: Maximum number of regions, highest scores first.
        device: Device of the model.

    Raises:
        InputError: The weights cannot be read, or have another model type.
        RegistryError: An option is out of range.
        ValueError: `text` is empty or too long.
    """

    model_class = AutoModelForZeroShotObjectDetection
    model_types = ("grounding-dino", "mm-grounding-dino")

    def __init__(
        self,
        weights: str | None = None,
        revision: str | None = None,
        pretrained: bool = True,
        config: Mapping[str, Any] | None = None,
        text: str | Sequence[str] = (),
        score_thresh: float = 0.25,
        text_thresh: float = 0.25,
        max_regions: int = 100,
        device: str = "cpu",
    ):
        self.text: str = join_phrases(parse_phrases(text))
        check_range("text_thresh", text_thresh, float, 0, 1)
        self.text_thresh = text_thresh
        super().__init__(weights, revision, pretrained, config, score_thresh, max_regions, device)
        check_num_tokens(self.processor.tokenizer, [self.text], self.model.config.max_text_len)

    def detect_regions(self, image: Image.Image) -> Detections:
        """Detect the phrases in an image."""
        inputs = self.processor(text=self.text, images=image, return_tensors="pt").to(self.model.device)
        (result,) = self.processor.post_process_grounded_object_detection(
            self.model(**inputs),
            inputs["input_ids"],
            threshold=0.0,
            text_threshold=self.text_thresh,
            target_sizes=[(image.height, image.width)],
        )
        return Detections(result["boxes"], result["scores"], result["text_labels"])
