"""Predictor for one image at a time, like SAM's `SamPredictor`: `set_image` once, then any number of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from sca_registry.contracts import Caption, Prompt, Proposals
from sca_registry.spec import EverythingOptions, make_everything_options

from sca.hints import check_argument_names
from sca.inference.engine import REGION_BATCH_SIZE, EncodedImages, Engine, MaskEngine, PredictedMask
from sca.inference.generation_options import resolve_generation_options
from sca.inference.prompt_arguments import check_prompts, check_task, collect_prompts
from sca.inference.text_search import (
    CandidateRegion,
    RegionIndex,
    check_can_find,
    check_text,
    find_candidate_regions,
    find_regions,
    index_regions,
)
from sca.inference.zoom import caption_regions, segment_regions
from sca.inference.zoom_options import DEFAULT_ZOOM, ZoomValue, resolve_zoom
from sca.io.errors import InputError
from sca.io.images import convert_to_rgb
from sca.io.masks import RLE
from sca.io.text import format_count
from sca.io.validation import check_range, check_type

if TYPE_CHECKING:
    from sca.model import SegmentCaptioner

ENCODE_BATCH_SIZE = 8  # images per batch of the encoder


class Predictor:
    """Predict masks and captions. Call `set_image` once, then `predict` for any number of regions.

        predictor = sca.Predictor(sca.load("sca-tiny"))
        predictor.set_image(image)
        captions = predictor.predict(boxes=[(370, 434, 448, 512)])

    Args:
        model: A `SegmentCaptioner`, which is set to eval mode, or a `MaskEngine`, such as the result of
            `sca.load_captioner("sam-vit-b+blip-base")`.
        region_batch_size: Regions per batch of the segmenter and the mixer. Affects memory, not results. Only for a
            `SegmentCaptioner`; for a `MaskEngine`, pass it to `sca.load_captioner`.

    Attributes:
        engine: Engine that runs the model: `model` itself if it is a `MaskEngine`.
        image: Current image, upright; None before `set_image`.
        encoded: Features of the current image; None before `set_image`.

    Raises:
        ValueError: `model` has an unsupported type (for example, it is a name), or `region_batch_size` is set for a
            `MaskEngine`.
    """

    def __init__(self, model: SegmentCaptioner | MaskEngine, region_batch_size: int | None = None):
        if isinstance(model, MaskEngine) and region_batch_size is not None:
            raise ValueError("region_batch_size is an option of the captioner; pass it to sca.load_captioner")
        self.engine: MaskEngine = (
            model if isinstance(model, MaskEngine) else Engine(model, region_batch_size or REGION_BATCH_SIZE)
        )
        self.image: Image.Image | None = None
        self.encoded: EncodedImages | None = None
        self._region_index: tuple[Any, Sequence[CandidateRegion], RegionIndex | None] | None = None

    @property
    def model(self) -> Any:
        """The model; None for a captioner without an encoder."""
        return self.engine.model

    @property
    def ood_score(self) -> float | None:
        """OOD (out-of-distribution) score of the current image: above 1, it is unlike the training images.

        None before `set_image`, and for a model whose training images are unknown.
        """
        scores = None if self.encoded is None else self.engine.compute_ood_scores(self.encoded)
        return None if scores is None else scores[0]

    def set_image(self, image: Image.Image | np.ndarray) -> None:
        """Encode an image for subsequent predictions.

        Args:
            image: PIL image, whose EXIF orientation is applied, or (height, width, 3) uint8 array in RGB. Coordinates
                of prompts and results are pixels of the upright image, which is stored as `image`.

        Raises:
            InputError: The array has an unsupported shape or dtype.
            ValueError: The encoder returns NaN or infinite features.
        """
        self.image = convert_to_rgb(image)
        self.encoded = self.engine.encode([self.image])
        self._region_index = None

    @check_argument_names()
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
        question: str | None = None,
        length: str | None = None,
        zoom: ZoomValue = DEFAULT_ZOOM,
    ) -> list[Caption]:
        """Caption regions of the current image.

        Coordinates are pixels of the upright image: x to the right, y down. Generation options that are None use the
        defaults of the model; see `sca.inference.generation_options.resolve_generation_options`.

        Args:
            prompts: Regions with any combination of a box, points and a mask.
            boxes: (N, 4) x1, y1, x2, y2, clipped to the image; each box is one region.
            points: (N, 2) x, y; each foreground point is one region.
            masks: (height, width) arrays or COCO RLEs; each mask is one region.
            task: "caption", "recognition" for a class name, or a further task of the model.
            max_new_tokens: Maximum number of tokens per caption.
            num_beams: Number of beams.
            num_captions: Captions per region; all but the best are in `Caption.alternatives`. Without sampling,
                `num_beams` defaults to at least this number.
            do_sample: Sample tokens instead of decoding greedily.
            temperature: Sampling temperature.
            top_p: Probability mass for nucleus sampling.
            seed: Random seed for sampling.
            question: Question to answer about each region instead of captioning it. "<region 1>" refers to the first
                region, "<region 2>" to the second, and so on; a question with such references has one answer, that of
                the first region that it refers to.
            length: Length of the captions: "short" (up to 3 words), "phrase" (4 to 8 words) or "full".
            zoom: Predict small regions from crops: "auto" with the measured options of the model, "off", or the area of
                the largest of these regions in cells of the feature grid; see `sca.inference.zoom`.

        Returns:
            A caption for each region, in the order prompts, boxes, points, masks; or the answer to the question.

        Raises:
            TypeError: Unknown keyword argument; the message suggests the closest one.
            ValueError: No image is set, no region is given, a box or point is outside the image, a mask and the image
                differ in size, a value is out of range, or the model does not support questions.
        """
        request = self._collect_prompts(prompts, boxes, points, masks)
        generation = resolve_generation_options(
            self.engine,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            num_captions=num_captions,
            do_sample=do_sample,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            question=question,
            length=length,
        )
        assert self.encoded is not None  # see `_collect_prompts`
        zoom_options = resolve_zoom(self.engine, zoom)
        return caption_regions(self.engine, self.encoded, [request], task, zoom_options, **generation)[0]

    @check_argument_names(*vars(EverythingOptions()))
    def find(
        self,
        text: str | Sequence[str],
        prompts: Sequence[Prompt] | None = None,
        *,
        boxes: Sequence[Sequence[float]] | None = None,
        points: Sequence[Sequence[float]] | None = None,
        masks: Sequence[np.ndarray | RLE] | None = None,
        proposals: Proposals | None = None,
        top: int | None = None,
        threshold: float | None = None,
        **kwargs: Any,
    ) -> list[Caption]:
        """Find the regions of the current image that match a text.

        Without regions and proposals, everything mode finds the regions. Regions without masks are embedded once:
        further calls with the same regions only score the text. See `sca.inference.text_search` for the score.

        Args:
            text: Text, or several.
            prompts: Regions with any combination of a box, points and a mask.
            boxes: (N, 4) x1, y1, x2, y2, clipped to the image; each box is one region.
            points: (N, 2) x, y; each foreground point is one region.
            masks: (height, width) arrays or COCO RLEs; each mask is one region.
            proposals: Regions of a proposer, as for `sca.caption_everything`.
            top: Maximum number of regions per text.
            threshold: Minimum score: 1 for a text that is certain for a region, 0 for one that is as likely without an
                image. None returns all regions.
            **kwargs: Fields of `EverythingOptions`, for everything mode and point proposals.

        Returns:
            Captions of the regions, best match first. `name` is the text and `proposal_score` its score; `text` is the
            greedy caption of the region. Empty if everything mode or the proposer finds no region.

        Raises:
            TypeError: Unknown keyword argument; the message suggests the closest one.
            ValueError: No image is set, the captioner cannot score a text, a text is empty or too long, a value is out
                of range, or `predict` would reject the regions.
        """
        engine = check_can_find(self.engine)
        if self.image is None or self.encoded is None:
            raise ValueError("no image is set; call set_image(image) first")
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, Sequence) or not all(isinstance(each, str) for each in texts):
            raise InputError(f"text is {text!r:.80}; expected a string or a list of strings")
        if not texts:
            raise InputError("the text is empty; pass a word or a phrase, such as 'a red circle'")
        for each in texts:
            check_text(engine, each)
        if top is not None:
            check_range("top", top, int, 1)
        if threshold is not None:
            check_type("threshold", threshold, float)
        has_prompts = any(each is not None for each in (prompts, boxes, points, masks))
        if has_prompts and (kwargs or proposals is not None):
            raise ValueError("regions cannot be combined with proposals or search options; omit one of them")
        request = self._collect_prompts(prompts, boxes, points, masks) if has_prompts else None
        options = make_everything_options({**vars(engine.everything), **kwargs})
        regions, index = self._index_regions(request, proposals, options)
        return [] if index is None else find_regions(engine, self.encoded, regions, index, texts, top, threshold)

    def _index_regions(
        self, request: Sequence[Prompt] | None, proposals: Proposals | None, options: EverythingOptions
    ) -> tuple[Sequence[CandidateRegion], RegionIndex | None]:
        """Return the regions to search and their index, which is kept for the next call with the same arguments.

        The index is None if there are no regions.
        """
        assert self.encoded is not None  # see `find`
        index_arguments = (
            None if request is None else tuple(map(_get_coordinates, request)),
            None if proposals is None else tuple(map(_get_coordinates, proposals.prompts)),
            None if proposals is None else tuple(map(float, proposals.scores)),
            options,
        )
        has_masks = any(each.mask is not None for each in (*(request or ()), *(proposals.prompts if proposals else ())))
        if not has_masks and self._region_index is not None and self._region_index[0] == index_arguments:
            return self._region_index[1:]
        engine = check_can_find(self.engine)
        if request is None:
            regions = find_candidate_regions(engine, self.encoded, options, proposals)
        else:
            regions = [CandidateRegion(prompt, None, region_id) for region_id, prompt in enumerate(request)]
        index = index_regions(engine, self.encoded, [[each.prompt for each in regions]]) if regions else None
        self._region_index = None if has_masks else (index_arguments, regions, index)
        return regions, index

    @check_argument_names()
    def segment(
        self,
        prompts: Sequence[Prompt] = (),
        *,
        boxes: Sequence[Sequence[float]] = (),
        points: Sequence[Sequence[float]] = (),
        masks: Sequence[np.ndarray | RLE] = (),
        multimask_output: bool = True,
        zoom: ZoomValue = DEFAULT_ZOOM,
    ) -> list[list[PredictedMask]]:
        """Predict the masks of regions of the current image, without captions.

        Args:
            prompts: Regions with any combination of a box, points and a mask.
            boxes: (N, 4) x1, y1, x2, y2, clipped to the image; each box is one region.
            points: (N, 2) x, y; each foreground point is one region.
            masks: (height, width) arrays or COCO RLEs; each mask is one region.
            multimask_output: Return all candidate masks of each region (three for SAM) instead of one.
            zoom: See `predict`.

        Returns:
            The masks of each region, highest predicted IoU first.

        Raises:
            TypeError: Unknown keyword argument; the message suggests the closest one.
            ValueError: See `predict`. Also raised if the segmenter predicts no masks.
        """
        request = self._collect_prompts(prompts, boxes, points, masks)
        assert self.encoded is not None  # see `_collect_prompts`
        zoom_options = resolve_zoom(self.engine, zoom)
        return segment_regions(self.engine, self.encoded, [request], multimask_output, zoom_options)

    @check_argument_names()
    def predict_batch(
        self,
        images: Sequence[Image.Image | np.ndarray],
        prompts: Sequence[Sequence[Prompt]],
        *,
        task: str = "caption",
        max_new_tokens: int | None = None,
        num_beams: int | None = None,
        num_captions: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        question: str | None = None,
        length: str | None = None,
        zoom: ZoomValue = DEFAULT_ZOOM,
    ) -> list[list[Caption]]:
        """Caption regions of several images, without changing the current image.

        Args:
            images: Images as for `set_image`, encoded in batches of `ENCODE_BATCH_SIZE`.
            prompts: One list of prompts per image; a list can be empty.
            task: "caption", "recognition" for class names, or a further task of the model.
            max_new_tokens: Maximum number of tokens per caption.
            num_beams: Number of beams.
            num_captions: Captions per region; all but the best are in `Caption.alternatives`. Without sampling,
                `num_beams` defaults to at least this number.
            do_sample: Sample tokens instead of decoding greedily.
            temperature: Sampling temperature.
            top_p: Probability mass for nucleus sampling.
            seed: Random seed for sampling.
            question: Question to answer about each region, see `predict`.
            length: Length of the captions, see `predict`.
            zoom: Predict small regions from crops: "auto" with the measured options of the model, "off", or the area of
                the largest of these regions in cells of the feature grid; see `sca.inference.zoom`.

        Returns:
            The captions of each image, in the order of its regions.

        Raises:
            TypeError: Unknown keyword argument; the message suggests the closest one.
            ValueError: The numbers of images and of lists of prompts differ, no region is given, a value is out of
                range, or an image or its prompts are invalid. In the last case, the message contains the index of the
                image.
        """
        check_task(task, self.engine.tasks)
        if not isinstance(images, Sequence | np.ndarray) or not isinstance(prompts, Sequence):
            raise ValueError("images and prompts must be lists, with one list of prompts per image")
        if len(images) != len(prompts):
            counts = f"{format_count(len(images), 'image')}, but {format_count(len(prompts), 'list')} of prompts"
            raise ValueError(f"{counts}; pass one list of prompts per image")
        upright_images, checked_requests = [], []
        for index, (image, request) in enumerate(zip(images, prompts, strict=True)):
            try:
                upright_images.append(convert_to_rgb(image))
                checked_requests.append(check_prompts(request, *upright_images[-1].size))
            except ValueError as error:
                raise type(error)(f"image {index}: {error}") from error
        if not any(checked_requests):
            raise InputError("no regions; pass at least one prompt")
        generation = resolve_generation_options(
            self.engine,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            num_captions=num_captions,
            do_sample=do_sample,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            question=question,
            length=length,
        )
        zoom_options = resolve_zoom(self.engine, zoom)
        results: list[list[Caption]] = []
        for start in range(0, len(upright_images), ENCODE_BATCH_SIZE):
            batch = slice(start, start + ENCODE_BATCH_SIZE)
            encoded = self.engine.encode(upright_images[batch])
            results += caption_regions(self.engine, encoded, checked_requests[batch], task, zoom_options, **generation)
        return results

    def _collect_prompts(
        self,
        prompts: Sequence[Prompt] | None,
        boxes: Sequence[Sequence[float]] | None,
        points: Sequence[Sequence[float]] | None,
        masks: Sequence[np.ndarray | RLE] | None,
    ) -> list[Prompt]:
        if self.image is None:
            raise ValueError("no image is set; call set_image(image) first")
        return collect_prompts(prompts, boxes, points, masks, self.image.size)


def _get_coordinates(prompt: Prompt) -> tuple[Any, ...]:
    """Return the box and the points of a prompt as plain numbers, which can be compared."""
    box = None if prompt.box is None else tuple(map(float, prompt.box))
    return box, tuple(tuple(map(float, point)) for point in prompt.points)
