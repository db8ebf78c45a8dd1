"""Vision-language models prompted for one region of an image."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw
from sca_registry.contracts import TASKS, list_region_references
from sca_registry.errors import make_unknown_name_error
from sca_registry.spec import DEFAULT_GENERATION
from torch import nn
from transformers.models.kosmos2.processing_kosmos2 import coordinate_to_patch_index

from sca.captioners.image_text import CAPTION_ONLY_MODELS, ImageTextInput, ImageTextModel
from sca.captioners.region_captioner import (
    Box,
    RegionCaptioner,
    RegionView,
    ScoredText,
    box_to_pixels,
    crop_image,
    resolve_generation_options,
)
from sca.inference.engine import EncodedImages

BOX_COLOR = (255, 0, 0)
LINE_WIDTH_DIVISOR = 150  # line width of a drawn box: the image's longer side divided by this
REGION_FORMATS = ("crop", "box", "region-tokens")
QUESTIONS = {  # by region format: for recognition, and for a caption
    "crop": ("What is in this picture? Answer with its name alone.", "Describe this picture in one short phrase."),
    "box": (
        "What is inside the red box? Answer with its name alone.",
        "Describe what is inside the red box in one short phrase.",
    ),
}
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
            with the box drawn in red. "region-tokens" is the full image with the location tokens of the model:
            Florence-2's tasks REGION_TO_DESCRIPTION and, for recognition, REGION_TO_CATEGORY (arXiv 2311.06242), or
            Kosmos-2's grounded phrase (arXiv 2306.14824).
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
        if not question.strip():
            raise ValueError("the question is empty; pass a text such as 'what color is it?'")
        if list_region_references(question):
            raise ValueError("this captioner does not support region references such as <region 1>; remove them")

    def _build_input(self, view: RegionView, task_index: int, question: str | None) -> ImageTextInput:
        box = view.prompt.box or view.tight_box
        if self.region_format == "region-tokens":
            return ImageTextInput(
                view.image, REGION_TOKEN_FORMATTERS[self.image_text_model.model_type](box, view.image.size, task_index)
            )
        assert self.task_questions is not None  # see `__init__`
        image = crop_image(view, box) if self.region_format == "crop" else draw_box(view.image, box)
        return ImageTextInput(image, question or self.task_questions[task_index])


def draw_box(image: Image.Image, box: Box) -> Image.Image:
    """Return a copy of an image with a red outline around a box x1 y1 x2 y2, drawn outside of its edges."""
    x1, y1, x2, y2 = box_to_pixels(box, image.size)
    line_width = max(2, round(max(image.size) / LINE_WIDTH_DIVISOR))
    annotated = image.copy()
    outline = (x1 - line_width, y1 - line_width, x2 + line_width - 1, y2 + line_width - 1)
    ImageDraw.Draw(annotated).rectangle(outline, outline=BOX_COLOR, width=line_width)
    return annotated


def _format_florence2_tokens(box: Box, image_size: tuple[int, int], task_index: int) -> str:
    """Return Florence-2's task with the corners of a box in thousandths of the image sides."""
    width, height = image_size
    fractions = (box[0] / width, box[1] / height, box[2] / width, box[3] / height)
    location_tokens = "".join(f"<loc_{min(max(int(fraction * 1000), 0), 999)}>" for fraction in fractions)
    return ("<REGION_TO_CATEGORY>", "<REGION_TO_DESCRIPTION>")[task_index] + location_tokens


def _format_kosmos2_tokens(box: Box, image_size: tuple[int, int], task_index: int) -> str:
    """Return Kosmos-2's grounded phrase with the cells of a 32 x 32 grid that contain the corners of a box."""
    x1, y1, x2, y2 = box_to_pixels(box, image_size)
    width, height = image_size
    first, last = coordinate_to_patch_index((x1 / width, y1 / height, x2 / width, y2 / height), 32)
    tokens = f"<patch_index_{first:04d}><patch_index_{last:04d}>"
    return f"<grounding><phrase> It</phrase><object>{tokens}</object> is"


REGION_TOKEN_FORMATTERS: dict[str, Callable[[Box, tuple[int, int], int], str]] = {
    "florence2": _format_florence2_tokens,
    "kosmos-2": _format_kosmos2_tokens,
}
