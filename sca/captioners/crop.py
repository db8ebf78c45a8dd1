"""Crops of regions before an image captioner: SCA's first baseline (arXiv 2312.00869, section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
    """The tight box of a region's mask, cut out of the image with its background, and captioned as a picture by itself.

    As published, SAM's three masks for a prompt are captioned each and the text of the one with the highest predicted
    IoU is kept. The others never matter, so only that one is captioned: the same text at a third of the cost. A box has
    2 pixels a side or more, an empty mask 2 x 2 at the image's corner.

    weights, revision, pretrained, config, dtype, batch_size: see `ImageTextModel`. encoder: predicts the masks,
    see `RegionCaptioner`. vcot: asks twice, as Caption Anything does (arXiv 2305.02677): what the region is,
    with everything but its mask white, and then for a description of the answer in the plain crop; for models that
    answer questions.
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
        dtype: str | None = None,
    ):
        super().__init__(encoder, device)
        self.image_text_model = ImageTextModel(weights, revision, pretrained, config, device, dtype, batch_size)
        if vcot and self.image_text_model.model_type in CAPTION_ONLY_MODELS:
            raise ValueError(
                f"vcot asks questions, and a {self.image_text_model.model_type!r} model answers none: take "
                "blip2-opt-2.7b or another model that reads questions"
            )
        self.vcot = vcot
        self.fact_options = {"encoder": encoder, "vcot": vcot}

    @property
    def facts(self) -> dict[str, Any]:
        return {"captioner": "crop", **self.fact_options, **self.image_text_model.facts}

    def caption_regions(
        self, regions: Sequence[RegionView], task: str, encoded: EncodedImages, **generation: Any
    ) -> list[ScoredText]:
        """The task makes no difference: a captioner of pictures knows one."""
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
