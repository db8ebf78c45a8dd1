"""What baselines share: from what is pointed at to the box and mask that they look at."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import sca_registry
import torch
from PIL import Image
from sca_registry import RegistryError, zoo
from sca_registry.contracts import Caption, Prompt, TokenUsage
from sca_registry.errors import make_unknown_name_error
from sca_registry.spec import DEFAULT_GENERATION, Part

from sca.builder import resolve_parts
from sca.checkpoints.load import HUB_ID_PATTERN, load
from sca.inference.engine import EncodedImages, MaskEngine, PredictedMask
from sca.inference.prompt_arguments import check_task
from sca.io.coordinates import Box
from sca.io.hub import find_local_folder
from sca.io.masks import RLE, decode_rle, encode_rle, mask_to_box
from sca.model import SegmentationModel

TRUST_OPTIONS = ("trust_remote_code", "allow_external", "revision")  # that `sca.load` takes


class RegionView(NamedTuple):
    """A region as a baseline sees it; image pixels."""

    image_index: int  # which of the images that were shown together
    image: Image.Image
    prompt: Prompt
    mask: RLE | None
    predicted_iou: float | None  # predicted, where a segmenter gave the mask

    @property
    def tight_box(self) -> Box:
        """The tight box of the mask that was found, without one the prompt's, else that of its mask; nothing at the
        image's corner if the mask is empty.
        """
        if self.prompt.box is not None and self.predicted_iou is None:
            return self.prompt.box
        return mask_to_box(self.mask) or (0.0, 0.0, 0.0, 0.0)


class ScoredText(NamedTuple):
    """What a baseline says of a region."""

    text: str
    score: float
    usage: TokenUsage | None = None  # None where no language model wrote the text


class RegionCaptioner(MaskEngine):
    """Find the region of each prompt; subclasses write the captions in `caption_regions`.

    encoder: the name of an encoder that brings a segmenter with masks, such as a SAM, or a table of its name and
    options; or a checkpoint, whose encoder and segmenter are taken. A region is then the best of the masks that the
    segmenter gives for the prompt. Without one it is the prompt's box, or else its mask, and a point is refused.
    """

    generation_options = tuple(DEFAULT_GENERATION)  # accepted by `resolve_generation_options`

    def __init__(self, encoder: str | Mapping[str, Any] | None, device: str | torch.device, masks: bool = True):
        model, self.has_masks = (None, False) if encoder is None else build_segmentation_model(encoder, device)
        if masks and model is not None and not self.has_masks:
            raise ValueError(
                f"the encoder {Part.from_dict(encoder).name!r} brings a segmenter without masks, and masks cut regions "
                "out: take a SAM, such as sam-vit-b, or none"
            )
        super().__init__(model)

    @abstractmethod
    def caption_regions(
        self, regions: Sequence[RegionView], task: str, encoded: EncodedImages, **generation: Any
    ) -> list[ScoredText]:
        """A text and a score for each region of the images in `encoded`."""

    def caption_batch(
        self,
        encoded: EncodedImages,
        requests: Sequence[Sequence[Prompt]],
        task: str = "caption",
        *,
        return_masks: bool = True,
        **generation: Any,
    ) -> list[list[Caption]]:
        views = iter(self._find_regions(encoded, requests))
        regions = [[next(views) for _ in request] for request in requests]
        return self._build_captions(regions, task, encoded, generation)

    def caption_masks(
        self,
        encoded: EncodedImages,
        masks: Sequence[PredictedMask],
        prompts: Sequence[Prompt],
        task: str = "caption",
        **generation: Any,
    ) -> list[Caption]:
        (image,) = encoded.images
        regions = [RegionView(0, image, prompt, *mask) for prompt, mask in zip(prompts, masks, strict=True)]
        return self._build_captions([regions], task, encoded, generation)[0]

    def _find_regions(self, encoded: EncodedImages, requests: Sequence[Sequence[Prompt]]) -> list[RegionView]:
        images_and_requests = enumerate(zip(encoded.images, requests, strict=True))
        prompted = [
            (image_index, image, prompt) for image_index, (image, request) in images_and_requests for prompt in request
        ]
        if self.has_masks:
            masks = self.predict_best_masks(encoded, requests)
            return [RegionView(*each, *mask) for each, mask in zip(prompted, masks, strict=True)]
        if any(prompt.box is None and prompt.mask is None for *_, prompt in prompted):
            raise ValueError(
                "a point is no region yet, and nothing here finds the region it means: write encoder+captioner with an "
                "encoder that brings masks, sam-vit-b+NAME, or give a box or a mask"
            )
        rles = [None if prompt.mask is None else encode_rle(prompt.mask) for *_, prompt in prompted]
        return [RegionView(*each, rle, None) for each, rle in zip(prompted, rles, strict=True)]

    def _build_captions(
        self, regions: Sequence[Sequence[RegionView]], task: str, encoded: EncodedImages, generation: Mapping[str, Any]
    ) -> list[list[Caption]]:
        check_task(task)
        indexed_views = [(index, view) for each in regions for index, view in enumerate(each)]
        texts = self.caption_regions([view for _, view in indexed_views], task, encoded, **generation)
        captions = iter(
            [
                Caption(
                    text.text,
                    text.score,
                    box=view.prompt.box or (view.mask and mask_to_box(view.mask)),
                    mask=view.mask and dict(view.mask),
                    predicted_iou=view.predicted_iou,
                    prompt=view.prompt,
                    region_id=index,
                    usage=text.usage,
                )
                for (index, view), text in zip(indexed_views, texts, strict=True)
            ]
        )
        return [[next(captions) for _ in each] for each in regions]


def build_segmentation_model(
    encoder: str | Mapping[str, Any], device: str | torch.device
) -> tuple[SegmentationModel, bool]:
    """An encoder and the segmenter that it brings, or those of a checkpoint, and whether there are masks then. Random
    weights are the same each time.

    Raises RegistryError or InputError.
    """
    part = Part.from_dict(encoder, "encoder")
    if part.name not in sca_registry.encoders:
        if part.name in zoo.list_names() or find_local_folder(part.name) or HUB_ID_PATTERN.fullmatch(part.name):
            for option in part.options:
                if option not in TRUST_OPTIONS:
                    raise RegistryError(
                        f"the encoder {part.name!r} is a checkpoint, which has no option {option!r} to set; it takes "
                        f"{', '.join(TRUST_OPTIONS)}"
                    )
            model = load(part.name, device, **part.options)
            segmenter = resolve_parts(model.spec, model.encoder)["segmenter"].name
            return SegmentationModel(model.encoder, model.segmenter), _has_masks(segmenter)
        sca_registry.encoders.get_card(part.name)  # says what there is
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built_encoder = sca_registry.encoders.build(part.name, **part.options)
        segmenter = sca_registry.segmenters.build(built_encoder.default_segmenter, built_encoder)
    return SegmentationModel(built_encoder, segmenter).to(device), _has_masks(built_encoder.default_segmenter)


def _has_masks(segmenter: str) -> bool:
    return "masks" in (sca_registry.segmenters.get_declared(segmenter, "gives") or ())


def resolve_generation_options(options: Mapping[str, Any]) -> dict[str, int]:
    """Return `num_beams` and `max_new_tokens`, by default those of models.

    Raises RegistryError for any other option, and for a value that is not an integer of 1 or more.
    """
    for name, value in options.items():
        if name not in DEFAULT_GENERATION:
            raise make_unknown_name_error(
                f"this captioner has no option {name!r} of generation", name, DEFAULT_GENERATION
            )
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise RegistryError(f"{name} is {value!r}: give a whole number, 1 or more")
    return {**DEFAULT_GENERATION, **options}


def box_to_pixels(box: Box, image_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A box as whole pixels of an image of (width, height): all that it touches, and 2 or more along each side."""
    spans = []
    for start, end, side in zip(box[:2], box[2:], image_size, strict=True):
        first = min(max(math.floor(start), 0), max(side - 2, 0))
        spans.append((first, min(max(math.ceil(end), first + 2), side)))
    (x1, x2), (y1, y2) = spans
    return x1, y1, x2, y2


def crop_image(view: RegionView, box: Box, white_background: bool = False) -> Image.Image:
    """A region's crop: the original pixels in its box, the background with it, or white where its mask is not."""
    window = box_to_pixels(box, view.image.size)
    cropped = view.image.crop(window)
    if not white_background or view.mask is None:
        return cropped
    mask_image = Image.fromarray(decode_rle(view.mask)).crop(window)
    return Image.composite(cropped, Image.new("RGB", cropped.size, "white"), mask_image)
