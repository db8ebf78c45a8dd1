"""From a picture and what a user points at to masks and captions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from sca_registry.contracts import TASKS, Caption, Prompt, Prompts
from torch import Tensor

from sca.masks import box_of, encode
from sca.nn.masks import best_masks
from sca.processing import Frame, Processor

if TYPE_CHECKING:
    from sca.model import SegmentCaptioner


REGIONS = 64  # go through segmenter and mixer at a time


class Encoded(NamedTuple):
    """What a predictor keeps of B images: computed once, and asked as often as wanted."""

    features: Tensor  # (B, C, h, w)
    frames: Sequence[Frame]


class Mask(NamedTuple):
    """A candidate for a region's mask, image pixels."""

    mask: dict[str, Any]  # COCO RLE
    iou: float  # predicted


class Predictor:
    """Set an image once, then point at it as often as wanted: its features are computed once and kept.

    regions: how many regions go through the mixer at a time; a memory limit, not a result.
    """

    def __init__(self, model: SegmentCaptioner, regions: int = REGIONS):
        self.model = model.eval()
        self.processor = Processor.of(model.encoder)
        self.regions = regions
        self.image: Image.Image | None = None

    @property
    def device(self) -> torch.device:
        return self.model.task_tokens.device

    def set_image(self, image: Image.Image | np.ndarray) -> None:
        """A PIL picture or an (height, width, 3) uint8 array in RGB."""
        self.image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        self.encoded = self.encode([self.image])

    def predict(
        self,
        prompts: Sequence[Prompt] = (),
        *,
        boxes: Sequence[Sequence[float]] = (),
        points: Sequence[Sequence[float]] = (),
        task: str = "caption",
        **generation: Any,
    ) -> list[Caption]:
        """One caption for each prompt, then for each box x1 y1 x2 y2, then for each point x y (pixels of the image).

        task: "caption" or "recognition". generation: beams, max_new_tokens, sample, temperature, top_p; captions, how
        many for each region.
        """
        encoded, request = self._asked(prompts, boxes, points)
        return self.answer(encoded, [request], task, **generation)[0]

    def _asked(
        self, prompts: Sequence[Prompt], boxes: Sequence[Sequence[float]], points: Sequence[Sequence[float]]
    ) -> tuple[Encoded, list[Prompt]]:
        if self.image is None:
            raise ValueError("there is no image yet: call set_image(image) first")
        request = [*prompts]
        request += [Prompt(box=tuple(map(float, box))) for box in boxes]
        request += [Prompt(points=((float(point[0]), float(point[1]), 1),)) for point in points]
        return self.encoded, request

    @torch.inference_mode()
    def segment(
        self,
        prompts: Sequence[Prompt] = (),
        *,
        boxes: Sequence[Sequence[float]] = (),
        points: Sequence[Sequence[float]] = (),
        multimask: bool = True,
    ) -> list[list[Mask]]:
        """The masks of each region, best first: all candidates, or with `multimask=False` the segmenter's single one.

        What may be asked is as in `predict`. Raises ValueError if the segmenter gives no masks.
        """
        encoded, request = self._asked(prompts, boxes, points)
        found: list[list[Mask]] = [[] for _ in request]
        for places, bucket in self.processor.prompts([request], encoded.frames):
            for start, chunk in enumerate(bucket.to(self.device).chunks(self.regions)):
                regions = self.model.segment(encoded.features, chunk, multimask)
                if regions.masks is None:
                    raise ValueError("the segmenter gives no masks: build the model with segmenter=sam")
                order = regions.scores.argsort(dim=1, descending=True, stable=True)
                for row, best in enumerate(order):
                    codes = self._masks(regions.masks[row][best], best.new_zeros(len(best)), encoded.frames)
                    ious = regions.scores[row][best].float().clamp(0, 1).tolist()
                    place = places[start * self.regions + row]
                    found[place] = [Mask(code, iou) for code, iou in zip(codes, ious, strict=True)]
        return found

    def describe(
        self, image: Image.Image, prompts: Sequence[Prompt], task: str = "caption", **generation: Any
    ) -> list[Caption]:
        self.set_image(image)
        return self.predict(prompts, task=task, **generation)

    @torch.inference_mode()
    def encode(self, images: Sequence[Image.Image]) -> Encoded:
        """Several images in one batch, for `answer`."""
        pixels = self.processor.pixels(images).to(self.device, self.model.task_tokens.dtype)
        return Encoded(self.model.encode(pixels), [self.processor.frame(*image.size) for image in images])

    @torch.inference_mode()
    def answer(
        self,
        encoded: Encoded,
        requests: Sequence[Sequence[Prompt]],
        task: str = "caption",
        *,
        masks: bool = True,
        **generation: Any,
    ) -> list[list[Caption]]:
        """Any number of prompts for each encoded image: a list of captions an image, in the order of the prompts.

        masks: whether full-size masks are wanted. Without, a caption that was not asked for by a box has none either.
        """
        if task not in TASKS:
            raise ValueError(f"no task {task!r}: there are {' and '.join(map(repr, TASKS))}")
        flat = [(owner, prompt, region) for owner, r in enumerate(requests) for region, prompt in enumerate(r)]
        answers: list[Caption | None] = [None] * len(flat)
        for places, prompts in self.processor.prompts(requests, encoded.frames):
            told, codes, ious = self._bucket(encoded, prompts, TASKS.index(task), masks, generation)
            for row, place in enumerate(places):
                _, prompt, region = flat[place]
                box = prompt.box or (codes[row] and box_of(codes[row]))
                (text, score), *others = told[row]
                answers[place] = Caption(text, score, box, codes[row], ious[row], prompt, region, tuple(others))
        captions: list[list[Caption]] = [[] for _ in requests]
        for (owner, _, _), answer in zip(flat, answers, strict=True):
            captions[owner].append(answer)
        return captions

    def _bucket(
        self, encoded: Encoded, prompts: Prompts, task: int, masks: bool, generation: Mapping[str, Any]
    ) -> tuple[list[list[tuple[str, float]]], list[Any], list[Any]]:
        """Texts with their scores, mask (RLE) and predicted IoU of each row of homogeneous prompts; the last two may be
        None.
        """
        prefixes, codes, ious = [], [], []
        prepared = None
        for chunk in prompts.to(self.device).chunks(self.regions):
            regions = self.model.segment(encoded.features, chunk)
            prepared = self.model.prepare(regions) if prepared is None else prepared
            tasks = torch.full((len(chunk),), task, device=self.device)
            prefixes.append(self.model.prefix(self.model.mix(regions, prepared), tasks))
            if regions.masks is not None and masks:
                best = best_masks(regions.masks, regions.scores)
                codes += self._masks(best, chunk.owner, encoded.frames)
            if regions.scores is not None:
                ious += regions.scores.amax(1).float().clamp(0, 1).tolist()
            del regions  # the grids of its regions are large, and words need room
        settings = {**self.model.spec.generation, **generation}
        generated = self.model.language_model.generate(torch.cat(prefixes), **settings)
        nothing = [None] * len(prompts)
        scores = generated.scores.exp().tolist()
        told = [list(zip(self._texts(ids), each, strict=True)) for ids, each in zip(generated.ids, scores, strict=True)]
        return told, codes or nothing, ious or nothing

    def _masks(self, logits: Tensor, owner: Tensor, frames: Sequence[Frame]) -> Iterator[dict[str, Any]]:
        """(N, 4h, 4w) logits -> RLE in image pixels, one at a time: full-size logits of many regions are large."""
        for row, image in zip(logits, owner.tolist(), strict=True):
            yield encode((self.processor.masks(row[None, None], frames[image])[0, 0] > 0).cpu().numpy())

    def _texts(self, ids: Tensor) -> list[str]:
        tokenizer = self.model.language_model.tokenizer
        if tokenizer is None:
            raise ValueError(
                "the language model has no tokenizer, so it gives ids and no words: give it one with "
                "`sca import MODEL OUT --tokenizer FOLDER`, or use SegmentCaptioner.generate"
            )
        return [tokenizer.decode(row) for row in ids.tolist()]
