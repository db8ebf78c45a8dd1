"""Promises of mixers."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from sca.testing.conformance.comparison import different, misshapen
from sca.testing.conformance.promises import DoesNotApply, promise
from sca.testing.conformance.trials import OWNERS, MixerTrial, Trial


@promise("mixers")
@torch.no_grad()
def queries_shape(trial: MixerTrial) -> str | None:
    """Regions give queries (N, queries, width)."""
    return misshapen("queries", trial.part(trial.inputs()), (len(OWNERS), trial.part.queries, trial.part.width))


@promise("mixers")
@torch.no_grad()
def regions_are_told_apart(trial: MixerTrial) -> str | None:
    """Two regions of one image have different queries."""
    first, second = trial.part(trial.inputs())[:2]
    return "two regions of one image with the same queries" if torch.allclose(first, second) else None


@promise("mixers", written="sca_registry.cards.Card.needs")
@torch.no_grad()
def needs_no_more_than_it_says(trial: MixerTrial) -> str | None:
    """Of masks, boxes and grid the part does without those that its card or class does not list in `needs`."""
    needs, inputs = trial.needs(), trial.inputs()
    things = {"masks": ("masks", "scores", "mask_tokens"), "boxes": ("boxes",), "grid": ("grid",)}
    for thing, names in things.items():
        if thing not in needs:
            try:
                trial.part(replace(inputs, **dict.fromkeys(names)))
            except Exception as error:
                return f"without {thing}: {type(error).__name__}: {error}"
    return None


@promise("mixers")
@torch.no_grad()
def uses_grid_is_true(trial: MixerTrial) -> str | None:
    """A mixer that says `uses_grid = False` gives the same queries when there is no grid."""
    if trial.part.uses_grid:
        raise DoesNotApply("it uses the grid")
    inputs = trial.inputs()
    return different({"queries": trial.part(inputs)}, {"queries": trial.part(replace(inputs, grid=None))}, share=0.0)


@promise("mixers")
@torch.no_grad()
def prepared_or_not(trial: MixerTrial) -> str | None:
    """What `prepare` gives for the images changes nothing but the cost, for all regions and for some of them."""
    part = trial.part
    if not hasattr(part, "prepare"):
        raise DoesNotApply("it has no prepare")
    inputs = trial.inputs()
    prepared = part.prepare(inputs.image_embeddings, inputs.positional_encoding)
    problem = different({"queries": part(inputs)}, {"queries": part(inputs, prepared)})
    if problem:
        return problem
    some = replace(inputs, owner=inputs.image_index[1:3], **{name: getattr(inputs, name)[1:3] for name in trial.BY_REGION})
    return different({"queries": part(inputs)[1:3]}, {"queries": part(some, prepared)})


@promise("mixers")
@torch.no_grad()
def alone_as_together_in_training(trial: Trial) -> str | None:
    """In training, dropout aside, a region has the queries that it has alone: none sees its neighbours."""
    inputs, part = trial.inputs(), trial.module().train()
    for module in part.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    together = trial.outputs(part, inputs)
    for row in range(trial.rows(inputs)):
        try:
            alone = trial.outputs(part, trial.take(inputs, [row]))
        except ValueError as error:  # as batch normalisation raises for a single region
            return f"row {row} alone: {error}"
        difference = different({name: value[row : row + 1] for name, value in together.items()}, alone)
        if difference:
            return f"row {row} alone: {difference}"
    return None
