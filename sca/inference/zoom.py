"""Zoom: predict small regions a second time from a crop of the image.

A region that covers few cells of the feature grid has few features. With zoom, such a region is predicted from a crop
around it, which is encoded on its own. Crops come from a fixed set of windows of the image: their sides are the image
divided by powers of the square root of 2, and their positions multiples of a quarter of their sides. Near regions of
similar size therefore share a crop, and the crop of a region does not depend on the other regions of a request.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from sca_registry.contracts import Caption, Prompt, list_region_references
from sca_registry.spec import ZoomOptions

from sca.inference.engine import EncodedImages, MaskEngine, PredictedMask
from sca.inference.processor import InputFrame
from sca.io.masks import RLE, decode_rle, encode_rle, mask_to_box

Box = tuple[float, float, float, float]  # x1 y1 x2 y2, image pixels
Window = tuple[int, int, int, int]  # x1 y1 x2 y2, image pixels
Prediction = TypeVar("Prediction")
CROPS_PER_BATCH = 8  # crops per batch of the encoder
STEPS_PER_CROP_SIDE = 4  # positions of a window per side of the window


class Crop(NamedTuple):
    """Window of one of the images of a request.

    Attributes:
        image_index: Index of the image.
        window: Window of the image.
    """

    image_index: int
    window: Window


CropEncoder = Callable[[Sequence[Crop]], EncodedImages]


@torch.inference_mode()
def caption_regions(
    engine: MaskEngine,
    encoded: EncodedImages,
    requests: Sequence[Sequence[Prompt]],
    task: str = "caption",
    zoom: ZoomOptions | None = None,
    encode_crops: CropEncoder | None = None,
    **generation: Any,
) -> list[list[Caption]]:
    """Caption regions of encoded images, small ones from crops.

    Args:
        engine: Engine.
        encoded: Result of `engine.encode` for B images.
        requests: Prompts of each of the B images, checked against its size.
        task: "caption", "recognition" or a further task of the captioner.
        zoom: Result of `resolve_zoom`; None captions all regions from the images.
        encode_crops: Function that encodes crops; None to encode them here.
        **generation: As for `MaskEngine.caption_batch`.

    Returns:
        The captions of each image, in the order of its prompts, with masks and boxes in image pixels. A question about
        several regions has one answer per image, that of the first of these regions, and is answered without zoom.
    """
    if list_region_references(generation.get("question") or ""):
        zoom = None  # the regions of one question have to be in one image
    crops = _find_crops(engine, encoded, requests, zoom)
    if zoom is None or not any(crops):
        return engine.caption_batch(encoded, requests, task, **generation)

    caption_all: Callable[..., list[Caption]] = partial(_caption_all, engine, task=task, **generation)
    prompts = _list_prompts(requests)
    captions = _predict_regions(engine, encoded, requests, crops, encode_crops, caption_all)
    image_captions: dict[int, Caption] = {}
    if zoom.keep_best_caption:
        in_crop = [index for index, crop in enumerate(crops) if crop is not None]
        selected = _select_prompts(prompts, in_crop, len(requests))
        image_captions |= zip(in_crop, caption_all(encoded, selected, return_masks=False), strict=True)
    ood_scores: Sequence[float | None] = engine.compute_ood_scores(encoded) or [None] * len(requests)
    results: list[list[Caption]] = [[] for _ in requests]
    for index, ((image_index, prompt), crop) in enumerate(zip(prompts, crops, strict=True)):
        caption = captions[index]
        if crop is not None:
            size, ood_score = encoded.images[image_index].size, ood_scores[image_index]
            caption = _restore_caption(caption, prompt, crop.window, size, ood_score)
            caption = _keep_best_caption(caption, image_captions.get(index))
        results[image_index].append(replace(caption, region_id=len(results[image_index])))
    return results


@torch.inference_mode()
def caption_masks(
    engine: MaskEngine,
    encoded: EncodedImages,
    masks: Sequence[PredictedMask],
    prompts: Sequence[Prompt],
    task: str = "caption",
    zoom: ZoomOptions | None = None,
    encode_crops: CropEncoder | None = None,
    **generation: Any,
) -> list[Caption]:
    """Caption regions of an image whose masks are known, small ones from crops, where their masks are predicted again.

    Args:
        engine: Engine.
        encoded: Result of `engine.encode` for one image.
        masks: Masks of the regions.
        prompts: Prompt that the caption of each mask is generated from.
        task: "caption", "recognition" or a further task of the captioner.
        zoom: Result of `resolve_zoom`; None captions all regions from the image.
        encode_crops: Function that encodes crops; None to encode them here.
        **generation: As for `MaskEngine.caption_batch`.

    Returns:
        A caption for each mask, in order, with masks and boxes in image pixels. A region whose mask is empty in the
        crop keeps its mask.
    """
    (image,) = encoded.images
    ood_scores = engine.compute_ood_scores(encoded)
    ood_score = None if ood_scores is None else ood_scores[0]
    crops = _find_crops(engine, encoded, [prompts], zoom, masks)
    captions: dict[int, Caption] = {}
    keeps_best = zoom is not None and zoom.keep_best_caption
    if in_image := [row for row, crop in enumerate(crops) if crop is None or keeps_best]:
        known = [masks[row] for row in in_image], [prompts[row] for row in in_image]
        captions |= zip(in_image, engine.caption_masks(encoded, *known, task, **generation), strict=True)

    caption_all: Callable[..., list[Caption]] = partial(_caption_all, engine, task=task, **generation)
    for row, caption in _predict_in_crops(engine, encoded.images, prompts, crops, encode_crops, caption_all).items():
        crop, (rle, predicted_iou) = crops[row], masks[row]
        assert crop is not None  # see `_predict_in_crops`
        prompt = replace(prompts[row], box=None)
        caption = _restore_caption(caption, prompt, crop.window, image.size, ood_score)
        if caption.box is None:
            caption = replace(caption, mask=rle, box=mask_to_box(rle), predicted_iou=predicted_iou)
        captions[row] = _keep_best_caption(replace(caption, prompt=prompts[row]), captions.get(row))
    return [replace(captions[row], region_id=row) for row in range(len(prompts))]


@torch.inference_mode()
def segment_regions(
    engine: MaskEngine,
    encoded: EncodedImages,
    requests: Sequence[Sequence[Prompt]],
    multimask_output: bool = True,
    zoom: ZoomOptions | None = None,
    encode_crops: CropEncoder | None = None,
) -> list[list[PredictedMask]]:
    """Predict the candidate masks of each prompt, those of small regions from crops.

    Args:
        engine: Engine.
        encoded: Result of `engine.encode` for B images.
        requests: Prompts of each of the B images, checked against its size.
        multimask_output: As for `MaskEngine.segment`.
        zoom: Result of `resolve_zoom`; None predicts all masks from the images.
        encode_crops: Function that encodes crops; None to encode them here.

    Returns:
        The masks of each prompt in image pixels, highest predicted IoU first. The list is flat: prompts of all images
        in order.
    """
    crops = _find_crops(engine, encoded, requests, zoom)

    segment_all = partial(engine.segment, multimask_output=multimask_output)
    candidates = _predict_regions(engine, encoded, requests, crops, encode_crops, segment_all)
    sizes = [encoded.images[image_index].size for image_index, _ in _list_prompts(requests)]
    return [
        masks if crop is None else [PredictedMask(_restore_rle(rle, crop.window, size), iou) for rle, iou in masks]
        for masks, crop, size in zip(candidates, crops, sizes, strict=True)
    ]


def choose_window(box: Box, frame: InputFrame, input_size: int, zoom: ZoomOptions) -> Window | None:
    """Choose the window from which to predict a region.

    The window has the shape of the model input: square for encoders that pad images, and the shape of the image for
    those that stretch them. It contains the region with `zoom.context`, unless the edge of the image is nearer.

    Args:
        box: Box of the region.
        frame: Placement of the image in the model input.
        input_size: Side of the model input in pixels.
        zoom: Options.

    Returns:
        The window; None if no window magnifies the region.
    """
    scale = frame.scale
    longest_side = max((box[axis + 2] - box[axis]) * scale[axis] for axis in (0, 1))
    magnification = min(zoom.max_upscale / max(scale), input_size / max(zoom.context * longest_side, 1))
    level = math.floor(2 * math.log2(magnification) + 1e-6) if magnification > 0 else 0
    if level < 1:
        return None
    sides = [input_size / (2 ** (level / 2) * each) for each in scale]
    (x1, x2), (y1, y2) = (
        _place_window((box[axis] + box[axis + 2]) / 2, sides[axis], length)
        for axis, length in enumerate((frame.width, frame.height))
    )
    return x1, y1, x2, y2


def encode_image_crops(engine: MaskEngine, images: Sequence[Image.Image], crops: Sequence[Crop]) -> EncodedImages:
    """Encode crops, as is done without a `CropEncoder`.

    Args:
        engine: Engine.
        images: Images of the request.
        crops: Crops.

    Returns:
        Features of the crops.
    """
    return engine.encode([images[crop.image_index].crop(crop.window) for crop in crops])


def _caption_all(
    engine: MaskEngine,
    encoded_images: EncodedImages,
    requests: Sequence[Sequence[Prompt]],
    *,
    task: str,
    **generation: Any,
) -> list[Caption]:
    """Caption the regions of several images; return the captions in one list."""
    return list(chain(*engine.caption_batch(encoded_images, requests, task, **generation)))


def _list_prompts(requests: Sequence[Sequence[Prompt]]) -> list[tuple[int, Prompt]]:
    """Return the prompts of all images in order, with the index of their image."""
    return [(image_index, prompt) for image_index, request in enumerate(requests) for prompt in request]


def _find_crops(
    engine: MaskEngine,
    encoded: EncodedImages,
    requests: Sequence[Sequence[Prompt]],
    zoom: ZoomOptions | None,
    masks: Sequence[PredictedMask] | None = None,
) -> list[Crop | None]:
    """Return the crop of each region, whose mask may be known; None for regions that are predicted from the image."""
    if zoom is None or zoom.max_cells is None:
        return [None] * sum(map(len, requests))
    if masks is None:
        boxes = _find_region_boxes(engine, encoded, requests)
    else:
        boxes = [mask_to_box(mask.rle) for mask in masks]
    _, processor = engine.require_segmenter()
    input_size, stride = processor.image_format.size, processor.image_format.size / processor.grid_size
    crops: list[Crop | None] = []
    for (image_index, prompt), box in zip(_list_prompts(requests), boxes, strict=True):
        frame = encoded.frames[image_index]
        region_box = _include_points(box, prompt)
        window = None
        if region_box is not None and _count_cells(region_box, frame, stride) <= zoom.max_cells:
            window = choose_window(region_box, frame, input_size, zoom)
        crops.append(None if window is None else Crop(image_index, window))
    return crops


def _find_region_boxes(
    engine: MaskEngine, encoded: EncodedImages, requests: Sequence[Sequence[Prompt]]
) -> list[Box | None]:
    """Return the box of each region: that of its box and mask prompts, else of the predicted mask."""
    prompts = _list_prompts(requests)
    boxes = [_get_prompt_box(prompt) for _, prompt in prompts]
    unknown = [index for index, box in enumerate(boxes) if box is None]
    if unknown:
        masks = engine.predict_best_masks(encoded, _select_prompts(prompts, unknown, len(requests)))
        for index, mask in zip(unknown, masks, strict=True):
            boxes[index] = None if mask is None else mask_to_box(mask.rle)
    return boxes


def _select_prompts(
    prompts: Sequence[tuple[int, Prompt]], indices: Sequence[int], num_images: int
) -> list[list[Prompt]]:
    """Return the selected prompts by image."""
    requests: list[list[Prompt]] = [[] for _ in range(num_images)]
    for image_index, prompt in (prompts[index] for index in indices):
        requests[image_index].append(prompt)
    return requests


def _get_prompt_box(prompt: Prompt) -> Box | None:
    """Return the smallest box that contains the box and the mask of a prompt; None if it has neither."""
    return _merge_boxes(prompt.box, None if prompt.mask is None else mask_to_box(prompt.mask))


def _include_points(box: Box | None, prompt: Prompt) -> Box | None:
    """Return the smallest box that contains a box and the foreground points of a prompt."""
    return _merge_boxes(box, *((x, y, x, y) for x, y, label in prompt.points if label == 1))


def _merge_boxes(*boxes: Box | None) -> Box | None:
    """Return the smallest box that contains all boxes; None without any."""
    known_boxes = [box for box in boxes if box is not None]
    if not known_boxes:
        return None
    left, top, right, bottom = zip(*known_boxes, strict=True)
    return min(left), min(top), max(right), max(bottom)


def _count_cells(box: Box, frame: InputFrame, stride: float) -> float:
    """Return the area of a box in cells of the feature grid."""
    scale_x, scale_y = frame.scale
    return (box[2] - box[0]) * scale_x / stride * (box[3] - box[1]) * scale_y / stride


def _place_window(center: float, side: float, length: int) -> tuple[int, int]:
    """Return the start and end of the allowed window along one axis of an image that is nearest to a center."""
    pixels = min(max(round(side), 1), length)
    step = side / STEPS_PER_CROP_SIDE
    start = min(max(round(round((center - side / 2) / step) * step), 0), length - pixels)
    return start, start + pixels


def _predict_regions(
    engine: MaskEngine,
    encoded: EncodedImages,
    requests: Sequence[Sequence[Prompt]],
    crops: Sequence[Crop | None],
    encode_crops: CropEncoder | None,
    predict: Callable[[EncodedImages, Sequence[Sequence[Prompt]]], list[Prediction]],
) -> list[Prediction]:
    """Predict regions from their image or crop; return the predictions in the order of the prompts."""
    if not any(crops):
        return predict(encoded, requests)
    prompts = _list_prompts(requests)
    predictions: dict[int, Prediction] = {}
    if in_image := [index for index, crop in enumerate(crops) if crop is None]:
        predictions |= zip(in_image, predict(encoded, _select_prompts(prompts, in_image, len(requests))), strict=True)
    flat_prompts = [prompt for _, prompt in prompts]
    predictions |= _predict_in_crops(engine, encoded.images, flat_prompts, crops, encode_crops, predict)
    return [predictions[index] for index in range(len(prompts))]


def _predict_in_crops(
    engine: MaskEngine,
    images: Sequence[Image.Image],
    prompts: Sequence[Prompt],
    crops: Sequence[Crop | None],
    encode_crops: CropEncoder | None,
    predict: Callable[[EncodedImages, Sequence[Sequence[Prompt]]], list[Prediction]],
) -> dict[int, Prediction]:
    """Predict the regions that have a crop, a batch of crops at a time; return the predictions by prompt index."""
    indices_by_crop: dict[Crop, list[int]] = {}
    for index, crop in enumerate(crops):
        if crop is not None:
            indices_by_crop.setdefault(crop, []).append(index)
    encode = encode_crops or partial(encode_image_crops, engine, images)
    predictions: dict[int, Prediction] = {}
    entries = list(indices_by_crop.items())
    for start in range(0, len(entries), CROPS_PER_BATCH):
        batch = entries[start : start + CROPS_PER_BATCH]
        requests = [[_crop_prompt(prompts[index], crop.window) for index in indices] for crop, indices in batch]
        batch_indices = chain(*(indices for _, indices in batch))
        encoded = encode([crop for crop, _ in batch])
        frames = [
            frame._replace(whole_image=_locate_image(crop.window, images[crop.image_index].size))
            for frame, (crop, _) in zip(encoded.frames, batch, strict=True)
        ]
        predictions |= zip(batch_indices, predict(encoded._replace(frames=frames), requests), strict=True)
    return predictions


def _locate_image(window: Window, size: tuple[int, int]) -> Box:
    """Return the box of an image in pixels of its window."""
    x1, y1, _, _ = window
    return -x1, -y1, size[0] - x1, size[1] - y1


def _crop_prompt(prompt: Prompt, window: Window) -> Prompt:
    """Convert a prompt to pixels of a window: clip its box, crop its mask, and remove the points outside."""
    x1, y1, x2, y2 = window
    width, height = x2 - x1, y2 - y1
    box = prompt.box
    if box is not None:
        left, right = (min(max(x - x1, 0.0), float(width)) for x in (box[0], box[2]))
        top, bottom = (min(max(y - y1, 0.0), float(height)) for y in (box[1], box[3]))
        box = (left, top, right, bottom)
    points = tuple((x - x1, y - y1, label) for x, y, label in prompt.points if x1 <= x < x2 and y1 <= y < y2)
    return Prompt(box, points, None if prompt.mask is None else prompt.mask[y1:y2, x1:x2])


def _restore_caption(
    caption: Caption, prompt: Prompt, window: Window, image_size: tuple[int, int], ood_score: float | None
) -> Caption:
    """Convert a caption from pixels of a window to pixels of the image.

    It has the OOD score of the image, and no confidence, because models are calibrated on captions of images.
    """
    rle = None if caption.mask is None else _restore_rle(caption.mask, window, image_size)
    box = prompt.box or (mask_to_box(rle) if rle else None)
    return replace(caption, mask=rle, box=box, prompt=prompt, confidence=None, ood_score=ood_score)


def _keep_best_caption(caption: Caption, image_caption: Caption | None) -> Caption:
    """Return a caption from a crop, with the text of the caption from the image if that has a higher score."""
    if image_caption is None or not image_caption.score > caption.score:
        return caption
    text_fields = {name: getattr(image_caption, name) for name in ("text", "score", "alternatives", "usage")}
    return replace(caption, **text_fields)


def _restore_rle(rle: RLE, window: Window, image_size: tuple[int, int]) -> dict[str, Any]:
    """Convert a mask in a window to a mask of the image."""
    x1, y1, x2, y2 = window
    width, height = image_size
    mask = np.zeros((height, width), bool, order="F")
    mask[y1:y2, x1:x2] = decode_rle(rle)
    return encode_rle(mask)
