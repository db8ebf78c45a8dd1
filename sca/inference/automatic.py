"""Segment and caption everything: masks of a grid of points, and captions for those that survive.

The filters and the crops are those of SAM's automatic mask generator (arXiv 2304.02643). The image is encoded once, and
once more for each crop; words are generated only for the masks that are left at the end.
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
from sca_registry.spec import EverythingOptions, check_search
from torch import Tensor

from sca.inference.engine import Encoded, Mask, MaskEngine
from sca.inference.generation import OPTIONS, refuse_unknown, settle_generation
from sca.inference.predictor import Predictor
from sca.inference.requests import check_task
from sca.io.masks import RLE, area, encode
from sca.nn.boxes import compute_box_iou
from sca.nn.suppression import suppress_overlaps

Window = tuple[int, int, int, int]  # x1 y1 x2 y2, image pixels
ARGUMENTS = ("task", "options", "proposals", "progress", "max_regions")  # of `caption_everything`
SAM_NAMES = {  # of the options of SAM's automatic mask generator, those here
    "points_per_side": "points",
    "pred_iou_thresh": "iou",
    "stability_score_thresh": "stability",
    "stability_score_offset": "offset",
    "box_nms_thresh": "nms",
    "crop_n_layers": "crops",
    "crop_overlap_ratio": "crop_overlap",
    "min_mask_region_area": "area",
}
SEARCH_VERSION = 2  # of what a search finds: raised when the regions of the same settings change
NEAR = 20  # pixels: a mask that ends so close to the edge of a crop is taken to be cut off by it
MEASURED = 16  # masks are measured at a time: a small piece of work


class Searched(NamedTuple):
    """Progress of a search: so many of all points have been looked at."""

    done: int
    points: int


class Found(NamedTuple):
    """A region, before a caption is thought of; image pixels."""

    mask: RLE
    box: tuple[float, float, float, float]
    point: tuple[float, float]
    iou: float  # predicted, may exceed 1
    window: Window  # that it was found in


def settle_search(captioner: Any, given: Mapping[str, Any]) -> EverythingOptions:
    """Return the search settings of a captioner: its own, except for those that are given.

    Args:
        captioner: A model; a captioner without settings of its own has SAM's.
        given: Fields of `Everything` by name; None leaves a field to the captioner.
    """
    own = getattr(captioner, "everything", EverythingOptions())
    return replace(own, **{name: value for name, value in given.items() if value is not None})


@torch.inference_mode()
def caption_everything(
    predictor: Predictor,
    task: str = "caption",
    options: EverythingOptions | None = None,
    proposals: Proposals | None = None,
    progress: Callable[[int, int], None] | None = None,
    max_regions: int | None = None,
    **given: Any,
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
        **given: Fields of `Everything` in place of those in `options`, and generation options of `Predictor.predict`.

    Raises:
        TypeError: An unknown keyword; names the closest one.
        ValueError: A value out of range.
    """
    fields = vars(EverythingOptions())
    refuse_unknown("caption_everything", given.keys() - {*fields, *OPTIONS}, (*ARGUMENTS, *fields, *OPTIONS), SAM_NAMES)
    check_task(task)
    if max_regions is not None and (not isinstance(max_regions, int) or max_regions < 1):
        raise ValueError(f"max_regions is {max_regions!r}; give a whole number, 1 or more")
    if not isinstance(options, EverythingOptions | None):
        raise ValueError(
            f"options is of type {type(options).__name__}; give sca.Everything(...), or its fields by name"
        )
    search = {name: value for name, value in given.items() if name in fields and value is not None}
    if not isinstance(predictor, Predictor):
        raise ValueError(f"predictor is of type {type(predictor).__name__}; give sca.Predictor(...) with an image set")
    engine, encoded = predictor.engine, predictor.encoded
    options = check_search({**vars(options or engine.everything), **search}) if search else options
    generation = settle_generation(engine, **{name: given[name] for name in given.keys() & {*OPTIONS}})
    if encoded is None:
        raise ValueError("there is no image yet: call set_image(image) first")
    masks, prompts = find_everything(engine, encoded, options, proposals, progress)
    masks, prompts = masks[:max_regions], prompts[:max_regions]
    captions = engine.caption_masks(encoded, masks, prompts, task, **generation) if masks else []
    room = None if max_regions is None else max_regions - len(masks)
    regions = _choose_regions(proposals, room) if proposals else []
    if regions:
        (more,) = engine.caption_batch(encoded, [regions], task, **generation)
        captions += [replace(each, region=len(masks) + each.region_id) for each in more]
    return captions


def find_everything(
    engine: MaskEngine,
    encoded: Encoded,
    options: EverythingOptions | None = None,
    proposals: Proposals | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Mask], list[Prompt]]:
    """Return the result of `search_everything`; `progress` as for `caption_everything`."""
    search, last = search_everything(engine, encoded, options, proposals), None
    while True:
        try:
            step = next(search)
        except StopIteration as end:
            return end.value
        if progress and step != last:
            progress(*step)
        last = step


@torch.inference_mode()
def search_everything(
    engine: MaskEngine,
    encoded: Encoded,
    options: EverythingOptions | None = None,
    proposals: Proposals | None = None,
    *,
    max_found: int | None = None,
    max_bytes: int | None = None,
) -> Generator[Searched, None, tuple[list[Mask], list[Prompt]]]:
    """Search an image as a generator: it yields its progress after every small piece of work.

    Between two pieces the engine may serve other images, and the search can be abandoned with `close()`.

    Args:
        engine: The engine, with an encoder and a segmenter.
        encoded: What `engine.encode` returned for one image.
        options: Where and what to look for (default: the model's own).
        proposals: What to look at instead of the grid and the crops of `options`.
        max_found: Maximum regions to find; more are refused.
        max_bytes: Maximum bytes of candidate masks to hold at a time.

    Returns:
        The masks that points find, best first, and the prompt that each is captioned from: what `MaskEngine.tell`
        takes.

    Raises:
        ValueError: If there is no segmenter, it has no masks, or a maximum is exceeded.
    """
    engine.check_segments()
    options = options or engine.everything
    found = yield from _search(engine, encoded, options, proposals, max_found, max_bytes)
    masks = [Mask(dict(each.mask), min(each.iou, 1.0)) for each in found]
    has_box, has_point = ("box" in options.caption_from, "point" in options.caption_from)
    points = [((*each.point, 1),) if has_point else () for each in found]
    return masks, [Prompt(each.box if has_box else None, point) for each, point in zip(found, points, strict=True)]


def _is_one_point(prompt: Prompt) -> bool:
    return prompt.box is None and prompt.mask is None and [label for _, _, label in prompt.points] == [1]


def _choose_regions(proposals: Proposals, count: int | None) -> list[Prompt]:
    """Return the prompts that are regions already, at most `count` of them, those with the best scores, in order."""
    places = [place for place, prompt in enumerate(proposals.prompts) if not _is_one_point(prompt)]
    best = sorted(places, key=lambda place: -proposals.scores[place])[:count]
    return [proposals.prompts[place] for place in sorted(best)]


def _search(
    engine: MaskEngine,
    whole_image: Encoded,
    options: EverythingOptions,
    proposals: Proposals | None = None,
    max_found: int | None = None,
    max_bytes: int | None = None,
) -> Generator[Searched, None, list[Found]]:
    """What points find, best first, each region once."""
    (image,) = whole_image.images
    whole = (0, 0, *image.size)
    windows = [whole]
    points: list[Tensor] = []
    if proposals is None:
        windows += _crops(*image.size, options.crop_n_layers, options.crop_overlap_ratio)
        points = [_grid(window, options.points_per_side) for window in windows]
    else:
        asked = [each.points[0][:2] for each in proposals.prompts if _is_one_point(each)]
        points = [torch.tensor(asked, dtype=torch.float32).reshape(-1, 2)]
    total, done = sum(map(len, points)), 0
    found: list[Found] = []
    for window, places in zip(windows, points, strict=True):
        if not len(places):
            continue
        encoded = whole_image if window == whole else engine.encode([image.crop(window)])
        candidates: list[Found] = []
        looked_at, held = 0, sum(len(each.mask["counts"]) for each in found)
        for step in _in_window(engine, encoded, image.size, window, places, options):
            if isinstance(step, Found):
                candidates.append(step)
                held += len(step.mask["counts"])
                if max_bytes is not None and held > max_bytes:
                    raise ValueError("too many masks pass the filters; raise iou or stability, lower points")
            else:
                looked_at = step
            yield Searched(done + looked_at, total)
        done += len(places)
        for place in _suppress_overlaps(candidates, torch.tensor([each.iou for each in candidates]), options):
            found.append(candidates[place])
            if max_found is not None and len(found) > max_found:
                raise ValueError(f"more than {max_found:,} regions were found; raise iou or stability, lower nms")
            yield Searched(done, total)
    if len(windows) > 1:  # of what several windows show, the closest look stays
        sizes = torch.tensor([-float((w[2] - w[0]) * (w[3] - w[1])) for w in (each.window for each in found)])
        several, found = found, []
        for place in _suppress_overlaps(several, sizes, options):
            found.append(several[place])
            yield Searched(done, total)
    pixels = image.width * image.height
    return sorted(
        (each for each in found if options.min_area <= area(each.mask) / pixels <= options.max_area),
        key=lambda each: -each.iou,
    )


def _in_window(
    engine: MaskEngine,
    encoded: Encoded,
    size: tuple[int, int],
    window: Window,
    points: Tensor,
    options: EverythingOptions,
) -> Iterator[int | Found]:
    """Regions that points (P, 2), image pixels, find in a window of an image of (width, height), and after every small
    piece of work the number of points that have been looked at.
    """
    (frame,) = encoded.frames
    x1, y1, x2, y2 = window
    width, height = size
    done = 0
    for looked_at, masks, scores, origins in _candidates(engine, encoded, points - torch.tensor(window[:2]), options):
        for start in range(0, len(masks), MEASURED):
            yield done
            rows = slice(start, start + MEASURED)
            stability, boxes = engine.processor.measure(masks[rows], frame, options.stability_score_offset)
            is_kept = (boxes > 0).any(1) & ((stability >= options.stability_score_thresh) | (options.stability_score_thresh <= 0))
            boxes = (boxes + torch.tensor((x1, y1) * 2, device=boxes.device)).tolist()
            kept = [
                row for row, keep in enumerate(is_kept.tolist()) if keep and not _is_cut_off(boxes[row], window, size)
            ]
            insides = engine.processor.inside(masks[rows][kept], [frame] * len(kept))
            for row, inside in zip(kept, insides, strict=True):
                mask = np.zeros((height, width), bool, order="F")
                mask[y1:y2, x1:x2] = inside
                point = points[origins[start + row]].tolist()
                yield Found(encode(mask), tuple(boxes[row]), (point[0], point[1]), scores[start + row], window)
        done = looked_at
        yield done


def _candidates(
    engine: MaskEngine, encoded: Encoded, points: Tensor, options: EverythingOptions
) -> Iterator[tuple[int, Tensor, list[float], list[int]]]:
    """A chunk at a time: points looked at so far, masks (K, 4h, 4w) whose predicted IoU is high enough, these IoUs,
    and the indices of the points that they are of.
    """
    (frame,) = encoded.frames
    asked = (points * torch.tensor(frame.scale))[:, None]  # (P, 1, 2), input frame
    ones = torch.ones(len(points), 1, dtype=torch.long)
    prompts = PromptBatch(torch.zeros(len(points), dtype=torch.long), points=asked, labels=ones).to(engine.device)
    for number, chunk in enumerate(prompts.chunks(engine.regions)):
        regions = engine.model.segment(encoded.features, chunk)
        if regions.masks is None:
            raise ValueError(
                f"everything needs masks, and the segmenter {type(engine.model.segmenter).__name__} gives none: "
                "build the model with segmenter=sam"
            )
        masks, scores = regions.masks.flatten(0, 1).float(), regions.iou_scores.flatten().float()
        good = ((scores > options.pred_iou_thresh) | (options.pred_iou_thresh <= 0)).nonzero().squeeze(1)
        origins = good // regions.masks.shape[1] + number * engine.regions
        looked_at = min((number + 1) * engine.regions, len(points))
        yield looked_at, masks[good], scores[good].tolist(), origins.tolist()


def _suppress_overlaps(found: Sequence[Found], scores: Tensor, options: EverythingOptions) -> Iterator[int]:
    """Yield the indices of regions that stay, best first, by the IoU of boxes as SAM does and, if wanted, of masks."""
    boxes = torch.tensor([each.box for each in found]).reshape(-1, 4)
    boxes[:, 2:] -= 1  # SAM's boxes end at the last pixel

    def is_overlapping(one: int, others: Tensor) -> Tensor:
        shared = compute_box_iou(boxes[[one]], boxes[others])[0]
        is_same = shared > options.box_nms_thresh
        near = (shared.gt(0) & ~is_same).nonzero()[:, 0] if options.mask_nms_thresh < 1 else ()
        if len(near):  # masks overlap only where boxes do
            codes = [found[place].mask for place in others[near].tolist()]
            exact = coco.iou([found[one].mask], codes, [0] * len(codes))[0]
            is_same[near] = torch.from_numpy(exact > options.mask_nms_thresh)
        return is_same

    return suppress_overlaps(is_overlapping, scores)


def _grid(window: Window, points: int) -> Tensor:
    """(points ** 2, 2) x y in the middle of equal cells of a window."""
    x1, y1, x2, y2 = window
    steps = (torch.arange(points) + 0.5) / points
    y, x = torch.meshgrid(y1 + steps * (y2 - y1), x1 + steps * (x2 - x1), indexing="ij")
    return torch.stack((x, y), dim=-1).reshape(-1, 2)


def _crops(width: int, height: int, layers: int, overlap: float) -> list[Window]:
    """SAM's crops: 2 ** i a side in layer i, which overlap by a share of the image's shorter side, halved each time."""
    windows = []
    for layer in range(1, layers + 1):
        count = 2**layer
        shared = int(overlap * min(width, height) * 2 / count)
        across, down = (math.ceil((shared * (count - 1) + side) / count) for side in (width, height))
        places = product(range(count), repeat=2)  # in SAM's order, which decides between equally good masks
        starts = [((across - shared) * i, (down - shared) * j) for i, j in places]
        windows += [(x, y, min(x + across, width), min(y + down, height)) for x, y in starts]
    return [(x1, y1, x2, y2) for x1, y1, x2, y2 in windows if x1 < x2 and y1 < y2]  # narrow images have fewer


def _is_cut_off(box: Sequence[float], window: Window, size: tuple[int, int]) -> bool:
    """Whether a box ends near an edge of the window that is not near an edge of the image."""
    x1, y1, x2, y2 = box
    last = (x1, y1, x2 - 1, y2 - 1)  # SAM's boxes end at the last pixel
    limits = (0, 0, *size)
    return any(
        abs(at - edge) <= NEAR and abs(at - limit) > NEAR for at, edge, limit in zip(last, window, limits, strict=True)
    )
