"""Base class of baselines and vision-language models: resolves prompts to boxes and masks of regions."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import sca_registry
import torch
from PIL import Image
from sca_registry import RegistryError, zoo
from sca_registry.contracts import Caption, Prompt, TokenUsage, list_region_references
from sca_registry.errors import make_unknown_name_error
from sca_registry.spec import DEFAULT_GENERATION, ComponentSpec
from torch import nn

from sca.builder import resolve_components
from sca.checkpoints.load import HUB_ID_PATTERN, load, locate_checkpoint
from sca.encoders.model_types import find_encoder_of_segmenter
from sca.inference.engine import EncodedImages, MaskEngine, PredictedMask
from sca.inference.prompt_arguments import check_task, get_tasks
from sca.io.coordinates import Box
from sca.io.hub import find_local_folder
from sca.io.masks import RLE, decode_rle, encode_rle, mask_to_box
from sca.io.weight_files import hash_tensors
from sca.model import SegmentationModel

MAX_ASPECT_RATIO = 200  # longer side of an image divided by the shorter one; the limit of Qwen's image processors
TRUST_OPTIONS = ("trust_remote_code", "allow_external", "revision")  # options of `sca.load`


class RegionView(NamedTuple):
    """Input of a captioner for one region; boxes and masks are in image pixels."""

    image_index: int  # index of the image in the batch
    image: Image.Image
    prompt: Prompt
    mask: RLE | None
    predicted_iou: float | None  # None unless a segmenter predicted the mask

    @property
    def tight_box(self) -> Box:
        """Tight box x1 y1 x2 y2 of the predicted mask, else the box prompt, else the tight box of the mask prompt.

        An empty mask has an empty box at the top left corner of the image.
        """
        if self.prompt.box is not None and self.predicted_iou is None:
            return self.prompt.box
        assert self.mask is not None  # predicted, or that of the prompt
        return mask_to_box(self.mask) or (0.0, 0.0, 0.0, 0.0)


class ScoredText(NamedTuple):
    """Text of a region with its score."""

    text: str
    score: float
    usage: TokenUsage | None = None  # None if no language model generated the text


class RegionCaptioner(MaskEngine):
    """Captioner that resolves each prompt to a region; subclasses generate the texts in `caption_regions`.

    With an encoder, the region is the best mask that its segmenter predicts for the prompt. Without one, it is the
    prompt's box, else its mask, and point prompts are rejected.

    Args:
        encoder: Name of an encoder whose default segmenter predicts masks, such as a SAM; or a dict with its name and
            options; or a checkpoint, whose encoder and segmenter are used, also of a segmenter in transformers' format;
            or None.
        device: Device of the encoder and the segmenter.
        requires_masks: Require a segmenter that predicts masks.

    Raises:
        ValueError: Masks are required and the segmenter predicts none.
        RegistryError: The encoder is unknown, or an option is invalid.
        InputError: The checkpoint cannot be read.
    """

    generation_options: tuple[str, ...] = tuple(DEFAULT_GENERATION)  # accepted by `resolve_generation_options`
    has_masks: bool

    def __init__(
        self, encoder: str | Mapping[str, Any] | None, device: str | torch.device, requires_masks: bool = True
    ):
        model, self.has_masks = None, False
        if encoder is not None:
            model, self.has_masks = build_segmentation_model(encoder, device, requires_masks)
        super().__init__(model)

    @property
    def weight_modules(self) -> dict[str, nn.Module]:
        """Modules with weights by name."""
        return {} if self.model is None else {"segmentation_model": self.model}

    @property
    def weights_hash(self) -> str | None:
        """SHA-256 of the weights of all modules; None for a captioner without weights."""
        tensors = {
            f"{name}.{key}": tensor
            for name, module in self.weight_modules.items()
            for key, tensor in module.state_dict().items()
        }
        return hash_tensors(tensors) if tensors else None

    @abstractmethod
    def caption_regions(
        self, regions: Sequence[RegionView], task: str, encoded: EncodedImages, **generation: Any
    ) -> list[ScoredText]:
        """Generate one text per region.

        Args:
            regions: N regions.
            task: "recognition" or "caption".
            encoded: Images of the regions with their features.
            **generation: Generation options, see `resolve_generation_options`.

        Returns:
            N texts with their scores, in order.
        """

    def caption_batch(
        self,
        encoded: EncodedImages,
        requests: Sequence[Sequence[Prompt]],
        task: str = "caption",
        *,
        return_masks: bool = True,
        **generation: Any,
    ) -> list[list[Caption]]:
        """Caption the prompts of a batch of images.

        Args:
            encoded: Images with their features.
            requests: Prompts of each image, in pixels of that image.
            task: "recognition" or "caption".
            return_masks: Ignored; captions have the masks that the captioner used.
            **generation: Generation options, see `resolve_generation_options`.

        Returns:
            One caption per prompt, grouped by image.

        Raises:
            ValueError: The task is unknown, or a point prompt has no segmenter to resolve it.
            RegistryError: A generation option is invalid.
        """
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
        """Caption predicted masks of a single image.

        Args:
            encoded: The image with its features.
            masks: Masks to caption.
            prompts: Prompt of each mask, in image pixels.
            task: "recognition" or "caption".
            **generation: Generation options, see `resolve_generation_options`.

        Returns:
            One caption per mask, in order.
        """
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
            return [RegionView(*each, *cast("PredictedMask", mask)) for each, mask in zip(prompted, masks, strict=True)]
        if any(prompt.box is None and prompt.mask is None for *_, prompt in prompted):
            raise ValueError(
                "point prompts require an encoder whose segmenter predicts masks; use encoder+captioner, such as "
                "sam-vit-b+NAME, or pass a box or a mask"
            )
        rles = [None if prompt.mask is None else encode_rle(prompt.mask) for *_, prompt in prompted]
        return [RegionView(*each, rle, None) for each, rle in zip(prompted, rles, strict=True)]

    def _build_captions(
        self, regions: Sequence[Sequence[RegionView]], task: str, encoded: EncodedImages, generation: Mapping[str, Any]
    ) -> list[list[Caption]]:
        check_task(task, get_tasks(self))
        indexed_views = [(index, view) for each in regions for index, view in enumerate(each)]
        texts = self.caption_regions([view for _, view in indexed_views], task, encoded, **generation)
        captions = iter(
            [
                Caption(
                    text.text,
                    text.score,
                    box=view.prompt.box or (mask_to_box(view.mask) if view.mask else None),
                    mask=dict(view.mask) if view.mask else None,
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
    encoder: str | Mapping[str, Any], device: str | torch.device, requires_masks: bool = False
) -> tuple[SegmentationModel, bool]:
    """Build an encoder with its default segmenter, or load both from a checkpoint.

    Random weights have a fixed seed.

    Args:
        encoder: Name of an encoder; a checkpoint, of a model or of a segmenter in transformers' format; or a dict
            with its name and options.
        device: Device of both.
        requires_masks: Require a segmenter that predicts masks, which is checked before weights are downloaded.

    Returns:
        The model, and whether its segmenter predicts masks.

    Raises:
        ValueError: Masks are required and the segmenter predicts none.
        RegistryError: The encoder is unknown, or an option is invalid.
        InputError: The checkpoint cannot be read.
    """
    component = ComponentSpec.from_dict(encoder, "encoder")
    registered = _resolve_encoder(component)
    if registered is None:
        model = load(component.name, device, **component.options)
        segmenter_name = resolve_components(model.spec, model.encoder)["segmenter"].name
        return SegmentationModel(model.encoder, model.segmenter), _has_masks(segmenter_name, component, requires_masks)
    declared_segmenter = sca_registry.encoders.get_declared(registered.name, "default_segmenter")
    if declared_segmenter is not None:
        _has_masks(declared_segmenter, component, requires_masks)  # raises before weights are downloaded
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built_encoder = sca_registry.encoders.build(registered.name, **registered.options)
        segmenter = sca_registry.segmenters.build(built_encoder.default_segmenter, built_encoder)
    has_masks = _has_masks(built_encoder.default_segmenter, component, requires_masks)
    return SegmentationModel(built_encoder, segmenter).to(device), has_masks


def _resolve_encoder(component: ComponentSpec) -> ComponentSpec | None:
    """Return the registered encoder to build: `component` itself, or that of a segmenter in transformers' format.

    None for the checkpoint of an SCA model.
    """
    name, options = component.name, component.options
    if name in sca_registry.encoders:
        return component
    if name not in zoo.list_names() and not find_local_folder(name) and not HUB_ID_PATTERN.fullmatch(name):
        sca_registry.encoders.get_card(name)  # raises with the available names
    for option in options:
        if option not in TRUST_OPTIONS:
            raise RegistryError(
                f"the encoder {name!r} is a checkpoint, which has no option {option!r}; choose from "
                f"{', '.join(TRUST_OPTIONS)}"
            )
    revision = options.get("revision")
    encoder_name = find_encoder_of_segmenter(locate_checkpoint(name, revision))
    return ComponentSpec(encoder_name, {"weights": name, "revision": revision}) if encoder_name else None


def _has_masks(segmenter_name: str, encoder: ComponentSpec, requires_masks: bool) -> bool:
    """Return whether a segmenter predicts masks; raise ValueError if it does not and masks are required."""
    has_masks = "masks" in (sca_registry.segmenters.get_declared(segmenter_name, "provides") or ())
    if requires_masks and not has_masks:
        raise ValueError(
            f"the segmenter of the encoder {encoder.name!r} predicts no masks; use a SAM encoder, such as sam-vit-b"
        )
    return has_masks


def resolve_generation_options(options: Mapping[str, Any]) -> dict[str, int]:
    """Return `num_beams` and `max_new_tokens`, by default those of `DEFAULT_GENERATION`.

    Args:
        options: Generation options by name.

    Returns:
        `num_beams` and `max_new_tokens`.

    Raises:
        RegistryError: Another option is set, or a value is not an integer of at least 1.
    """
    for name, value in options.items():
        if name not in DEFAULT_GENERATION:
            raise make_unknown_name_error(f"this captioner has no generation option {name!r}", name, DEFAULT_GENERATION)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise RegistryError(f"{name} is {value!r}; expected an integer of at least 1")
    return {**DEFAULT_GENERATION, **options}


def check_region_question(question: str) -> None:
    """Check a question about one region.

    Args:
        question: Question.

    Raises:
        ValueError: The question is empty, or refers to regions by number.
    """
    if not question.strip():
        raise ValueError("the question is empty; pass a text such as 'what color is it?'")
    if list_region_references(question):
        raise ValueError("this captioner does not support region references such as <region 1>; remove them")


def box_to_pixels(box: Box, image_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Round a box outward to integer pixels, clipped to the image, with at least 2 pixels per side.

    Args:
        box: x1 y1 x2 y2 in image pixels.
        image_size: Width and height.

    Returns:
        x1 y1 x2 y2; x2 and y2 are exclusive.
    """
    spans = []
    for start, end, side in zip(box[:2], box[2:], image_size, strict=True):
        first = min(max(math.floor(start), 0), max(side - 2, 0))
        spans.append((first, min(max(math.ceil(end), first + 2), side)))
    (x1, x2), (y1, y2) = spans
    return x1, y1, x2, y2


def check_aspect_ratio(image: Image.Image) -> None:
    """Check that the longer side of an image is at most `MAX_ASPECT_RATIO` times the shorter one.

    Args:
        image: Image.

    Raises:
        ValueError: It is longer.
    """
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        width, height = image.size
        raise ValueError(
            f"an image of {width} x {height} pixels exceeds the aspect ratio of {MAX_ASPECT_RATIO}:1 that the model "
            "supports; crop the image"
        )


def crop_image(view: RegionView, box: Box, white_background: bool = False) -> Image.Image:
    """Crop a region from its image at the original resolution.

    The shorter side of a crop is extended to 1/`MAX_ASPECT_RATIO` of the longer one, within the image.

    Args:
        view: Region.
        box: x1 y1 x2 y2 in image pixels, rounded by `box_to_pixels`.
        white_background: Paint pixels outside the mask of the region white. No effect without a mask.

    Returns:
        The RGB crop.
    """
    window = _limit_aspect_ratio(box_to_pixels(box, view.image.size), view.image.size)
    cropped = view.image.crop(window)
    if not white_background or view.mask is None:
        return cropped
    mask_image = Image.fromarray(decode_rle(view.mask)).crop(window)
    return Image.composite(cropped, Image.new("RGB", cropped.size, "white"), mask_image)


def _limit_aspect_ratio(window: tuple[int, int, int, int], image_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Extend the shorter side of a window to at least 1/`MAX_ASPECT_RATIO` of the longer one, within the image."""
    x1, y1, x2, y2 = window
    min_side = math.ceil(max(x2 - x1, y2 - y1) / MAX_ASPECT_RATIO)
    spans = []
    for start, end, side in ((x1, x2, image_size[0]), (y1, y2, image_size[1])):
        missing = max(min_side - (end - start), 0)
        first = max(min(start - missing // 2, side - (end - start) - missing), 0)
        spans.append((first, min(first + (end - start) + missing, side)))
    (x1, x2), (y1, y2) = spans
    return x1, y1, x2, y2
