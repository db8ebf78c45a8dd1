"""Conformance checks of segmenters."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from sca_registry.contracts import MaskTargets, SegmenterOutput
from torch import Tensor

from sca.io.masks import mask_to_box
from sca.nn.masks import select_confident_masks
from sca.testing.conformance.checks import DoesNotApply, register_check
from sca.testing.conformance.comparison import describe_difference, describe_shape_mismatch
from sca.testing.conformance.harnesses import (
    GRID_SIZE,
    IMAGE_INDEX,
    IMAGE_SIZE,
    MASK_SIZE,
    NUM_IMAGES,
    SegmenterHarness,
)


@register_check("segmenters", source="sca_registry.contracts.SegmenterOutput")
@torch.no_grad()
def output_shapes(harness: SegmenterHarness) -> str | None:
    """Every field of `SegmenterOutput` has its documented shape for every accepted kind of prompt."""
    inputs, hidden_size, num_regions = harness.make_inputs(), harness.component.channels, len(IMAGE_INDEX)
    for prompt_type, prompts in inputs.prompts.items():
        output = harness.component(inputs.features, prompts)
        if not torch.equal(output.image_index, prompts.image_index) or output.image_size != IMAGE_SIZE:
            return (
                f"{prompt_type} prompts: image_index {output.image_index.tolist()}, image_size {output.image_size}; "
                f"the prompts have {prompts.image_index.tolist()}"
            )
        num_tokens, num_prompt_tokens = output.tokens.shape[1], output.prompt_tokens.shape[1]
        num_masks = output.masks.shape[1] if output.masks is not None else None
        dense_shape: tuple[int, ...] = (num_regions, hidden_size, GRID_SIZE, GRID_SIZE)
        if output.dense_embeddings.dim() == 3:
            dense_shape = (hidden_size, 1, 1)
        shapes = {
            "image_embeddings": (NUM_IMAGES, hidden_size, GRID_SIZE, GRID_SIZE),
            "dense_embeddings": dense_shape,
            "positional_encoding": (hidden_size, GRID_SIZE, GRID_SIZE),
            "prompt_tokens": (num_regions, num_prompt_tokens, hidden_size),
            "tokens": (num_regions, num_tokens, hidden_size),
            "mask_tokens": (num_regions, num_masks, hidden_size),
            "grid": (num_regions, hidden_size, GRID_SIZE, GRID_SIZE),
            "masks": (num_regions, num_masks, MASK_SIZE, MASK_SIZE),
            "iou_scores": (num_regions, num_masks),
            "boxes": (num_regions, 4),
        }
        optional = ("mask_tokens", "grid", "masks", "iou_scores", "boxes")
        for name, shape in shapes.items():
            value = getattr(output, name)
            problem = (
                None
                if value is None and name in optional
                else describe_shape_mismatch(f"{name} of {prompt_type} prompts", value, shape)
            )
            if problem:
                return problem
        if (output.masks is None) != (output.iou_scores is None):
            return f"{prompt_type} prompts: only one of masks and iou_scores is returned"
    return None


@register_check("segmenters", source="sca_registry.contracts.SegmenterOutput")
@torch.no_grad()
def box_prompts_are_kept(harness: SegmenterHarness) -> str | None:
    """`boxes` are the box prompts; without box prompts, the tight boxes of the best masks, or None."""
    inputs = harness.make_inputs()
    for prompt_type, prompts in inputs.prompts.items():
        output = harness.component(inputs.features, prompts)
        if prompts.boxes is not None and (output.boxes is None or not torch.equal(output.boxes, prompts.boxes)):
            return f"{prompt_type} prompts: boxes differ from the box prompts"
        if prompts.boxes is None and output.boxes is not None and output.masks is not None:
            best_masks = output.masks[torch.arange(len(prompts)), output.iou_scores.argmax(1)] > 0
            tight_boxes = [mask_to_box(mask.numpy()) or (0, 0, 0, 0) for mask in best_masks]
            if not torch.allclose(
                output.boxes, torch.tensor(tight_boxes, dtype=torch.float32) * IMAGE_SIZE / MASK_SIZE
            ):
                return f"{prompt_type} prompts: boxes are not the tight boxes of the best masks"
    return None


@register_check("segmenters", source="sca_registry.cards.Card.provides")
@torch.no_grad()
def provides_declared_outputs(harness: SegmenterHarness) -> str | None:
    """The outputs listed in `provides` of the card or class are present for a box prompt."""
    declared_fields = harness.get_declared_value("provides")
    if declared_fields is None:
        raise DoesNotApply("neither the card nor the class declares `provides`")
    inputs = harness.make_inputs()
    output = harness.component(inputs.features, inputs.prompts["box"])
    missing_fields = [name for name in declared_fields if getattr(output, name) is None]
    return f"missing outputs: {', '.join(missing_fields)}" if missing_fields else None


@register_check("segmenters")
@torch.no_grad()
def single_mask_output(harness: SegmenterHarness) -> str | None:
    """`multimask_output=False` returns one mask per region."""
    inputs = harness.make_inputs()
    output = harness.component(inputs.features, inputs.prompts["box"], multimask_output=False)
    if output.masks is None:
        raise DoesNotApply("the segmenter predicts no masks")
    return describe_shape_mismatch("masks", output.masks, (len(IMAGE_INDEX), 1, MASK_SIZE, MASK_SIZE))


@register_check("segmenters")
@torch.no_grad()
def confident_masks_match(harness: SegmenterHarness) -> str | None:
    """`predict_confident_masks`, if defined, returns the masks of `forward` whose predicted IoU is above a minimum."""
    predict = getattr(harness.component, "predict_confident_masks", None)
    if predict is None:
        raise DoesNotApply("the segmenter has no method predict_confident_masks")
    inputs = harness.make_inputs()
    for prompt_type, prompts in inputs.prompts.items():
        output = harness.component(inputs.features, prompts)
        scores = output.iou_scores.flatten().sort().values
        widest_gap = int(scores.diff().argmax())  # rounding errors do not change which scores are above it
        for min_iou in (-math.inf, float(scores[widest_gap : widest_gap + 2].mean()), math.inf):
            expected = select_confident_masks(output.masks, output.iou_scores, min_iou)
            actual = predict(inputs.features, prompts, min_iou)
            problem = describe_difference(expected._asdict(), actual._asdict())
            if problem:
                return f"{prompt_type} prompts, min_iou {min_iou:g}, compared with forward: {problem}"
    return None


@register_check("segmenters")
@torch.no_grad()
def outputs_depend_on_prompt(harness: SegmenterHarness) -> str | None:
    """Two regions of one image differ in their tokens or in their image features."""
    inputs = harness.make_inputs()
    for prompt_type, prompts in inputs.prompts.items():
        output = harness.component(inputs.features, prompts)
        if torch.allclose(output.tokens[0], output.tokens[1]) and torch.allclose(
            _get_region_view(output, 0), _get_region_view(output, 1)
        ):
            return f"{prompt_type} prompts: two regions of one image have the same tokens and grid"
    return None


@register_check("segmenters")
def losses_are_differentiable(harness: SegmenterHarness) -> str | None:
    """`compute_losses(regions, targets)`, if defined, returns named finite scalars with gradients for the segmenter."""
    component = harness.build_module()
    losses = _compute_losses(component, harness, _make_targets())
    for name, value in losses.items():
        if not isinstance(value, Tensor) or value.dim() or not value.isfinite():
            return f"loss {name!r} is {value!r}"
    cast("Tensor", sum(losses.values())).backward()
    has_gradient = any(p.grad is not None and p.grad.any() for p in component.parameters() if p.requires_grad)
    return None if has_gradient else "no gradient reaches the segmenter"


@register_check("segmenters", source="sca_registry.contracts.Targets")
@torch.no_grad()
def losses_ignore_padding_and_missing_masks(harness: SegmenterHarness) -> str | None:
    """The loss ignores padding and regions without a ground-truth mask."""
    component, targets = harness.build_module(), _make_targets()
    expected_losses = _compute_losses(component, harness, _make_targets())
    padded_targets, unlabeled_targets = _make_targets(), _make_targets()
    padded_targets.masks[~targets.valid_pixels] = 1.0
    unlabeled_targets.masks[~targets.has_mask] = 1.0
    for ignored_content, changed_targets in (
        ("padding", padded_targets),
        ("regions without a mask", unlabeled_targets),
    ):
        if describe_difference(expected_losses, _compute_losses(component, harness, changed_targets)):
            return f"the losses depend on {ignored_content}"
    return None


def _get_region_view(output: SegmenterOutput, row: int) -> Tensor:
    """Return the image features of a region, or its dense prompt embeddings without a grid."""
    return (
        output.grid[row]
        if output.grid is not None
        else output.dense_embeddings[row if output.dense_embeddings.dim() == 4 else slice(None)]
    )


def _make_targets() -> MaskTargets:
    """Make targets whose right quarter is padding; the last region has no mask."""
    masks = torch.zeros(len(IMAGE_INDEX), MASK_SIZE, MASK_SIZE)
    masks[:, 4:20, 4:20] = 1.0
    valid_pixels = torch.ones(len(IMAGE_INDEX), MASK_SIZE, MASK_SIZE, dtype=torch.bool)
    valid_pixels[:, :, MASK_SIZE * 3 // 4 :] = False
    has_mask = torch.ones(len(IMAGE_INDEX), dtype=torch.bool)
    has_mask[-1] = False
    masks[-1] = 0.0
    return MaskTargets(masks, valid_pixels, has_mask)


def _compute_losses(component: Any, harness: SegmenterHarness, targets: MaskTargets) -> dict[str, Tensor]:
    if not hasattr(component, "compute_losses"):
        raise DoesNotApply("the segmenter has no compute_losses")
    inputs = harness.make_inputs()
    return component.compute_losses(component(inputs.features, inputs.prompts["box"]), targets)
