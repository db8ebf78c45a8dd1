"""A session with one image at a time: `set_image` once, then any number of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from sca_registry.contracts import Caption, Prompt

from sca.inference.engine import REGIONS, Encoded, Engine, Mask, MaskEngine
from sca.inference.generation import OPTIONS, refuse_unknown, settle_generation
from sca.inference.requests import check_prompts, check_task, collect_prompts
from sca.io.errors import InputError
from sca.io.images import take_image
from sca.io.masks import RLE

if TYPE_CHECKING:
    from sca.model import SegmentCaptioner

BATCH = 8  # images that are encoded at a time
REGION_ARGUMENTS = ("prompts", "boxes", "points", "masks", "task")


class Predictor:
    """Masks and captions of a model: `set_image` once, then `predict` for any number of regions.

        predictor = sca.Predictor(sca.load("sca-tiny"))
        predictor.set_image(image)
        captions = predictor.predict(boxes=[(370, 434, 448, 512)])

    Args:
        model: A model, which is set to eval mode, or a captioner such as `sca.captioner("sam-vit-b+blip-base")`.
        regions: Regions of a model that are segmented and mixed at a time: limits memory, changes no result.

    Raises:
        ValueError: The model is something else, such as a name.
    """

    def __init__(self, model: SegmentCaptioner | MaskEngine, regions: int | None = None):
        if isinstance(model, MaskEngine) and regions is not None:
            raise ValueError("regions is an option of the captioner; give it to sca.captioner")
        self.engine = model if isinstance(model, MaskEngine) else Engine(model, regions or REGIONS)
        self.image: Image.Image | None = None
        self.encoded: Encoded | None = None

    @property
    def model(self) -> Any:
        """The model; None for a captioner without an encoder."""
        return self.engine.model

    def set_image(self, image: Image.Image | np.ndarray) -> None:
        """Encode an image for the predictions that follow.

        Args:
            image: A PIL image, rotated as its EXIF states, or a (height, width, 3) uint8 array in RGB. Coordinates of
                prompts and results are pixels of the upright image, which is kept as `image`.

        Raises:
            InputError: An array of another shape or type.
        """
        self.image = take_image(image)
        self.encoded = self.engine.encode([self.image])

    def predict(
        self,
        prompts: Sequence[Prompt] = (),
        *,
        boxes: Sequence[Sequence[float]] = (),
        points: Sequence[Sequence[float]] = (),
        masks: Sequence[np.ndarray | RLE] = (),
        task: str = "caption",
        max_new_tokens: int | None = None,
        num_beams: int | None = None,
        num_captions: int | None = None,
        do_sample: bool | None = None,
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
        request = self._collect(prompts, boxes, points, masks)
        generation = settle_generation(
            self.engine,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            num_captions=num_captions,
            do_sample=do_sample,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
        return self.engine.caption_batch(self.encoded, [request], task, **generation)[0]

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
        request = self._collect(prompts, boxes, points, masks)
        return self.engine.segment(self.encoded, [request], multimask)

    def predict_batch(
        self,
        images: Sequence[Image.Image | np.ndarray],
        requests: Sequence[Sequence[Prompt]],
        *,
        task: str = "caption",
        max_new_tokens: int | None = None,
        num_beams: int | None = None,
        num_captions: int | None = None,
        do_sample: bool | None = None,
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
            raise InputError("no region; give at least one prompt")
        generation = settle_generation(
            self.engine,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            num_captions=num_captions,
            do_sample=do_sample,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
        found: list[list[Caption]] = []
        for start in range(0, len(taken), BATCH):
            rows = slice(start, start + BATCH)
            found += self.engine.caption_batch(self.engine.encode(taken[rows]), fitting[rows], task, **generation)
        return found

    def _collect(
        self,
        prompts: Sequence[Prompt],
        boxes: Sequence[Sequence[float]],
        points: Sequence[Sequence[float]],
        masks: Sequence[np.ndarray | RLE],
    ) -> list[Prompt]:
        if self.image is None:
            raise ValueError("there is no image yet: call set_image(image) first")
        return collect_prompts(prompts, boxes, points, masks, self.image.size)
