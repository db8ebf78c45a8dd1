"""Workload for comparing automatic mask generators: an image, and thresholds for a model with random weights.

With random weights, the predicted IoU depends on the rank of a mask more than on the point, logits are smaller than the
offset of the stability score, and neighboring pixels are unrelated. The workload therefore rescales the outputs, and
chooses thresholds that leave 100 masks of 1,024 points, as in a photo. 43% of the masks pass the first threshold, as
of sca-tiny with SAM's thresholds. Boxes of random masks cover the image; they are not suppressed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco
from sca_registry.contracts import PromptBatch
from sca_registry.spec import EverythingOptions
from torch import Tensor

from sca.data.scenes import Scenes
from sca.inference.engine import EncodedImages, Engine
from sca.io.masks import RLE
from sca.proposers.grid import PointGrid

if TYPE_CHECKING:
    from sca.segmenters.sam import SamSegmenter

KEPT_FRACTION = 100 / 1024  # masks that pass all filters, of the points
CONFIDENT_FRACTION = 0.43  # masks whose predicted IoU passes, of all masks
SAMPLE_POINTS_PER_SIDE = 6  # points that the outputs are rescaled by
MEAN_IOU, IOU_STD, LOGIT_STD = 0.8, 0.1, 2.0  # of the rescaled outputs


def make_image(size: int) -> Image.Image:
    """Return a synthetic scene of `size` x `size` pixels."""
    return Scenes("test", num_images=1, image_size=size)[0].image


@torch.inference_mode()
def rescale_outputs(engine: Engine, encoded: EncodedImages) -> None:
    """Rescale the outputs of a SAM segmenter with random weights, in place.

    Afterwards, the predicted IoUs of each of the candidate masks have the same mean and standard deviation, and so have
    their logits. The masks are smooth, because the kernels that upscale them are constant.

    Args:
        engine: Engine of a model with a SAM segmenter.
        encoded: Encoded image.
    """
    segmenter = cast("SamSegmenter", engine.model.segmenter)
    decoder = segmenter.decoder
    features, prompts = encoded.require_features(), make_grid(engine, encoded, SAMPLE_POINTS_PER_SIDE)
    for conv in (decoder.upscale_conv1, decoder.upscale_conv2):
        conv.weight.copy_(conv.weight.mean((2, 3), keepdim=True).expand_as(conv.weight))
    regions = segmenter(features, prompts)
    assert regions.iou_scores is not None  # of SAM
    assert regions.grid is not None
    scale = IOU_STD / regions.iou_scores.std(0)
    head = decoder.iou_prediction_head.proj_out
    head.bias[1:] = (head.bias[1:] - regions.iou_scores.mean(0)) * scale + MEAN_IOU
    head.weight[1:] *= scale[:, None]
    mean_features = segmenter.upscale_grid(regions.grid, prompts.image_index, ()).mean((0, 2, 3))
    direction = mean_features / mean_features.norm()
    layers = [network.proj_out for network in decoder.output_hypernetworks_mlps[1:]]
    for layer in layers:  # remove what the mean features contribute to the logits
        layer.weight -= direction[:, None] * (direction @ layer.weight)
        layer.bias -= direction * (direction @ layer.bias)
    masks = segmenter(features, prompts).masks
    assert masks is not None
    for layer, scale in zip(layers, LOGIT_STD / masks.std((0, 2, 3)), strict=True):
        layer.weight *= scale
        layer.bias *= scale


def make_grid(engine: Engine, encoded: EncodedImages, points_per_side: int) -> PromptBatch:
    """Return a grid of point prompts over an image.

    Args:
        engine: Engine.
        encoded: Encoded image.
        points_per_side: Points per side.

    Returns:
        `points_per_side` ** 2 prompts in pixels of the model input.
    """
    prompts = PointGrid(points_per_side)(encoded.images[0], 0).prompts
    ((_, batch),) = engine.processor.group_prompts([prompts], encoded.frames)
    return batch.to(engine.device)


@torch.inference_mode()
def choose_options(engine: Engine, encoded: EncodedImages, points_per_side: int) -> EverythingOptions:
    """Choose thresholds that leave `KEPT_FRACTION` masks per point.

    Args:
        engine: Engine of a model with rescaled outputs.
        encoded: Encoded image.
        points_per_side: Points per side.

    Returns:
        Options of everything mode.
    """
    offset = EverythingOptions().stability_score_offset
    scores, stability = [], []
    for chunk in make_grid(engine, encoded, points_per_side).iter_chunks(engine.region_batch_size):
        candidates = engine.model.predict_confident_masks(encoded.require_features(), chunk, -np.inf)
        scores.append(candidates.iou_scores)
        stability.append(engine.processor.compute_stability_and_boxes(candidates.masks, encoded.frames[0], offset)[0])
    all_scores, all_stability = torch.cat(scores), torch.cat(stability)
    iou_threshold = choose_threshold(all_scores, round(CONFIDENT_FRACTION * len(all_scores)))
    stability_threshold = choose_threshold(
        all_stability[all_scores > iou_threshold], round(KEPT_FRACTION * points_per_side**2)
    )
    return EverythingOptions(
        points_per_side=points_per_side,
        pred_iou_thresh=iou_threshold,
        stability_score_thresh=stability_threshold,
        box_nms_thresh=1.0,
    )


def choose_threshold(values: Tensor, num_above: int) -> float:
    """Choose a threshold in the widest gap nearby, so that rounding errors do not change which values are above it.

    Args:
        values: More than `num_above` values.
        num_above: Values above the threshold; 5% more or fewer are accepted.

    Returns:
        The threshold.
    """
    ordered = values.double().sort(descending=True).values
    margin = max(1, num_above // 20)
    first, last = max(1, num_above - margin), min(num_above + margin, len(ordered) - 1)
    gaps = ordered[first - 1 : last] - ordered[first : last + 1]
    index = first + int(gaps.argmax())
    return float((ordered[index - 1] + ordered[index]) / 2)


def match_masks(masks: Sequence[RLE], expected: Sequence[RLE]) -> tuple[np.ndarray, np.ndarray]:
    """Match each expected mask with the mask that overlaps it most.

    Args:
        masks: One or more masks.
        expected: One or more masks.

    Returns:
        Index of the match of each expected mask, and their IoU.
    """
    ious = coco.iou([*masks], [*expected], [0] * len(expected))  # (masks, expected)
    return ious.argmax(0), ious.max(0)
