"""Segment and caption everything: masks of a grid of points, and captions for those that survive.

The filters are SAM's automatic mask generator's (arXiv 2304.02643). The image is encoded once, and words are generated
only for the masks that are left at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from sca_registry.contracts import Caption, Prompt, Prompts
from sca_registry.spec import Everything
from torch import Tensor

from sca.masks import area, box_of, encode
from sca.nn.boxes import box_iou
from sca.nn.masks import mask_iou, tight_boxes
from sca.nn.suppression import suppress
from sca.predictor import Predictor


@torch.inference_mode()
def caption_everything(
    predictor: Predictor,
    task: str = "caption",
    options: Everything | None = None,
    progress: Callable[[int, int], None] | None = None,
    **generation: Any,
) -> list[Caption]:
    """A caption for every region found in the predictor's image, best first; each is captioned from its own box.

    options: where and what to look for (default: the model's own). progress: called with the points looked at and all
    of them.
    """
    options = options or Everything(**predictor.model.spec.everything)
    if predictor.image is None:
        raise ValueError("there is no image yet: call set_image(image) first")
    (frame,) = predictor.encoded.frames
    logits, scores = _candidates(predictor, options, progress)
    boxes = tight_boxes(logits > 0)
    kept = suppress(box_iou(boxes, boxes), scores, options.nms)
    kept = kept[suppress(mask_iou(logits[kept] > 0), scores[kept], options.nms)]  # a stray cell makes a box a large one
    request, masks, ious = [], [], []
    for row in kept.tolist():
        mask = predictor.processor.masks(logits[row][None, None], frame)[0, 0] > 0
        code = encode(mask.cpu().numpy())
        share = area(code) / (frame.width * frame.height)
        if share and options.area <= share <= options.largest:
            request.append(Prompt(box=box_of(code)))
            masks.append(code)
            ious.append(min(float(scores[row]), 1.0))
    if not request:
        return []
    (captions,) = predictor.answer(predictor.encoded, [request], task, masks=False, **generation)
    return [replace(c, mask=mask, iou=iou) for c, mask, iou in zip(captions, masks, ious, strict=True)]


def _candidates(
    predictor: Predictor, options: Everything, progress: Callable[[int, int], None] | None
) -> tuple[Tensor, Tensor]:
    """Masks (K, 4h, 4w) that pass the filters, and their predicted IoU (K,)."""
    width, height = predictor.encoded.frames[0].used
    steps = (torch.arange(options.points) + 0.5) / options.points
    y, x = torch.meshgrid(steps * height, steps * width, indexing="ij")
    points = torch.stack((x, y), dim=-1).reshape(-1, 1, 2)  # (points ** 2, 1, 2), input frame
    prompts = Prompts(
        torch.zeros(len(points), dtype=torch.long), points=points, labels=torch.ones(len(points), 1, dtype=torch.long)
    ).to(predictor.device)
    found = []
    for number, chunk in enumerate(prompts.chunks(predictor.regions)):
        regions = predictor.model.segment(predictor.encoded.features, chunk)
        if regions.masks is None:
            raise ValueError(
                f"everything needs masks, and the segmenter {type(predictor.model.segmenter).__name__} gives none: "
                "build the model with segmenter=sam"
            )
        masks, scores = regions.masks.flatten(0, 1).float(), regions.scores.flatten().float()
        sure, possible = (masks > options.offset).sum((1, 2)), (masks > -options.offset).sum((1, 2))
        good = (scores > options.iou) & (sure >= options.stability * possible) & (possible > 0)
        found.append((masks[good], scores[good]))
        if progress:
            progress(min((number + 1) * predictor.regions, len(points)), len(points))
    masks, scores = zip(*found, strict=True)
    return torch.cat(masks), torch.cat(scores)
