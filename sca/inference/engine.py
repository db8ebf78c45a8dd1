"""Masks of the regions of an image that prompts point at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from sca_registry.contracts import TASKS, Caption, Prompt, Prompts, Regions
from sca_registry.spec import Everything
from torch import Tensor

from sca.inference.generation import OPTIONS, refuse_unknown, settle_generation
from sca.inference.processor import Frame, Processor
from sca.io.images import take_image
from sca.io.masks import RLE, checked, decode, encode
from sca.io.prompts import PromptError, check
from sca.model import NON_FINITE
from sca.nn.masks import best_masks

if TYPE_CHECKING:
    from sca.model import Segmenting

REGIONS = 64  # go through segmenter and mixer at a time
BATCH = 8  # images that are encoded at a time
REGION_ARGUMENTS = ("prompts", "boxes", "points", "masks", "task")


class Encoded(NamedTuple):
    """What a predictor keeps of B images: computed once, and asked as often as wanted."""

    images: Sequence[Image.Image]
    features: Tensor | None  # (B, C, h, w); None without an encoder
    frames: Sequence[Frame]


class Mask(NamedTuple):
    """A candidate for a region's mask, image pixels."""

    mask: dict[str, Any]  # COCO RLE
    iou: float  # predicted


class MaskPredictor(ABC):
    """Set an image once, then predict for any number of prompts: its features are computed once and kept.

    Subclasses caption regions: they add `answer` and `tell`.

    Args:
        model: An encoder and a segmenter; None where a prompt is its region already.
        regions: Regions that go through the segmenter at a time: limits memory, changes no result.

    Raises:
        ValueError: The model is something else, such as a name.
    """

    def __init__(self, model: Segmenting | None, regions: int = REGIONS):
        if isinstance(model, str | Path):
            raise ValueError(f"{type(self).__name__} takes a model and not its name; use sca.load({str(model)!r})")
        self.model = None if model is None else model.eval()
        self.processor = Processor.of(model.encoder) if model is not None else None
        self.regions = regions
        self.image: Image.Image | None = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def everything(self) -> Everything:
        """The search settings of everything mode: SAM's, or the model's own."""
        return Everything()

    def set_image(self, image: Image.Image | np.ndarray) -> None:
        """Encode an image for the predictions that follow.

        Args:
            image: A PIL image, rotated as its EXIF states, or a (height, width, 3) uint8 array in RGB. Coordinates of
                prompts and results are pixels of the upright image, which is kept as `image`.

        Raises:
            ImageError: An array of another shape or type.
        """
        self.image = take_image(image)
        self.encoded = self.encode([self.image])

    @torch.inference_mode()
    def encode(self, images: Sequence[Image.Image]) -> Encoded:
        """Encode several images as one batch, for `answer`; the image that is set stays."""
        if self.model is None:
            return Encoded(images, None, ())
        pixels = self.processor.pixels(images).to(self.device, next(self.model.parameters()).dtype)
        frames = [self.processor.frame(*image.size) for image in images]
        features = self.model.encode(pixels)
        if not features.isfinite().all():
            raise ValueError(f"the encoder returned NaN or infinite features; {NON_FINITE}")
        return Encoded(images, features, frames)

    @torch.inference_mode()
    def segment(
        self,
        prompts: Sequence[Prompt] = (),
        *,
        boxes: Sequence[Sequence[float]] = (),
        points: Sequence[Sequence[float]] = (),
        masks: Sequence[np.ndarray | RLE] = (),
        multimask: bool = True,
        **unknown: Any,
    ) -> list[list[Mask]]:
        """Predict the masks of regions of the image that is set, without captions.

        Args:
            prompts: As for `predict`, like boxes, points and masks.
            multimask: All candidates of the segmenter (SAM has three); otherwise its single mask.

        Returns:
            For each region its masks, by predicted IoU, best first.

        Raises:
            TypeError: An unknown keyword; names the closest one.
            ValueError: What `predict` refuses, or a segmenter without masks.
        """
        refuse_unknown("segment", unknown, (*REGION_ARGUMENTS[:4], "multimask"))
        encoded, request = self._asked(prompts, boxes, points, masks)
        found: list[list[Mask]] = [[] for _ in request]
        for places, prompts, regions in self._segmented(encoded, [request], multimask):
            if regions.masks is None:
                raise ValueError("the segmenter gives no masks: build the model with segmenter=sam")
            order = regions.scores.argsort(dim=1, descending=True, stable=True)  # (N, M)
            logits = regions.masks.take_along_dim(order[..., None, None], dim=1).flatten(0, 1)
            ious = ious_of(regions.scores.take_along_dim(order, dim=1))
            codes = self._masks(logits, prompts.owner.repeat_interleave(order.shape[1]), encoded.frames)
            for place, each in zip(places, ious, strict=True):
                found[place] = [Mask(next(codes), iou) for iou in each]
        return found

    @torch.inference_mode()
    def best(self, encoded: Encoded, requests: Sequence[Sequence[Prompt]]) -> list[Mask | None]:
        """Predict the best mask of each prompt.

        Args:
            encoded: What `encode` returned for B images.
            requests: For each of the B images its prompts.

        Returns:
            For each prompt of all images in one list its mask with the highest predicted IoU, or None from a segmenter
            without masks.
        """
        found: list[Mask | None] = [None] * sum(map(len, requests))
        for places, prompts, regions in self._segmented(encoded, requests):
            if regions.masks is not None:
                masks = best_masks(regions.masks, regions.scores)
                ious = ious_of(regions.scores.amax(1))
                codes = self._masks(masks, prompts.owner, encoded.frames)
                for place, code, iou in zip(places, codes, ious, strict=True):
                    found[place] = Mask(code, iou)
        return found

    def predict(
        self,
        prompts: Sequence[Prompt] = (),
        *,
        boxes: Sequence[Sequence[float]] = (),
        points: Sequence[Sequence[float]] = (),
        masks: Sequence[np.ndarray | RLE] = (),
        task: str = "caption",
        max_new_tokens: int | None = None,
        beams: int | None = None,
        captions: int | None = None,
        sample: bool | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        **unknown: Any,
    ) -> list[Caption]:
        """Caption regions of the image that is set: each prompt, then each box, each point and each mask.

        Coordinates are pixels of the upright image: x to the right, y down. Options of generation that are None are the
        model's own; see `sca.inference.generation.settle_generation`.

        Args:
            prompts: Regions with any combination of a box, points and a mask.
            boxes: (N, 4) x1 y1 x2 y2; clipped to the image.
            points: (N, 2) x y, each a region of its own.
            masks: (height, width) arrays, or COCO RLEs.
            task: "caption", or "recognition" for a class name.
            max_new_tokens: Maximum tokens per caption.
            beams: Beams of the search.
            captions: Captions per region; all but the best are in `Caption.others`.
            sample: Draw tokens instead of taking the likeliest.
            temperature: Divides the logits that are sampled from.
            top_p: Probability mass that is sampled from.
            seed: Of what is drawn.

        Returns:
            A caption for each region, in order.

        Raises:
            TypeError: An unknown keyword; names the closest one.
            ValueError: No region, a region that does not fit the image, or a value out of range.
        """
        refuse_unknown("predict", unknown, (*REGION_ARGUMENTS, *OPTIONS))
        encoded, request = self._asked(prompts, boxes, points, masks)
        generation = settle_generation(
            self,
            max_new_tokens=max_new_tokens,
            beams=beams,
            captions=captions,
            sample=sample,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
        return self.answer(encoded, [request], task, **generation)[0]

    def predict_batch(
        self,
        images: Sequence[Image.Image | np.ndarray],
        requests: Sequence[Sequence[Prompt]],
        *,
        task: str = "caption",
        max_new_tokens: int | None = None,
        beams: int | None = None,
        captions: int | None = None,
        sample: bool | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        **unknown: Any,
    ) -> list[list[Caption]]:
        """Caption regions of several images; the image that is set stays.

        Args:
            images: As for `set_image`; `BATCH` of them are encoded at a time.
            requests: For each image its regions. Some may have none.
            task: As for `predict`, like all further options.

        Returns:
            For each image a caption for each of its regions, in order.

        Raises:
            TypeError: An unknown keyword; names the closest one.
            ValueError: What `predict` refuses, with the image's index, or another number of requests than of images.
        """
        refuse_unknown("predict_batch", unknown, ("images", "requests", "task", *OPTIONS))
        check_task(task)
        if not isinstance(images, Sequence | np.ndarray) or not isinstance(requests, Sequence):
            raise ValueError("images and requests are lists: one list of prompts for each image")
        if len(images) != len(requests):
            raise ValueError(f"there are {len(images)} images and {len(requests)} requests; give one for each image")
        taken, fitting = [], []
        for place, (image, request) in enumerate(zip(images, requests, strict=True)):
            try:
                taken.append(take_image(image))
                fitting.append(check_prompts(request, *taken[-1].size))
            except ValueError as error:
                raise type(error)(f"image {place}: {error}") from error
        if not any(fitting):
            raise PromptError("no region; give at least one prompt")
        generation = settle_generation(
            self,
            max_new_tokens=max_new_tokens,
            beams=beams,
            captions=captions,
            sample=sample,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
        found: list[list[Caption]] = []
        for start in range(0, len(taken), BATCH):
            rows = slice(start, start + BATCH)
            found += self.answer(self.encode(taken[rows]), fitting[rows], task, **generation)
        return found

    def describe(
        self, image: Image.Image, prompts: Sequence[Prompt], task: str = "caption", **generation: Any
    ) -> list[Caption]:
        """Set an image and caption regions of it, whose prompts are known to fit: they are not checked."""
        self.set_image(image)
        return self.answer(self.encoded, [prompts], task, **generation)[0]

    @abstractmethod
    def answer(
        self,
        encoded: Encoded,
        requests: Sequence[Sequence[Prompt]],
        task: str = "caption",
        *,
        masks: bool = True,
        **generation: Any,
    ) -> list[list[Caption]]:
        """Caption any number of regions of encoded images.

        Args:
            encoded: What `encode` returned for B images.
            requests: For each of the B images its prompts, which fit it.
            task: "caption" or "recognition".
            masks: Compute full-size masks. Without them a caption of a point or a mask may have no box either.
            **generation: As returned by `sca.inference.generation.settle_generation`.

        Returns:
            For each image its captions, in the order of its prompts.
        """

    @abstractmethod
    def tell(
        self, masks: Sequence[Mask], request: Sequence[Prompt], task: str = "caption", **generation: Any
    ) -> list[Caption]:
        """Caption regions of the image that is set whose masks are known.

        Args:
            masks: The masks, which the captions get.
            request: For each mask the prompt that its caption is generated from.
            task: "caption" or "recognition".
            **generation: As for `answer`.
        """

    def _asked(
        self,
        prompts: Sequence[Prompt],
        boxes: Sequence[Sequence[float]],
        points: Sequence[Sequence[float]],
        masks: Sequence[np.ndarray | RLE],
    ) -> tuple[Encoded, list[Prompt]]:
        if self.image is None:
            raise ValueError("there is no image yet: call set_image(image) first")
        request = [*_check_list("prompts", prompts)]
        request += [Prompt(box=_plain(box)) for box in _check_list("boxes", boxes)]
        request += [Prompt(points=(_plain(point),)) for point in _check_list("points", points)]
        request += [Prompt(mask=mask) for mask in _check_list("masks", masks)]
        if not request:
            raise PromptError("no region; give prompts, boxes, points or masks")
        return self.encoded, check_prompts(request, *self.image.size)

    def _segmented(
        self, encoded: Encoded, requests: Sequence[Sequence[Prompt]], multimask: bool = True
    ) -> Iterator[tuple[list[int], Prompts, Regions]]:
        """A chunk of regions at a time, with their places in the flattened requests."""
        for places, bucket in self.processor.prompts(requests, encoded.frames):
            for start, chunk in enumerate(bucket.to(self.device).chunks(self.regions)):
                chosen = places[start * self.regions : start * self.regions + len(chunk)]
                yield chosen, chunk, self.model.segment(encoded.features, chunk, multimask)

    def _masks(self, logits: Tensor, owner: Tensor, frames: Sequence[Frame]) -> Iterator[dict[str, Any]]:
        """(N, 4h, 4w) logits -> RLE in image pixels, one at a time: full-size masks of many regions are large."""
        return map(encode, self.processor.inside(logits, [frames[image] for image in owner.tolist()]))


def check_prompts(prompts: Sequence[Prompt], width: int, height: int) -> list[Prompt]:
    """Check prompts against their image, see `sca.io.prompts.check`; a message names the index of its prompt."""
    found = []
    for place, prompt in enumerate(_check_list("prompts", prompts)):
        try:
            if not isinstance(prompt, Prompt):
                raise PromptError(f"{type(prompt).__name__} is not a prompt; give sca.Prompt(box=(x1, y1, x2, y2))")
            if isinstance(prompt.mask, Mapping):
                prompt = replace(prompt, mask=_decode(prompt.mask))
            found.append(check(prompt, width, height))
        except PromptError as error:
            raise PromptError(f"prompt {place}: {error}") from error
    return found


def ious_of(scores: Tensor) -> list[Any]:
    """Read predicted IoUs of any shape, from 0 to 1. Raise ValueError if one is NaN, which says nothing of any mask."""
    ious = scores.float().clamp(0, 1).cpu()  # the one thing that the host waits for
    if ious.isnan().any():
        raise ValueError(f"the segmenter returned NaN as predicted IoU; {NON_FINITE}")
    return ious.tolist()


def _check_list(name: str, values: Any) -> Sequence[Any]:
    """The regions of an argument; None is none. Raises PromptError for one region in place of a list."""
    if values is None:
        return ()
    if isinstance(values, Prompt | Mapping | str) or not hasattr(values, "__len__"):
        raise PromptError(f"{name} is of type {type(values).__name__}; give a list of {name}")
    if name in ("boxes", "points") and len(values) and not hasattr(values[0], "__len__"):
        raise PromptError(f"{name} is a list of numbers; give a list of {name}: {name}=[{list(map(_plain, values))}]")
    return values


def _decode(code: RLE) -> np.ndarray:
    try:
        return decode(checked(code))
    except ValueError as error:
        raise PromptError(f"the mask is unusable: {error}") from error


def _plain(numbers: Any) -> Any:
    """Of an array or tensor its numbers."""
    return numbers.tolist() if hasattr(numbers, "tolist") else numbers


def check_task(task: str) -> None:
    """Raises ValueError for a task that there is not."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; choose from {', '.join(map(repr, TASKS))}")
