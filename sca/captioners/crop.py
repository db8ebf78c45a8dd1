"""Image captioning of region crops: the first baseline of SCA (arXiv 2312.00869, section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from sca.captioners.image_text import CAPTION_ONLY_MODELS, ImageTextInput, ImageTextModel
from sca.captioners.region_captioner import (
    RegionCaptioner,
    RegionView,
    ScoredText,
    crop_image,
    resolve_generation_options,
)
from sca.inference.engine import EncodedImages

NAME_QUESTION = "Question: what is the thing that is not white? Answer:"
DESCRIPTION_QUESTION = "Question: how would you describe {answer} in this picture? Answer:"
FALLBACK_ANSWER = "the region"


class CropCaptioner(RegionCaptioner):
    """Captioner that crops the tight box of a region's mask, background included, and captions the crop as an image.

    The baseline of the paper captions each of SAM's three masks per prompt and keeps the text of the mask with the
    highest predicted IoU. Only that mask is captioned here: the same text at a third of the cost. Crops have at least 2
    pixels per side; an empty mask yields the 2 x 2 pixels at the top left corner of the image.

    Args:
        encoder: Encoder whose segmenter predicts the masks, see `RegionCaptioner`.
        weights: Hub id or folder, see `ImageTextModel`.
        revision: Revision of a Hub id.
        pretrained: Load `weights`; False for random weights.
        vcot: Prompt the model twice, as Caption Anything does (arXiv 2305.02677): first for the name of the region,
            with all pixels outside its mask white, then for a description of that name in the plain crop. Requires a
            model that takes questions.
        batch_size: Images per forward pass.
        config: Fields of the configuration, see `ImageTextModel`.
        device: Device of both models.
        precision: Precision of the weights, see `ImageTextModel`.

    Raises:
        ValueError: `vcot` is set for a model that only captions, or an option is invalid.
        InputError: The weights cannot be read.
    """

    def __init__(
        self,
        encoder: str | Mapping[str, Any] | None = None,
        weights: str | None = None,
        revision: str | None = None,
        pretrained: bool = True,
        vcot: bool = False,
        batch_size: int = 64,
        config: Mapping[str, Any] | None = None,
        device: str = "cpu",
        precision: str | None = None,
    ):
        super().__init__(encoder, device)
        self.image_text_model: ImageTextModel = ImageTextModel(
            weights, revision, pretrained, config, device, precision, batch_size
        )
        if vcot and self.image_text_model.model_type in CAPTION_ONLY_MODELS:
            raise ValueError(
                f"vcot requires a model that takes questions, which {self.image_text_model.model_type!r} does not; use "
                "blip2-opt-2.7b or a similar model"
            )
        self.vcot = vcot
        self.metadata_options: dict[str, Any] = {"encoder": encoder, "vcot": vcot}

    @property
    def weight_modules(self) -> dict[str, nn.Module]:
        return {**super().weight_modules, "image_text_model": self.image_text_model.model}

    @property
    def metadata(self) -> dict[str, Any]:
        """Options and weights that identify the captioner in evaluation results."""
        return {"captioner": "crop", **self.metadata_options, **self.image_text_model.metadata}

    def caption_regions(
        self, regions: Sequence[RegionView], task: str, encoded: EncodedImages, **generation: Any
    ) -> list[ScoredText]:
        """Caption the crops of regions; image captioners have a single task, so `task` has no effect."""
        generation_options = resolve_generation_options(generation)
        texts: list[str | None] = [None] * len(regions)
        if self.vcot:
            masked_inputs = [
                ImageTextInput(crop_image(view, view.tight_box, white_background=True), NAME_QUESTION)
                for view in regions
            ]
            answers = self.image_text_model.generate_texts(masked_inputs, **generation_options)
            texts = [DESCRIPTION_QUESTION.format(answer=answer or FALLBACK_ANSWER) for answer, *_ in answers]
        crops = [crop_image(view, view.tight_box) for view in regions]
        return self.image_text_model.generate_texts(
            [ImageTextInput(*each) for each in zip(crops, texts, strict=True)], **generation_options
        )
