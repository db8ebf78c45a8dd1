"""Segment and caption everything: masks of a grid of points, and captions for those that survive.

The filters and the crops are those of SAM's automatic mask generator (arXiv 2304.02643). The image is encoded once, and
once more for each crop; captions are generated only for the masks that remain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools import mask as coco
from sca_registry.contracts import Caption, Prompt, PromptBatch, Proposals
from sca_registry.spec import EverythingOptions, make_everything_options
from torch import Tensor

from sca.inference.engine import EncodedImages, MaskEngine, PredictedMask
from sca.inference.generation_options import GENERATION_OPTIONS, reject_unknown_arguments, resolve_generation_options
from sca.inference.predictor import Predictor
from sca.inference.prompt_arguments import check_task
from sca.io.masks import RLE, compute_mask_area, encode_rle
from sca.nn.boxes import compute_box_iou
from sca.nn.nms import suppress_overlaps

Window = tuple[int, int, int, int]  # x1 y1 x2 y2, image pixels
EVERYTHING_ARGUMENTS = ("task", "options", "proposals", "progress", "max_regions")  # of `caption_everything`
SAM_OPTION_NAMES = {"min_mask_region_area": "min_area"}  # SAM's automatic mask generator -> here, where they differ
SEARCH_VERSION = 2  # of what a search finds: raised when the regions of the same settings change
CROP_EDGE_TOLERANCE = 20  # pixels: a mask that ends so close to the edge of a crop is taken to be cut off by it
MASKS_PER_CHUNK = 16  # masks are measured at a time: a small piece of work


class SearchProgress(NamedTuple):
    """Progress of a search: so many of all points have been looked at."""

    done: int
    points: int


class Candidate(NamedTuple):
    """A region, before a caption is thought of; image pixels."""

    mask: RLE
    box: tuple[float, float, float, float]
    point: tuple[float, float]
    predicted_iou: float  # predicted, may exceed 1
    window: Window  # that it was found in


def resolve_everything_options(captioner: Any, overrides: Mapping[str, Any]) -> EverythingOptions:
    """Return the search settings of a captioner with overrides.

    Args:
        captioner: A model; a captioner without settings of its own has SAM's.
        overrides: Fields of `EverythingOptions` by name; None keeps the captioner's value.
    """
    default_options = getattr(captioner, "everything", EverythingOptions())
    return replace(default_options, **{name: value for name, value in overrides.items() if value is not None})


@torch.inference_mode()
def caption_everything(
    predictor: Predictor,
    task: str = "caption",
    options: EverythingOptions | None = None,
    proposals: Proposals | None = None,
    progress: Callable[[int, int], None] | None = None,
    max_regions: int | None = None,
    **kwargs: Any,
) -> list[Caption]:
    """Caption every region found in the predictor's image, best first.

    Args:
        predictor: With an image set.
        task: "caption", or "recognition" for class names.
        options: Where and what to look for (default: the model's own settings).
        proposals: What to look at instead of the grid and the crops, such as a registered proposer returns. A single
            point inside is searched like a point of the grid. Any other prompt is a region already: it is captioned
            unchanged, in its order, after those that points find.
        progress: Called with the points looked at and the total.
        max_regions: Maximum regions to caption: first those that points find, by predicted IoU, then those that are
            regions already, by the scores of `proposals`.
        **kwargs: Fields of `EverythingOptions` that override those in `options`, and generation options of
            `Predictor.predict`.

    Raises:
        TypeError: An unknown keyword; names the closest one.
        ValueError: A value out of range.
    """
    default_fields = vars(EverythingOptions())
    reject_unknown_arguments(
        "caption_everything",
        kwargs.keys() - {*default_fields, *GENERATION_OPTIONS},
        (*EVERYTHING_ARGUMENTS, *default_fields, *GENERATION_OPTIONS),
        SAM_OPTION_NAMES,
    )
    check_task(task)
    if max_regions is not None and (not isinstance(max_regions, int) or max_regions < 1):
        raise ValueError(f"max_regions is {max_regions!r}; give a whole number, 1 or more")
    if not isinstance(options, EverythingOptions | None):
        raise ValueError(
            f"options is of type {type(options).__name__}; give sca.EverythingOptions(...), or its fields by name"
        )
    overrides = {name: value for name, value in kwargs.items() if name in default_fields and value is not None}
    if not isinstance(predictor, Predictor):
        raise ValueError(f"predictor is of type {type(predictor).__name__}; give sca.Predictor(...) with an image set")
    engine, encoded = predictor.engine, predictor.encoded
    options = make_everything_options({**vars(options or engine.everything), **overrides}) if overrides else options
    generation = resolve_generation_options(
        engine, **{name: kwargs[name] for name in kwargs.keys() & {*GENERATION_OPTIONS}}
    )
    if encoded is None:
        raise ValueError("there is no image yet: call set_image(image) first")
    masks, prompts = find_everything(engine, encoded, options, proposals, progress)
    masks, prompts = masks[:max_regions], prompts[:max_regions]
    captions = engine.caption_masks(encoded, masks, prompts, task, **generation) if masks else []
    max_proposed = None if max_regions is None else max_regions - len(masks)
    proposed_prompts = _select_region_prompts(proposals, max_proposed) if proposals else []
    if proposed_prompts:
        (proposed_captions,) = engine.caption_batch(encoded, [proposed_prompts], task, **generation)
        captions += [replace(each, region_id=len(masks) + each.region_id) for each in proposed_captions]
    return captions


def find_everything(
    engine: MaskEngine,
    encoded: EncodedImages,
    options: EverythingOptions | None = None,
    proposals: Proposals | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[PredictedMask], list[Prompt]]:
    """Return the result of `search_everything`; `progress` as for `caption_everything`."""
    search_steps, last_step = search_everything(engine, encoded, options, proposals), None
    while True:
        try:
            step = next(search_steps)
        except StopIteration as stop:
            return stop.value
        if progress and step != last_step:
            progress(*step)
        last_step = step


@torch.inference_mode()
def search_everything(
    engine: MaskEngine,
    encoded: EncodedImages,
    options: EverythingOptions | None = None,
    proposals: Proposals | None = None,
    *,
    max_found_regions: int | None = None,
    max_bytes: int | None = None,
) -> Generator[SearchProgress, None, tuple[list[PredictedMask], list[Prompt]]]:
    """Search an image as a generator: it yields its progress after every small piece of work.

    Between two pieces the engine may serve other images, and the search can be abandoned with `close()`.

    Args:
        engine: The engine, with an encoder and a segmenter.
        encoded: What `engine.encode` returned for one image.
        options: Where and what to look for (default: the model's own).
        proposals: What to look at instead of the grid and the crops of `options`.
        max_found_regions: Maximum regions to find; more raise ValueError.
        max_bytes: Maximum bytes of candidate masks to hold at a time.

    Returns:
        The masks that points find, best first, and the prompt that each is captioned from: the arguments of
        `MaskEngine.caption_masks`.

    Raises:
        ValueError: If there is no segmenter, it has no masks, or a maximum is exceeded.
    """
    engine.check_has_segmenter()
    options = options or engine.everything
    candidates = yield from _search_windows(engine, encoded, options, proposals, max_found_regions, max_bytes)
    masks = [PredictedMask(dict(each.mask), min(each.predicted_iou, 1.0)) for each in candidates]
    has_box, has_point = ("box" in options.caption_from, "point" in options.caption_from)
    points = [((*each.point, 1),) if has_point else () for each in candidates]
    return masks, [Prompt(each.box if has_box else None, point) for each, point in zip(candidates, points, strict=True)]


def _is_single_point(prompt: Prompt) -> bool:
    return prompt.box is None and prompt.mask is None and [label for _, _, label in prompt.points] == [1]


def _select_region_prompts(proposals: Proposals, max_count: int | None) -> list[Prompt]:
    """Return the `max_count` prompts with the best scores that are regions already, in order."""
    indices = [place for place, prompt in enumerate(proposals.prompts) if not _is_single_point(prompt)]
    best_indices = sorted(indices, key=lambda place: -proposals.scores[place])[:max_count]
    return [proposals.prompts[place] for place in sorted(best_indices)]


def _search_windows(
    engine: MaskEngine,
    encoded_image: EncodedImages,
    options: EverythingOptions,
    proposals: Proposals | None = None,
    max_found_regions: int | None = None,
    max_bytes: int | None = None,
) -> Generator[SearchProgress, None, list[Candidate]]:
    """What points find, best first, each region once."""
    (image,) = encoded_image.images
    full_window = (0, 0, *image.size)
    windows = [full_window]
    points: list[Tensor] = []
    if proposals is None:
        windows += _make_crops(*image.size, options.crop_n_layers, options.crop_overlap_ratio)
        points = [_make_grid(window, options.points_per_side) for window in windows]
    else:
        point_coords = [each.points[0][:2] for each in proposals.prompts if _is_single_point(each)]
        points = [torch.tensor(point_coords, dtype=torch.float32).reshape(-1, 2)]
    total_points, previously_done = sum(map(len, points)), 0
    kept: list[Candidate] = []
    for window, window_points in zip(windows, points, strict=True):
        if not len(window_points):
            continue
        encoded = encoded_image if window == full_window else engine.encode([image.crop(window)])
        candidates: list[Candidate] = []
        points_done, held_bytes = 0, sum(len(each.mask["counts"]) for each in kept)
        for step in _search_window(engine, encoded, image.size, window, window_points, options):
            if isinstance(step, Candidate):
                candidates.append(step)
                held_bytes += len(step.mask["counts"])
                if max_bytes is not None and held_bytes > max_bytes:
                    raise ValueError(
                        "too many masks pass the filters; raise pred_iou_thresh or stability_score_thresh, or lower "
                        "points_per_side"
                    )
            else:
                points_done = step
            yield SearchProgress(previously_done + points_done, total_points)
        previously_done += len(window_points)
        for index in _suppress_overlaps(candidates, torch.tensor([each.predicted_iou for each in candidates]), options):
            kept.append(candidates[index])
            if max_found_regions is not None and len(kept) > max_found_regions:
                raise ValueError(
                    f"more than {max_found_regions:,} regions were found; raise pred_iou_thresh or "
                    "stability_score_thresh, or lower box_nms_thresh"
                )
            yield SearchProgress(previously_done, total_points)
    if len(windows) > 1:  # of what several windows show, the closest look stays
        negative_areas = torch.tensor([-float((w[2] - w[0]) * (w[3] - w[1])) for w in (each.window for each in kept)])
        overlapping, kept = kept, []
        for index in _suppress_overlaps(overlapping, negative_areas, options):
            kept.append(overlapping[index])
            yield SearchProgress(previously_done, total_points)
    num_pixels = image.width * image.height
    return sorted(
        (each for each in kept if options.min_area <= compute_mask_area(each.mask) / num_pixels <= options.max_area),
        key=lambda each: -each.predicted_iou,
    )


def _search_window(
    engine: MaskEngine,
    encoded: EncodedImages,
    image_size: tuple[int, int],
    window: Window,
    points: Tensor,
    options: EverythingOptions,
) -> Iterator[int | Candidate]:
    """Regions that points (P, 2), image pixels, find in a window of an image of (width, height), and after every small
    piece of work the number of points that have been looked at.
    """
    (frame,) = encoded.frames
    x1, y1, x2, y2 = window
    width, height = image_size
    done = 0
    for points_done, masks, scores, point_indices in _iter_mask_candidates(
        engine, encoded, points - torch.tensor(window[:2]), options
    ):
        for start in range(0, len(masks), MASKS_PER_CHUNK):
            yield done
            chunk = slice(start, start + MASKS_PER_CHUNK)
            stability, boxes = engine.processor.compute_stability_and_boxes(
                masks[chunk], frame, options.stability_score_offset
            )
            is_kept = (boxes > 0).any(1) & (
                (stability >= options.stability_score_thresh) | (options.stability_score_thresh <= 0)
            )
            boxes = (boxes + torch.tensor((x1, y1) * 2, device=boxes.device)).tolist()
            kept_rows = [
                row
                for row, keep in enumerate(is_kept.tolist())
                if keep and not _is_cut_off(boxes[row], window, image_size)
            ]
            binary_masks = engine.processor.iter_binary_masks(masks[chunk][kept_rows], [frame] * len(kept_rows))
            for row, binary_mask in zip(kept_rows, binary_masks, strict=True):
                mask = np.zeros((height, width), bool, order="F")
                mask[y1:y2, x1:x2] = binary_mask
                point = points[point_indices[start + row]].tolist()
                yield Candidate(encode_rle(mask), tuple(boxes[row]), (point[0], point[1]), scores[start + row], window)
        done = points_done
        yield done


def _iter_mask_candidates(
    engine: MaskEngine, encoded: EncodedImages, points: Tensor, options: EverythingOptions
) -> Iterator[tuple[int, Tensor, list[float], list[int]]]:
    """A chunk at a time: points looked at so far, masks (K, 4h, 4w) whose predicted IoU is high enough, these IoUs,
    and the indices of the points that they are of.
    """
    (frame,) = encoded.frames
    point_coords = (points * torch.tensor(frame.scale))[:, None]  # (P, 1, 2), input frame
    labels = torch.ones(len(points), 1, dtype=torch.long)
    prompts = PromptBatch(torch.zeros(len(points), dtype=torch.long), points=point_coords, labels=labels).to(
        engine.device
    )
    for chunk_index, chunk in enumerate(prompts.iter_chunks(engine.region_batch_size)):
        segmenter_output = engine.model.segment(encoded.features, chunk)
        if segmenter_output.masks is None:
            raise ValueError(
                f"everything needs masks, and the segmenter {type(engine.model.segmenter).__name__} gives none: "
                "build the model with segmenter=sam"
            )
        masks, scores = segmenter_output.masks.flatten(0, 1).float(), segmenter_output.iou_scores.flatten().float()
        kept_indices = ((scores > options.pred_iou_thresh) | (options.pred_iou_thresh <= 0)).nonzero().squeeze(1)
        point_indices = kept_indices // segmenter_output.masks.shape[1] + chunk_index * engine.region_batch_size
        points_done = min((chunk_index + 1) * engine.region_batch_size, len(points))
        yield points_done, masks[kept_indices], scores[kept_indices].tolist(), point_indices.tolist()


def _suppress_overlaps(candidates: Sequence[Candidate], scores: Tensor, options: EverythingOptions) -> Iterator[int]:
    """Yield the indices of regions that stay, best first, by the IoU of boxes as SAM does and, if wanted, of masks."""
    boxes = torch.tensor([each.box for each in candidates]).reshape(-1, 4)
    boxes[:, 2:] -= 1  # SAM's boxes end at the last pixel

    def are_overlapping(index: int, others: Tensor) -> Tensor:
        box_ious = compute_box_iou(boxes[[index]], boxes[others])[0]
        is_same = box_ious > options.box_nms_thresh
        nearby = (box_ious.gt(0) & ~is_same).nonzero()[:, 0] if options.mask_nms_thresh < 1 else ()
        if len(nearby):  # masks overlap only where boxes do
            rles = [candidates[place].mask for place in others[nearby].tolist()]
            mask_ious = coco.iou([candidates[index].mask], rles, [0] * len(rles))[0]
            is_same[nearby] = torch.from_numpy(mask_ious > options.mask_nms_thresh)
        return is_same

    return suppress_overlaps(are_overlapping, scores)


def _make_grid(window: Window, points_per_side: int) -> Tensor:
    """(points_per_side ** 2, 2) x y in the middle of equal cells of a window."""
    x1, y1, x2, y2 = window
    cell_centers = (torch.arange(points_per_side) + 0.5) / points_per_side
    y, x = torch.meshgrid(y1 + cell_centers * (y2 - y1), x1 + cell_centers * (x2 - x1), indexing="ij")
    return torch.stack((x, y), dim=-1).reshape(-1, 2)


def _make_crops(width: int, height: int, layers: int, overlap_ratio: float) -> list[Window]:
    """SAM's crops: 2 ** i a side in layer i, which overlap by a share of the image's shorter side, halved each time."""
    windows = []
    for layer in range(1, layers + 1):
        crops_per_side = 2**layer
        overlap_pixels = int(overlap_ratio * min(width, height) * 2 / crops_per_side)
        crop_width, crop_height = (
            math.ceil((overlap_pixels * (crops_per_side - 1) + side) / crops_per_side) for side in (width, height)
        )
        grid_cells = product(
            range(crops_per_side), repeat=2
        )  # in SAM's order, which decides between equally good masks
        origins = [((crop_width - overlap_pixels) * i, (crop_height - overlap_pixels) * j) for i, j in grid_cells]
        windows += [(x, y, min(x + crop_width, width), min(y + crop_height, height)) for x, y in origins]
    return [(x1, y1, x2, y2) for x1, y1, x2, y2 in windows if x1 < x2 and y1 < y2]  # narrow images have fewer


def _is_cut_off(box: Sequence[float], window: Window, image_size: tuple[int, int]) -> bool:
    """Whether a box ends near an edge of the window that is not near an edge of the image."""
    x1, y1, x2, y2 = box
    inclusive_box = (x1, y1, x2 - 1, y2 - 1)  # SAM's boxes end at the last pixel
    limits = (0, 0, *image_size)
    return any(
        abs(at - edge) <= CROP_EDGE_TOLERANCE and abs(at - limit) > CROP_EDGE_TOLERANCE
        for at, edge, limit in zip(inclusive_box, window, limits, strict=True)
    )
