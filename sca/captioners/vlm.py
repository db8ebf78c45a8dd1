"""Vision-language models prompted for one region of an image."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sca_registry.contracts import TASKS
from sca_registry.errors import make_unknown_name_error
from sca_registry.spec import DEFAULT_GENERATION
from torch import nn

from sca.captioners.image_text import CAPTION_ONLY_MODELS, ImageTextInput, ImageTextModel
from sca.captioners.region_captioner import (
    RegionCaptioner,
    RegionView,
    ScoredText,
    check_region_question,
    resolve_generation_options,
)
from sca.captioners.region_formats import (
    QUESTIONS,
    crop_region,
    draw_box,
    draw_outline,
    format_florence2_box,
    format_kosmos2_box,
    get_box,
)
from sca.inference.engine import EncodedImages
from sca.io.coordinates import Box

REGION_FORMATS = ("crop", "box", "outline", "region-tokens")
MODEL_QUESTIONS = {  # for architectures that do not take free-form questions
    ("florence2", "crop"): ("<CAPTION>", "<CAPTION>"),
    ("kosmos-2", "crop"): ("An image of", "An image of"),
}
TAG_PATTERN = re.compile(r"</?[a-z_]+\d*/?>")  # location and phrase tags in a generated text


class VisionLanguageModel(RegionCaptioner):
    """Captioner that prompts a model of transformers' AutoModelForImageTextToText with a question about a region.

    The box of a region is the box prompt, else the tight box of its mask.

    Args:
        encoder: Encoder whose segmenter predicts the masks of point prompts, see `RegionCaptioner`.
        weights: Hub id or folder, see `ImageTextModel`.
        revision: Revision of a Hub id.
        pretrained: Load `weights`; False for random weights.
        region_format: How the region is passed to the model. "crop" is the crop of the box. "box" is the full image
            with the box drawn in red, "outline" with the outline of the mask. "region-tokens" is the full image with
            the location tokens of the model: Florence-2's tasks REGION_TO_DESCRIPTION and, for recognition,
            REGION_TO_CATEGORY (arXiv 2311.06242), or Kosmos-2's grounded phrase (arXiv 2306.14824).
        question: Question for both tasks instead of the built-in ones. The chat template of the model is applied if it
            has one. Not available for "region-tokens".
        batch_size: Images per forward pass.
        config: Fields of the configuration, see `ImageTextModel`.
        device: Device of both models.
        dtype: Data type of the weights, see `ImageTextModel`.

    Raises:
        RegistryError: `region_format` is unknown.
        ValueError: The model takes no questions, or does not support `region_format`.
        InputError: The weights cannot be read.
    """

    def __init__(
        self,
        encoder: str | Mapping[str, Any] | None = None,
        weights: str | None = None,
        revision: str | None = None,
        pretrained: bool = True,
        region_format: str = "crop",
        question: str | None = None,
        batch_size: int = 16,
        config: Mapping[str, Any] | None = None,
        device: str = "cpu",
        dtype: str | None = None,
    ):
        if region_format not in REGION_FORMATS:
            raise make_unknown_name_error(f"region_format is {region_format!r}", region_format, REGION_FORMATS)
        super().__init__(encoder, device)
        self.image_text_model: ImageTextModel = ImageTextModel(
            weights, revision, pretrained, config, device, dtype, batch_size
        )
        model_type = self.image_text_model.model_type
        if model_type in CAPTION_ONLY_MODELS:
            raise ValueError(f"a {model_type!r} model takes no questions; use it with crop-captioner")
        if region_format == "region-tokens" and model_type not in REGION_TOKEN_FORMATTERS:
            raise ValueError(
                f"a {model_type!r} model has no location tokens; "
                f"{' and '.join(map(repr, REGION_TOKEN_FORMATTERS))} have. Use region_format=crop or region_format=box"
            )
        if region_format == "region-tokens" and question is not None:
            raise ValueError(
                "region_format=region-tokens has a fixed question; omit the option question, or use region_format=crop"
            )
        self.region_format = region_format
        self.model_key: tuple[str, str] = (model_type, region_format)
        self.task_questions: tuple[str, str] | None = (
            (question, question) if question else MODEL_QUESTIONS.get(self.model_key) or QUESTIONS.get(region_format)
        )
        self.metadata_options: dict[str, Any] = {
            "encoder": encoder,
            "region_format": region_format,
            "question": question,
        }

    @property
    def weight_modules(self) -> dict[str, nn.Module]:
        return {**super().weight_modules, "image_text_model": self.image_text_model.model}

    @property
    def generation_options(self) -> tuple[str, ...]:  # type: ignore[override]  # depends on the model
        """Names of the generation options that the model supports."""
        is_free_form = self.region_format in QUESTIONS and self.model_key not in MODEL_QUESTIONS
        return (*DEFAULT_GENERATION, *(["question"] if is_free_form else []))

    @property
    def metadata(self) -> dict[str, Any]:
        """Options and weights that identify the captioner in evaluation results."""
        return {"captioner": "vlm", **self.metadata_options, **self.image_text_model.metadata}

    def caption_regions(
        self, regions: Sequence[RegionView], task: str, encoded: EncodedImages, **generation: Any
    ) -> list[ScoredText]:
        """Generate one text per region, without location tags; see `RegionCaptioner`."""
        question = generation.pop("question", None)
        inputs = [self._build_input(view, TASKS.index(task), question) for view in regions]
        texts = self.image_text_model.generate_texts(inputs, **resolve_generation_options(generation))
        return [text._replace(text=" ".join(TAG_PATTERN.sub(" ", text.text).split())) for text in texts]

    def check_question(self, question: str) -> None:
        """Check a question.

        Args:
            question: Question.

        Raises:
            ValueError: The question is empty, or refers to several regions.
        """
        check_region_question(question)

    def _build_input(self, view: RegionView, task_index: int, question: str | None) -> ImageTextInput:
        if self.region_format == "region-tokens":
            format_prompt = REGION_TOKEN_FORMATTERS[self.image_text_model.model_type]
            return ImageTextInput(view.image, format_prompt(get_box(view), view.image.size, task_index))
        assert self.task_questions is not None  # see `__init__`
        if self.region_format == "crop":
            image = crop_region(view)
        else:
            image = draw_outline(view) if self.region_format == "outline" else draw_box(view.image, get_box(view))
        return ImageTextInput(image, question or self.task_questions[task_index])


def _format_florence2_prompt(box: Box, image_size: tuple[int, int], task_index: int) -> str:
    """Return Florence-2's task with the location tokens of a box."""
    task_token = ("<REGION_TO_CATEGORY>", "<REGION_TO_DESCRIPTION>")[task_index]
    return task_token + format_florence2_box(box, image_size)


def _format_kosmos2_prompt(box: Box, image_size: tuple[int, int], task_index: int) -> str:
    """Return Kosmos-2's grounded phrase with the location tokens of a box."""
    return f"<grounding><phrase> It</phrase>{format_kosmos2_box(box, image_size)} is"


REGION_TOKEN_FORMATTERS: dict[str, Callable[[Box, tuple[int, int], int], str]] = {
    "florence2": _format_florence2_prompt,
    "kosmos-2": _format_kosmos2_prompt,
}
