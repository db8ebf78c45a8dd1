"""OWLv2, which finds objects by phrases (arXiv 2306.09683)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from PIL import Image
from transformers import Owlv2ForObjectDetection

from sca.proposers.detector import Detections, Detector
from sca.proposers.phrases import check_num_tokens, parse_phrases


class Owlv2(Detector):
    """Proposer of the boxes that OWLv2 predicts for phrases. The name of a region is its phrase.

    Args:
        weights: Hub id or folder in transformers' format, see `Detector`.
        revision: Revision of the Hub id.
        pretrained: Load `weights`; False for random weights.
        config: Fields of the configuration for random weights, including `model_type`.
        text: Phrases to find, such as "red car".
        score_thresh: Minimum score.
        max_regions: Maximum number of regions, highest scores first.
        device: Device of the model.

    Raises:
        ImportError: scipy, which resizes the images, is not installed.
        InputError: The weights cannot be read, or have another model type.
        RegistryError: An option is out of range.
        ValueError: `text` is empty or too long.
    """

    model_class = Owlv2ForObjectDetection
    model_types = ("owlv2",)

    def __init__(
        self,
        weights: str | None = None,
        revision: str | None = None,
        pretrained: bool = True,
        config: Mapping[str, Any] | None = None,
        text: str | Sequence[str] = (),
        score_thresh: float = 0.1,
        max_regions: int = 100,
        device: str = "cpu",
    ):
        self.phrases: tuple[str, ...] = parse_phrases(text)
        import_module("scipy")  # an early error if it is missing
        super().__init__(weights, revision, pretrained, config, score_thresh, max_regions, device)
        check_num_tokens(
            self.processor.tokenizer, self.phrases, self.model.config.get_text_config().max_position_embeddings
        )

    def detect_regions(self, image: Image.Image) -> Detections:
        """Detect the phrases in an image. The processor pads it to a square, which predicted boxes refer to."""
        inputs = self.processor(text=[list(self.phrases)], images=image, return_tensors="pt").to(self.model.device)
        (result,) = self.processor.post_process_grounded_object_detection(
            self.model(**inputs),
            threshold=0.0,
            target_sizes=[(image.height, image.width)],
            text_labels=[list(self.phrases)],
        )
        return Detections(result["boxes"], result["scores"], result["text_labels"])
