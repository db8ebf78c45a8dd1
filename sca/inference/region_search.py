"""Search an image for regions with a grid of point prompts, as in SAM's automatic mask generator (arXiv 2304.02643).

The full image and each crop are encoded once. The masks are filtered as in SAM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from pycocotools import mask as coco
from sca_registry.contracts import Prompt, PromptBatch, Proposals
from sca_registry.spec import EverythingOptions
from torch import Tensor

from sca.inference.engine import EncodedImages, MaskEngine, PredictedMask
from sca.io.masks import RLE, compute_mask_area, encode_rle
from sca.nn.boxes import compute_box_iou
from sca.nn.nms import suppress_overlaps

Window = tuple[int, int, int, int]  # x1 y1 x2 y2, image pixels
SEARCH_VERSION = 2  # incremented when the same options find other regions
CROP_EDGE_TOLERANCE = 20  # pixels: a mask that ends this close to the edge of a crop counts as cut off
MASKS_PER_CHUNK = 16  # masks measured per step of a search


class SearchProgress(NamedTuple):
    """Progress of a search.

    Attributes:
        processed_points: Points processed so far.
        total_points: Points of the whole search.
    """

    processed_points: int
    total_points: int


class Candidate(NamedTuple):
    """Region found by a search, without a caption.

    Attributes:
        mask: Mask in image pixels.
        box: x1 y1 x2 y2 of the mask in image pixels.
        point: x y of the point prompt in image pixels.
        predicted_iou: IoU predicted by the segmenter; can exceed 1.
        window: Crop in which the region was found.
    """

    mask: RLE
    box: tuple[float, float, float, float]
    point: tuple[float, float]
    predicted_iou: float
    window: Window


def find_everything(
    engine: MaskEngine,
    encoded: EncodedImages,
    options: EverythingOptions | None = None,
    proposals: Proposals | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[PredictedMask], list[Prompt]]:
    """Run `search_everything` to its end.

    Args:
        engine: Engine with an encoder and a segmenter.
        encoded: Result of `engine.encode` for one image.
        options: Options for finding regions; None uses the model's options.
        proposals: Prompts that replace the grid and the crops; only single points are used.
        progress: Function called with the number of processed points and the total.

    Returns:
        The result of `search_everything`.

    Raises:
        ValueError: The engine cannot predict masks.
    """
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
    """Search an image for regions, step by step.

    The engine can process other images between two steps. `close()` aborts the search.

    Args:
        engine: Engine with an encoder and a segmenter.
        encoded: Result of `engine.encode` for one image.
        options: Options for finding regions; None uses the model's options.
        proposals: Prompts that replace the grid and the crops; only single points are used.
        max_found_regions: Maximum number of regions to find.
        max_bytes: Maximum bytes of candidate masks in memory.

    Returns:
        A generator that yields the progress after each step, and returns the masks found from points, highest predicted
        IoU first, and the prompt to caption each from: the arguments of `MaskEngine.caption_masks`.

    Raises:
        ValueError: The engine has no segmenter, the segmenter predicts no masks, or a maximum is exceeded.
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


def select_region_proposals(proposals: Proposals, max_count: int | None) -> Proposals:
    """Select the proposals that are not single points.

    Args:
        proposals: Proposals of an image.
        max_count: Maximum number of proposals, best scores first; None for all.

    Returns:
        The selected proposals, in their order.
    """
    indices = [index for index, prompt in enumerate(proposals.prompts) if not _is_single_point(prompt)]
    best_indices = sorted(indices, key=lambda index: -proposals.scores[index])[:max_count]
    rows = [(proposals.prompts[i], float(proposals.scores[i]), proposals.names[i]) for i in sorted(best_indices)]
    return Proposals(*zip(*rows, strict=True)) if rows else Proposals((), (), ())


def _search_windows(
    engine: MaskEngine,
    encoded_image: EncodedImages,
    options: EverythingOptions,
    proposals: Proposals | None = None,
    max_found_regions: int | None = None,
    max_bytes: int | None = None,
) -> Generator[SearchProgress, None, list[Candidate]]:
    """Search the full image and its crops; return the regions without duplicates, best first."""
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
    if len(windows) > 1:  # of duplicates across windows, keep the one from the smallest window
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
    """Search a window with points (P, 2) in image pixels; yield candidates, and the points processed after a step."""
    (frame,) = encoded.frames
    _, processor = engine.require_segmenter()
    x1, y1, x2, y2 = window
    width, height = image_size
    done = 0
    for points_done, masks, scores, point_indices in _iter_mask_candidates(
        engine, encoded, points - torch.tensor(window[:2]), options
    ):
        for start in range(0, len(masks), MASKS_PER_CHUNK):
            yield done
            chunk = slice(start, start + MASKS_PER_CHUNK)
            stability, boxes = processor.compute_stability_and_boxes(
                masks[chunk], frame, options.stability_score_offset
            )
            is_kept = (boxes > 0).any(1) & (
                (stability >= options.stability_score_thresh) | (options.stability_score_thresh <= 0)
            )
            image_boxes = (boxes + torch.tensor((x1, y1) * 2, device=boxes.device)).tolist()
            kept_rows = [
                row
                for row, keep in enumerate(is_kept.tolist())
                if keep and not _is_cut_off(image_boxes[row], window, image_size)
            ]
            binary_masks = processor.iter_binary_masks(masks[chunk][kept_rows], [frame] * len(kept_rows))
            for row, binary_mask in zip(kept_rows, binary_masks, strict=True):
                mask = np.zeros((height, width), bool, order="F")
                mask[y1:y2, x1:x2] = binary_mask
                point = points[point_indices[start + row]].tolist()
                yield Candidate(
                    encode_rle(mask), tuple(image_boxes[row]), (point[0], point[1]), scores[start + row], window
                )
        done = points_done
        yield done


def _iter_mask_candidates(
    engine: MaskEngine, encoded: EncodedImages, points: Tensor, options: EverythingOptions
) -> Iterator[tuple[int, Tensor, list[float], list[int]]]:
    """Yield chunks: processed points, masks (K, 4h, 4w) above the IoU threshold, their IoUs and indices of points."""
    (frame,) = encoded.frames
    point_coords = (points * torch.tensor(frame.scale))[:, None]  # (P, 1, 2), model input
    labels = torch.ones(len(points), 1, dtype=torch.long)
    prompts = PromptBatch(torch.zeros(len(points), dtype=torch.long), points=point_coords, labels=labels).to(
        engine.device
    )
    model, _ = engine.require_segmenter()
    features = encoded.require_features()
    min_iou = options.pred_iou_thresh if options.pred_iou_thresh > 0 else -math.inf
    for chunk_index, chunk in enumerate(prompts.iter_chunks(engine.region_batch_size)):
        masks, scores, region_index = model.predict_confident_masks(features, chunk, min_iou)
        start = chunk_index * engine.region_batch_size
        yield start + len(chunk), masks, scores.tolist(), (start + region_index).tolist()


def _suppress_overlaps(candidates: Sequence[Candidate], scores: Tensor, options: EverythingOptions) -> Iterator[int]:
    """Yield the indices of regions to keep, best first: NMS by boxes as in SAM, and optionally by masks."""
    boxes = torch.tensor([each.box for each in candidates]).reshape(-1, 4)
    boxes[:, 2:] -= 1  # SAM's boxes end at the last pixel

    def are_overlapping(index: int, others: Tensor) -> Tensor:
        box_ious = compute_box_iou(boxes[[index]], boxes[others])[0]
        is_same = box_ious > options.box_nms_thresh
        nearby = (box_ious.gt(0) & ~is_same).nonzero()[:, 0] if options.mask_nms_thresh < 1 else ()
        if len(nearby):  # masks overlap only where boxes do
            rles = [candidates[other].mask for other in others[nearby].tolist()]
            mask_ious = coco.iou([candidates[index].mask], rles, [0] * len(rles))[0]
            is_same[nearby] = torch.from_numpy(mask_ious > options.mask_nms_thresh)
        return is_same

    return suppress_overlaps(are_overlapping, scores)


def _make_grid(window: Window, points_per_side: int) -> Tensor:
    """Return the (points_per_side ** 2, 2) x y of the centers of equal cells of a window."""
    x1, y1, x2, y2 = window
    cell_centers = (torch.arange(points_per_side) + 0.5) / points_per_side
    y, x = torch.meshgrid(y1 + cell_centers * (y2 - y1), x1 + cell_centers * (x2 - x1), indexing="ij")
    return torch.stack((x, y), dim=-1).reshape(-1, 2)


def _make_crops(width: int, height: int, layers: int, overlap_ratio: float) -> list[Window]:
    """Return SAM's crops: 2^i x 2^i in layer i, whose overlap is a fraction of the shorter side, halved per layer."""
    windows = []
    for layer in range(1, layers + 1):
        crops_per_side = 2**layer
        overlap_pixels = int(overlap_ratio * min(width, height) * 2 / crops_per_side)
        crop_width, crop_height = (
            math.ceil((overlap_pixels * (crops_per_side - 1) + side) / crops_per_side) for side in (width, height)
        )
        # SAM's order, which breaks ties between masks of equal score
        grid_cells = product(range(crops_per_side), repeat=2)
        origins = [((crop_width - overlap_pixels) * i, (crop_height - overlap_pixels) * j) for i, j in grid_cells]
        windows += [(x, y, min(x + crop_width, width), min(y + crop_height, height)) for x, y in origins]
    return [(x1, y1, x2, y2) for x1, y1, x2, y2 in windows if x1 < x2 and y1 < y2]  # narrow images have fewer crops


def _is_cut_off(box: Sequence[float], window: Window, image_size: tuple[int, int]) -> bool:
    """Whether a box ends near an edge of the window that is not near an edge of the image."""
    x1, y1, x2, y2 = box
    inclusive_box = (x1, y1, x2 - 1, y2 - 1)  # SAM's boxes end at the last pixel
    limits = (0, 0, *image_size)
    return any(
        abs(at - edge) <= CROP_EDGE_TOLERANCE and abs(at - limit) > CROP_EDGE_TOLERANCE
        for at, edge, limit in zip(inclusive_box, window, limits, strict=True)
    )
