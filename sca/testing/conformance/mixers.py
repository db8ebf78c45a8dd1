"""Conformance checks of mixers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sca.testing.conformance.checks import DoesNotApply, register_check
from sca.testing.conformance.comparison import describe_difference, describe_shape_mismatch
from sca.testing.conformance.harnesses import IMAGE_INDEX, MixerHarness


@register_check("mixers")
@torch.no_grad()
def output_shape(harness: MixerHarness) -> str | None:
    """The mixer returns queries of shape (N, num_queries, hidden_size)."""
    expected_shape = (len(IMAGE_INDEX), harness.component.num_queries, harness.component.hidden_size)
    return describe_shape_mismatch("queries", harness.component(harness.make_inputs()), expected_shape)


@register_check("mixers")
@torch.no_grad()
def queries_depend_on_region(harness: MixerHarness) -> str | None:
    """Two regions of one image have different queries."""
    first, second = harness.component(harness.make_inputs())[:2]
    return "two regions of one image have the same queries" if torch.allclose(first, second) else None


@register_check("mixers", source="sca_registry.cards.Card.requires")
@torch.no_grad()
def requires_only_declared_outputs(harness: MixerHarness) -> str | None:
    """The mixer runs without masks, boxes or grid unless its card or class lists them in `requires`."""
    needs, inputs = harness.collect_needs(), harness.make_inputs()
    fields_by_need = {
        "masks": ("masks", "iou_scores", "mask_tokens", "decoder_masks"),
        "boxes": ("boxes",),
        "grid": ("grid",),
    }
    for need, names in fields_by_need.items():
        if need not in needs:
            try:
                missing_fields: dict[str, Any] = dict.fromkeys(names)
                harness.component(replace(inputs, **missing_fields))
            except Exception as error:
                return f"without {need}: {type(error).__name__}: {error}"
    return None


@register_check("mixers")
@torch.no_grad()
def uses_grid_is_accurate(harness: MixerHarness) -> str | None:
    """A mixer with `uses_grid = False` returns the same queries without a grid."""
    if harness.component.uses_grid:
        raise DoesNotApply("the mixer uses the grid")
    inputs = harness.make_inputs()
    return describe_difference(
        {"queries": harness.component(inputs)},
        {"queries": harness.component(replace(inputs, grid=None))},
        tolerance=0.0,
    )


@register_check("mixers")
@torch.no_grad()
def prepare_images_preserves_queries(harness: MixerHarness) -> str | None:
    """Passing the result of `prepare_images` does not change the queries, for all regions or a subset."""
    component = harness.component
    if not hasattr(component, "prepare_images"):
        raise DoesNotApply("the mixer has no prepare_images method")
    inputs = harness.make_inputs()
    prepared = component.prepare_images(inputs.image_embeddings, inputs.positional_encoding)
    problem = describe_difference({"queries": component(inputs)}, {"queries": component(inputs, prepared)})
    if problem:
        return problem
    selected_fields = {name: getattr(inputs, name)[1:3] for name in harness.REGION_FIELDS}
    selected_inputs = replace(inputs, image_index=inputs.image_index[1:3], **selected_fields)
    return describe_difference({"queries": component(inputs)[1:3]}, {"queries": component(selected_inputs, prepared)})


@register_check("mixers")
@torch.no_grad()
def batch_invariance_in_training(harness: MixerHarness) -> str | None:
    """In training mode without dropout, a region has the same queries alone as in a batch."""
    inputs, component = harness.make_inputs(), harness.build_module().train()
    for module in component.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch_outputs = harness.compute_outputs(component, inputs)
    for row in range(harness.count_rows(inputs)):
        try:
            row_outputs = harness.compute_outputs(component, harness.select_rows(inputs, [row]))
        except ValueError as error:  # such as batch normalization of a single region
            return f"row {row} in a batch of its own: {error}"
        difference = describe_difference(
            {name: value[row : row + 1] for name, value in batch_outputs.items()}, row_outputs
        )
        if difference:
            return f"row {row} in a batch of its own: {difference}"
    return None
