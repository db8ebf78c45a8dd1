"""Promises of segmenters."""

from __future__ import annotations

from typing import Any

import torch
from sca_registry.contracts import SegmenterOutput, Targets
from torch import Tensor

from sca.io.masks import box_of
from sca.testing.conformance.comparison import different, misshapen
from sca.testing.conformance.promises import DoesNotApply, promise
from sca.testing.conformance.trials import GRID, IMAGES, OWNERS, SIDE, SIZE, SegmenterTrial


@promise("segmenters", written="sca_registry.contracts.Regions")
@torch.no_grad()
def regions(trial: SegmenterTrial) -> str | None:
    """Every field of the Regions has the shape that its comment says, by every kind of prompt that is taken."""
    inputs, width, count = trial.inputs(), trial.part.channels, len(OWNERS)
    for kind, prompts in inputs.prompts.items():
        found = trial.part(inputs.features, prompts)
        if not torch.equal(found.owner, prompts.image_index) or found.size != SIZE:
            return f"by {kind}: owner {found.owner.tolist()}, size {found.size}; asked with {prompts.image_index.tolist()}"
        tokens, raw = found.tokens.shape[1], found.prompt_tokens.shape[1]
        candidates = found.masks.shape[1] if found.masks is not None else None
        dense = (width, 1, 1) if found.dense.dim() == 3 else (count, width, GRID, GRID)
        shapes = {
            "image": (IMAGES, width, GRID, GRID),
            "dense": dense,
            "position": (width, GRID, GRID),
            "prompt_tokens": (count, raw, width),
            "tokens": (count, tokens, width),
            "mask_tokens": (count, candidates, width),
            "grid": (count, width, GRID, GRID),
            "masks": (count, candidates, SIDE, SIDE),
            "scores": (count, candidates),
            "boxes": (count, 4),
        }
        optional = ("mask_tokens", "grid", "masks", "scores", "boxes")
        for name, shape in shapes.items():
            value = getattr(found, name)
            problem = None if value is None and name in optional else misshapen(f"{name} by {kind}", value, shape)
            if problem:
                return problem
        if (found.masks is None) != (found.scores is None):
            return f"by {kind}: masks and scores do not come together"
    return None


@promise("segmenters", written="sca_registry.contracts.Regions")
@torch.no_grad()
def given_boxes_are_kept(trial: SegmenterTrial) -> str | None:
    """`boxes` are the boxes that were given; without any, the tight boxes of the best masks, or None."""
    inputs = trial.inputs()
    for kind, prompts in inputs.prompts.items():
        found = trial.part(inputs.features, prompts)
        if prompts.boxes is not None and (found.boxes is None or not torch.equal(found.boxes, prompts.boxes)):
            return f"by {kind}: other boxes than were given"
        if prompts.boxes is None and found.boxes is not None and found.masks is not None:
            best = found.masks[torch.arange(len(prompts)), found.scores.argmax(1)] > 0
            tight = [box_of(mask.numpy()) or (0, 0, 0, 0) for mask in best]
            if not torch.allclose(found.boxes, torch.tensor(tight, dtype=torch.float32) * SIZE / SIDE):
                return f"by {kind}: boxes that are not tight around the best masks"
    return None


@promise("segmenters", written="sca_registry.cards.Card.gives")
@torch.no_grad()
def gives_what_it_says(trial: SegmenterTrial) -> str | None:
    """What the card or class says it `gives` is there for a box."""
    said = trial.stated("gives")
    if said is None:
        raise DoesNotApply("it does not say what it gives")
    inputs = trial.inputs()
    found = trial.part(inputs.features, inputs.prompts["box"])
    lacking = [name for name in said if getattr(found, name) is None]
    return f"no {' and no '.join(lacking)}" if lacking else None


@promise("segmenters")
@torch.no_grad()
def one_mask_when_asked(trial: SegmenterTrial) -> str | None:
    """`multimask=False` gives one mask a region."""
    inputs = trial.inputs()
    found = trial.part(inputs.features, inputs.prompts["box"], multimask=False)
    if found.masks is None:
        raise DoesNotApply("it gives no masks")
    return misshapen("masks", found.masks, (len(OWNERS), 1, SIDE, SIDE))


@promise("segmenters")
@torch.no_grad()
def prompts_are_heard(trial: SegmenterTrial) -> str | None:
    """Two regions of one image differ, in their tokens or in the image as they see it."""
    inputs = trial.inputs()
    for kind, prompts in inputs.prompts.items():
        found = trial.part(inputs.features, prompts)
        if torch.allclose(found.tokens[0], found.tokens[1]) and torch.allclose(_private(found, 0), _private(found, 1)):
            return f"by {kind}: two regions of one image with the same tokens and grid"
    return None


@promise("segmenters")
def loss_is_scalars_that_train(trial: SegmenterTrial) -> str | None:
    """`loss(regions, targets)`, where there is one, gives finite scalars by name, and a gradient to the part."""
    part = trial.module()
    losses = _losses(part, trial, _targets())
    for name, value in losses.items():
        if not isinstance(value, Tensor) or value.dim() or not value.isfinite():
            return f"{name} = {value!r}"
    sum(losses.values()).backward()
    reached = any(p.grad is not None and p.grad.any() for p in part.parameters() if p.requires_grad)
    return None if reached else "no gradient"


@promise("segmenters", written="sca_registry.contracts.Targets")
@torch.no_grad()
def loss_counts_only_truth(trial: SegmenterTrial) -> str | None:
    """Cells that show padding, and regions without a true mask, do not count in the loss."""
    part, targets = trial.module(), _targets()
    plain = _losses(part, trial, _targets())
    padded, unknown = _targets(), _targets()
    padded.masks[~targets.valid_pixels] = 1.0
    unknown.masks[~targets.has_mask] = 1.0
    for what, changed in (("padding", padded), ("regions without a mask", unknown)):
        if different(plain, _losses(part, trial, changed)):
            return f"the loss depends on {what}"
    return None


def _private(found: SegmenterOutput, row: int) -> Tensor:
    """The image as one region sees it, or its dense prompt where there is no grid."""
    return found.grid[row] if found.grid is not None else found.dense_embeddings[row if found.dense_embeddings.dim() == 4 else slice(None)]


def _targets() -> Targets:
    """True masks: a block in each frame whose right quarter is padding; the last region has none."""
    masks = torch.zeros(len(OWNERS), SIDE, SIDE)
    masks[:, 4:20, 4:20] = 1.0
    valid = torch.ones(len(OWNERS), SIDE, SIDE, dtype=torch.bool)
    valid[:, :, SIDE * 3 // 4 :] = False
    has_mask = torch.ones(len(OWNERS), dtype=torch.bool)
    has_mask[-1] = False
    masks[-1] = 0.0
    return Targets(masks, valid, has_mask)


def _losses(part: Any, trial: SegmenterTrial, targets: Targets) -> dict[str, Tensor]:
    if not hasattr(part, "loss"):
        raise DoesNotApply("it has no loss")
    inputs = trial.inputs()
    return part.loss(part(inputs.features, inputs.prompts["box"]), targets)
