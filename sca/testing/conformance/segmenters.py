"""Conformance checks of segmenters."""

from __future__ import annotations

from typing import Any

import torch
from sca_registry.contracts import MaskTargets, SegmenterOutput
from torch import Tensor

from sca.io.masks import mask_to_box
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
def regions(harness: SegmenterHarness) -> str | None:
    """Every field of `SegmenterOutput` has its documented shape for every accepted kind of prompt."""
    inputs, hidden_size, num_regions = harness.make_inputs(), harness.part.channels, len(IMAGE_INDEX)
    for prompt_type, prompts in inputs.prompts.items():
        output = harness.part(inputs.features, prompts)
        if not torch.equal(output.image_index, prompts.image_index) or output.image_size != IMAGE_SIZE:
            return (
                f"by {prompt_type}: image_index {output.image_index.tolist()}, image_size {output.image_size}; "
                f"the prompts have {prompts.image_index.tolist()}"
            )
        num_tokens, num_prompt_tokens = output.tokens.shape[1], output.prompt_tokens.shape[1]
        num_masks = output.masks.shape[1] if output.masks is not None else None
        dense_shape = (num_regions, hidden_size, GRID_SIZE, GRID_SIZE)
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
                else describe_shape_mismatch(f"{name} by {prompt_type}", value, shape)
            )
            if problem:
                return problem
        if (output.masks is None) != (output.iou_scores is None):
            return f"by {prompt_type}: masks and iou_scores do not come together"
    return None


@register_check("segmenters", source="sca_registry.contracts.SegmenterOutput")
@torch.no_grad()
def given_boxes_are_kept(harness: SegmenterHarness) -> str | None:
    """`boxes` are the box prompts; without box prompts, the tight boxes of the best masks, or None."""
    inputs = harness.make_inputs()
    for prompt_type, prompts in inputs.prompts.items():
        output = harness.part(inputs.features, prompts)
        if prompts.boxes is not None and (output.boxes is None or not torch.equal(output.boxes, prompts.boxes)):
            return f"by {prompt_type}: other boxes than were given"
        if prompts.boxes is None and output.boxes is not None and output.masks is not None:
            best_masks = output.masks[torch.arange(len(prompts)), output.iou_scores.argmax(1)] > 0
            tight_boxes = [mask_to_box(mask.numpy()) or (0, 0, 0, 0) for mask in best_masks]
            if not torch.allclose(
                output.boxes, torch.tensor(tight_boxes, dtype=torch.float32) * IMAGE_SIZE / MASK_SIZE
            ):
                return f"by {prompt_type}: boxes that are not tight around the best masks"
    return None


@register_check("segmenters", source="sca_registry.cards.Card.provides")
@torch.no_grad()
def gives_what_it_says(harness: SegmenterHarness) -> str | None:
    """The outputs listed in `provides` of the card or class are present for a box prompt."""
    declared_fields = harness.get_declared_value("provides")
    if declared_fields is None:
        raise DoesNotApply("it does not say what it gives")
    inputs = harness.make_inputs()
    output = harness.part(inputs.features, inputs.prompts["box"])
    missing_fields = [name for name in declared_fields if getattr(output, name) is None]
    return f"no {' and no '.join(missing_fields)}" if missing_fields else None


@register_check("segmenters")
@torch.no_grad()
def one_mask_when_asked(harness: SegmenterHarness) -> str | None:
    """`multimask_output=False` returns one mask per region."""
    inputs = harness.make_inputs()
    output = harness.part(inputs.features, inputs.prompts["box"], multimask_output=False)
    if output.masks is None:
        raise DoesNotApply("it gives no masks")
    return describe_shape_mismatch("masks", output.masks, (len(IMAGE_INDEX), 1, MASK_SIZE, MASK_SIZE))


@register_check("segmenters")
@torch.no_grad()
def prompts_are_heard(harness: SegmenterHarness) -> str | None:
    """Two regions of one image differ in their tokens or in their image features."""
    inputs = harness.make_inputs()
    for prompt_type, prompts in inputs.prompts.items():
        output = harness.part(inputs.features, prompts)
        if torch.allclose(output.tokens[0], output.tokens[1]) and torch.allclose(
            _get_region_view(output, 0), _get_region_view(output, 1)
        ):
            return f"by {prompt_type}: two regions of one image with the same tokens and grid"
    return None


@register_check("segmenters")
def loss_is_scalars_that_train(harness: SegmenterHarness) -> str | None:
    """`loss(regions, targets)`, if defined, returns named finite scalars with gradients for the segmenter."""
    part = harness.build_module()
    losses = _compute_losses(part, harness, _make_targets())
    for name, value in losses.items():
        if not isinstance(value, Tensor) or value.dim() or not value.isfinite():
            return f"{name} = {value!r}"
    sum(losses.values()).backward()
    has_gradient = any(p.grad is not None and p.grad.any() for p in part.parameters() if p.requires_grad)
    return None if has_gradient else "no gradient"


@register_check("segmenters", source="sca_registry.contracts.Targets")
@torch.no_grad()
def loss_counts_only_truth(harness: SegmenterHarness) -> str | None:
    """The loss ignores padding and regions without a ground-truth mask."""
    part, targets = harness.build_module(), _make_targets()
    expected_losses = _compute_losses(part, harness, _make_targets())
    padded_targets, unlabeled_targets = _make_targets(), _make_targets()
    padded_targets.masks[~targets.valid_pixels] = 1.0
    unlabeled_targets.masks[~targets.has_mask] = 1.0
    for ignored_part, changed_targets in (("padding", padded_targets), ("regions without a mask", unlabeled_targets)):
        if describe_difference(expected_losses, _compute_losses(part, harness, changed_targets)):
            return f"the loss depends on {ignored_part}"
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


def _compute_losses(part: Any, harness: SegmenterHarness, targets: MaskTargets) -> dict[str, Tensor]:
    if not hasattr(part, "compute_losses"):
        raise DoesNotApply("it has no loss")
    inputs = harness.make_inputs()
    return part.compute_losses(part(inputs.features, inputs.prompts["box"]), targets)
