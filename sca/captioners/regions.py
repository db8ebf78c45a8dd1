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
from sca_registry.messages import unknown
from sca_registry.spec import GENERATION, Part

from sca.checkpoints.load import HUB_ID, load
from sca.composition import parts
from sca.inference.engine import Encoded, Mask, MaskEngine
from sca.inference.requests import check_task
from sca.io.coordinates import Box
from sca.io.hub import local_folder
from sca.io.masks import RLE, box_of, decode, encode
from sca.model import Segmenting

AGREED = ("trust_remote_code", "allow_external", "revision")  # that `sca.load` takes


class Seen(NamedTuple):
    """A region as a baseline sees it; image pixels."""

    owner: int  # which of the images that were shown together
    image: Image.Image
    prompt: Prompt
    mask: RLE | None
    iou: float | None  # predicted, where a segmenter gave the mask

    @property
    def tight(self) -> Box:
        """The tight box of the mask that was found, without one the prompt's, else that of its mask; nothing at the
        image's corner if the mask is empty.
        """
        if self.prompt.box is not None and self.iou is None:
            return self.prompt.box
        return box_of(self.mask) or (0.0, 0.0, 0.0, 0.0)


class ScoredText(NamedTuple):
    """What a baseline says of a region."""

    text: str
    score: float
    usage: TokenUsage | None = None  # None where no language model wrote the text


class RegionCaptioner(MaskEngine):
    """Finds the region that a prompt means; what is said of it is for `words`.

    encoder: the name of an encoder that brings a segmenter with masks, such as a SAM, or a table of its name and
    options; or a checkpoint, whose encoder and segmenter are taken. A region is then the best of the masks that the
    segmenter gives for the prompt. Without one it is the prompt's box, or else its mask, and a point is refused.
    """

    generation_options = tuple(GENERATION)  # that `generation_of` takes

    def __init__(self, encoder: str | Mapping[str, Any] | None, device: str | torch.device, masks: bool = True):
        model, self.segments = (None, False) if encoder is None else segmenting(encoder, device)
        if masks and model is not None and not self.segments:
            raise ValueError(
                f"the encoder {Part.from_dict(encoder).name!r} brings a segmenter without masks, and masks cut regions "
                "out: take a SAM, such as sam-vit-b, or none"
            )
        super().__init__(model)

    @abstractmethod
    def words(self, regions: Sequence[Seen], task: str, encoded: Encoded, **generation: Any) -> list[ScoredText]:
        """A text and a score for each region of the images in `encoded`."""

    def answer(
        self,
        encoded: Encoded,
        requests: Sequence[Sequence[Prompt]],
        task: str = "caption",
        *,
        masks: bool = True,
        **generation: Any,
    ) -> list[list[Caption]]:
        found = iter(self._find(encoded, requests))
        regions = [[next(found) for _ in request] for request in requests]
        return self._captions(regions, task, encoded, generation)

    def tell(
        self,
        encoded: Encoded,
        masks: Sequence[Mask],
        request: Sequence[Prompt],
        task: str = "caption",
        **generation: Any,
    ) -> list[Caption]:
        (image,) = encoded.images
        regions = [Seen(0, image, prompt, *mask) for prompt, mask in zip(request, masks, strict=True)]
        return self._captions([regions], task, encoded, generation)[0]

    def _find(self, encoded: Encoded, requests: Sequence[Sequence[Prompt]]) -> list[Seen]:
        shown = enumerate(zip(encoded.images, requests, strict=True))
        asked = [(owner, image, prompt) for owner, (image, request) in shown for prompt in request]
        if self.segments:
            found = self.best(encoded, requests)
            return [Seen(*each, *mask) for each, mask in zip(asked, found, strict=True)]
        if any(prompt.box is None and prompt.mask is None for *_, prompt in asked):
            raise ValueError(
                "a point is no region yet, and nothing here finds the region it means: write encoder+captioner with an "
                "encoder that brings masks, sam-vit-b+NAME, or give a box or a mask"
            )
        codes = [None if prompt.mask is None else encode(prompt.mask) for *_, prompt in asked]
        return [Seen(*each, code, None) for each, code in zip(asked, codes, strict=True)]

    def _captions(
        self, regions: Sequence[Sequence[Seen]], task: str, encoded: Encoded, generation: Mapping[str, Any]
    ) -> list[list[Caption]]:
        check_task(task)
        flat = [(place, seen) for each in regions for place, seen in enumerate(each)]
        texts = self.words([seen for _, seen in flat], task, encoded, **generation)
        captions = iter(
            [
                Caption(
                    text.text,
                    text.score,
                    box=seen.prompt.box or (seen.mask and box_of(seen.mask)),
                    mask=seen.mask and dict(seen.mask),
                    predicted_iou=seen.iou,
                    prompt=seen.prompt,
                    region_id=place,
                    usage=text.usage,
                )
                for (place, seen), text in zip(flat, texts, strict=True)
            ]
        )
        return [[next(captions) for _ in each] for each in regions]


def segmenting(encoder: str | Mapping[str, Any], device: str | torch.device) -> tuple[Segmenting, bool]:
    """An encoder and the segmenter that it brings, or those of a checkpoint, and whether there are masks then. Random
    weights are the same each time.

    Raises RegistryError or InputError.
    """
    part = Part.from_dict(encoder, "encoder")
    if part.name not in sca_registry.encoders:
        if part.name in zoo.names() or local_folder(part.name) or HUB_ID.fullmatch(part.name):
            for option in part.options:
                if option not in AGREED:
                    raise RegistryError(
                        f"the encoder {part.name!r} is a checkpoint, which has no option {option!r} to set; it takes "
                        f"{', '.join(AGREED)}"
                    )
            model = load(part.name, device, **part.options)
            segmenter = parts(model.spec, model.encoder)["segmenter"].name
            return Segmenting(model.encoder, model.segmenter), _gives_masks(segmenter)
        sca_registry.encoders.card(part.name)  # says what there is
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = sca_registry.encoders.build(part.name, **part.options)
        segmenter = sca_registry.segmenters.build(built.default_segmenter, built)
    return Segmenting(built, segmenter).to(device), _gives_masks(built.default_segmenter)


def _gives_masks(segmenter: str) -> bool:
    return "masks" in (sca_registry.segmenters.stated(segmenter, "gives") or ())


def generation_of(given: Mapping[str, Any]) -> dict[str, int]:
    """`beams` and `max_new_tokens`, as those of models by default. Raises RegistryError for any other and for what is
    no whole number from 1 on.
    """
    for name, value in given.items():
        if name not in GENERATION:
            raise unknown(f"this captioner has no option {name!r} of generation", name, GENERATION)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise RegistryError(f"{name} is {value!r}: give a whole number, 1 or more")
    return {**GENERATION, **given}


def pixels_of(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A box as whole pixels of an image of (width, height): all that it touches, and 2 or more along each side."""
    spans = []
    for start, end, side in zip(box[:2], box[2:], size, strict=True):
        first = min(max(math.floor(start), 0), max(side - 2, 0))
        spans.append((first, min(max(math.ceil(end), first + 2), side)))
    (x1, x2), (y1, y2) = spans
    return x1, y1, x2, y2


def crop(seen: Seen, box: Box, white: bool = False) -> Image.Image:
    """A region's crop: the original pixels in its box, the background with it, or white where its mask is not."""
    window = pixels_of(box, seen.image.size)
    cut = seen.image.crop(window)
    if not white or seen.mask is None:
        return cut
    inside = Image.fromarray(decode(seen.mask)).crop(window)
    return Image.composite(cut, Image.new("RGB", cut.size, "white"), inside)
