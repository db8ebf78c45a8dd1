"""Vision-language models prompted for one region of an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sca_registry.contracts import TASKS
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
    COORDINATE_FORMATS,
    check_region_placeholder,
    crop_region,
    draw_box,
    draw_outline,
    get_box,
    get_questions,
    insert_coordinates,
    remove_coordinates,
    resize_for_coordinates,
    resolve_context,
)
from sca.inference.engine import EncodedImages
from sca.io.validation import check_choice

REGION_FORMATS = ("crop", "box", "outline", "coordinates")
TASK_PROMPT_MODELS = ("florence2", "kosmos-2")  # model types whose crops and coordinates have prompts of fixed tasks
TASK_PROMPT_FORMATS = ("crop", "coordinates")


class VisionLanguageModel(RegionCaptioner):
    """Captioner that prompts a model of transformers' AutoModelForImageTextToText with a question about a region.

    The box of a region is the box prompt, else the tight box of its mask.

    Args:
        encoder: Encoder whose segmenter predicts the masks of point prompts, see `RegionCaptioner`.
        weights: Hub id or folder, see `ImageTextModel`.
        revision: Revision of a Hub id.
        pretrained: Load `weights`; False for random weights.
        region_format: How the region is shown, as for the captioner `openai`. "crop" is the crop of the box with
            `context`. "box" and "outline" are the full image with the box or the outline of the mask drawn in red.
            "coordinates" is the full image, with the box as text in the notation that the family was trained on, see
            `COORDINATE_FORMATS`.
        context: Sides of a crop as multiples of those of the box, 1.5 by default. Requires `region_format="crop"`.
        question: Question for both tasks instead of the built-in ones. "{region}" is replaced by the coordinates, which
            otherwise follow the question. The chat template of the model is applied if it has one. Not available for
            the tasks of Florence-2 and Kosmos-2.
        batch_size: Images per forward pass.
        config: Fields of the configuration, see `ImageTextModel`.
        device: Device of both models.
        precision: Precision of the weights, see `ImageTextModel`.

    Raises:
        RegistryError: `region_format` is unknown, or `context` is out of range.
        ValueError: The model takes no questions, or does not support `region_format`, or an option does not fit it.
        InputError: The weights cannot be read.
    """

    def __init__(
        self,
        encoder: str | Mapping[str, Any] | None = None,
        weights: str | None = None,
        revision: str | None = None,
        pretrained: bool = True,
        region_format: str = "crop",
        context: float | None = None,
        question: str | None = None,
        batch_size: int = 16,
        config: Mapping[str, Any] | None = None,
        device: str = "cpu",
        precision: str | None = None,
    ):
        check_choice("region_format", region_format, REGION_FORMATS)
        self.context: float = resolve_context(context, region_format)
        super().__init__(encoder, device)
        self.image_text_model: ImageTextModel = ImageTextModel(
            weights, revision, pretrained, config, device, precision, batch_size
        )
        model_type = self.image_text_model.model_type
        if model_type in CAPTION_ONLY_MODELS:
            raise ValueError(f"a {model_type!r} model takes no questions; use it with crop-captioner")
        if region_format == "coordinates" and model_type not in COORDINATE_FORMATS:
            raise ValueError(
                f"a {model_type!r} model does not support region_format=coordinates; use crop, box or outline"
            )
        self.region_format = region_format
        self.has_task_prompts: bool = model_type in TASK_PROMPT_MODELS and region_format in TASK_PROMPT_FORMATS
        if question is not None:
            if self.has_task_prompts:
                raise ValueError(
                    f"region_format={region_format} has a fixed prompt for a {model_type!r} model; omit the option "
                    "question, or use region_format=box"
                )
            self.check_question(question)
        self.task_questions: tuple[str, str] = (
            (question, question) if question is not None else get_questions(model_type, region_format)
        )
        self.metadata_options: dict[str, Any] = {
            "encoder": encoder,
            "region_format": region_format,
            **({"context": self.context} if region_format == "crop" else {}),
            "question": question,
        }

    @property
    def weight_modules(self) -> dict[str, nn.Module]:
        return {**super().weight_modules, "image_text_model": self.image_text_model.model}

    @property
    def generation_options(self) -> tuple[str, ...]:  # type: ignore[override]  # depends on the model
        """Names of the generation options that the model supports."""
        return (*DEFAULT_GENERATION, *([] if self.has_task_prompts else ["question"]))

    @property
    def metadata(self) -> dict[str, Any]:
        """Options and weights that identify the captioner in evaluation results."""
        return {"captioner": "vlm", **self.metadata_options, **self.image_text_model.metadata}

    def caption_regions(
        self, regions: Sequence[RegionView], task: str, encoded: EncodedImages, **generation: Any
    ) -> list[ScoredText]:
        """Generate one text per region, without coordinates; see `RegionCaptioner`."""
        question = generation.pop("question", None) or self.task_questions[TASKS.index(task)]
        inputs = [self._build_input(view, question) for view in regions]
        texts = self.image_text_model.generate_texts(inputs, **resolve_generation_options(generation))
        model_type = self.image_text_model.model_type
        return [text._replace(text=remove_coordinates(text.text, model_type)) for text in texts]

    def check_question(self, question: str) -> None:
        """Check a question.

        Args:
            question: Question.

        Raises:
            ValueError: The question is empty, refers to several regions, or contains "{region}" although the region is
                not shown by coordinates.
        """
        check_region_question(question)
        check_region_placeholder(question, self.region_format)

    def _build_input(self, view: RegionView, question: str) -> ImageTextInput:
        if self.region_format == "crop":
            return ImageTextInput(crop_region(view, self.context), question)
        if self.region_format == "box":
            return ImageTextInput(draw_box(view.image, get_box(view)), question)
        if self.region_format == "outline":
            return ImageTextInput(draw_outline(view), question)
        coordinate_format = COORDINATE_FORMATS[self.image_text_model.model_type].adapt_to_processor(
            self.image_text_model.processor.image_processor
        )
        image, coordinates = resize_for_coordinates(view, coordinate_format)
        return ImageTextInput(image, insert_coordinates(question, coordinates))
