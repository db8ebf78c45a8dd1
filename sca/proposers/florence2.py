"""Florence-2, which generates boxes as text (arXiv 2311.06242)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import Florence2ForConditionalGeneration

from sca.io.validation import check_choice, check_range
from sca.proposers.detector import Detections, Detector
from sca.proposers.phrases import parse_phrases

TEXT_TASK = "open-vocabulary-detection"
TASK_TOKENS = {  # by the value of the option `task`
    "region-proposal": "<REGION_PROPOSAL>",
    "dense-region-caption": "<DENSE_REGION_CAPTION>",
    "object-detection": "<OD>",
    TEXT_TASK: "<OPEN_VOCABULARY_DETECTION>",
}
GENERATION_OPTIONS = {"num_beams": 3, "no_repeat_ngram_size": 3, "early_stopping": True, "do_sample": False}


class Florence2(Detector):
    """Proposer of the boxes that Florence-2 generates, in the order of generation. All scores are 1.

    Args:
        weights: Hub id or folder in transformers' format, see `Detector`.
        revision: Revision of the Hub id.
        pretrained: Load `weights`; False for random weights.
        config: Fields of the configuration for random weights, including `model_type`.
        task: "region-proposal" (boxes without names), "dense-region-caption" (boxes with phrases), "object-detection"
            (boxes with class names) or "open-vocabulary-detection" (boxes of the phrases in `text`). Defaults to the
            last with `text`, else to the first.
        text: Phrases to find, such as "red car"; one pass of the model each.
        max_new_tokens: Maximum number of tokens to generate; a box takes four.
        max_regions: Maximum number of regions.
        device: Device of the model.

    Raises:
        InputError: The weights cannot be read, or have another model type.
        RegistryError: `task` is unknown, or an option is out of range.
        ValueError: `text` is empty, or does not suit the task.
    """

    model_class = Florence2ForConditionalGeneration
    model_types = ("florence2",)

    def __init__(
        self,
        weights: str | None = None,
        revision: str | None = None,
        pretrained: bool = True,
        config: Mapping[str, Any] | None = None,
        task: str | None = None,
        text: str | Sequence[str] = (),
        max_new_tokens: int = 1024,
        max_regions: int = 100,
        device: str = "cpu",
    ):
        self.task: str = task or (TEXT_TASK if text else "region-proposal")
        check_choice("task", self.task, TASK_TOKENS)
        if text and self.task != TEXT_TASK:
            raise ValueError(f"task={task} takes no text; omit it, or use task={TEXT_TASK}")
        check_range("max_new_tokens", max_new_tokens, int, 1)
        self.prompts: tuple[str, ...] = (TASK_TOKENS[self.task],)
        if self.task == TEXT_TASK:
            self.prompts = tuple(TASK_TOKENS[self.task] + phrase for phrase in parse_phrases(text))
        self.max_new_tokens = max_new_tokens
        super().__init__(weights, revision, pretrained, config, 0.0, max_regions, device)

    def detect_regions(self, image: Image.Image) -> Detections:
        """Generate the boxes of an image."""
        boxes: list[Sequence[float]] = []
        names: list[str] = []
        for prompt in self.prompts:
            answer = self._generate_regions(image, prompt)
            boxes += [*answer["bboxes"], *map(_compute_polygon_box, answer.get("polygons", ()))]
            names += [*answer.get("bboxes_labels", answer.get("labels", ())), *answer.get("polygons_labels", ())]
        return Detections(torch.tensor(boxes).reshape(-1, 4), torch.ones(len(boxes)), names)

    def _generate_regions(self, image: Image.Image, prompt: str) -> dict[str, Any]:
        inputs = self.processor(text=prompt, images=image, return_tensors="pt").to(self.model.device)
        token_ids = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, **GENERATION_OPTIONS)
        (text,) = self.processor.batch_decode(token_ids, skip_special_tokens=False)
        task_token = TASK_TOKENS[self.task]
        return self.processor.post_process_generation(text, task=task_token, image_size=image.size)[task_token]


def _compute_polygon_box(polygons: Sequence[Sequence[float]]) -> list[float]:
    """Return the bounding box x1 y1 x2 y2 of the polygons [x, y, x, y, ...] of a region."""
    xs, ys = ([value for polygon in polygons for value in polygon[start::2]] for start in (0, 1))
    return [min(xs), min(ys), max(xs), max(ys)]
