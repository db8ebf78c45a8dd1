"""Everything mode: find regions with a grid of point prompts, and caption them.

`sca.inference.region_search` finds the regions. Captions are generated only for the masks that pass its filters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from sca_registry.contracts import Caption, Proposals, list_region_references
from sca_registry.spec import EverythingOptions, make_everything_options

from sca.hints import check_argument_names
from sca.inference.generation_options import GENERATION_OPTIONS, resolve_generation_options
from sca.inference.predictor import Predictor
from sca.inference.prompt_arguments import check_task
from sca.inference.region_search import find_everything, select_region_proposals
from sca.inference.zoom import caption_masks, caption_regions
from sca.inference.zoom_options import DEFAULT_ZOOM, ZoomValue, resolve_zoom


def resolve_everything_options(captioner: Any, overrides: Mapping[str, Any]) -> EverythingOptions:
    """Return the everything options of a captioner with overrides.

    Args:
        captioner: Captioner; SAM's options apply if it has none.
        overrides: Fields of `EverythingOptions` by name; None keeps the value of the captioner.

    Returns:
        The merged options.
    """
    default_options = getattr(captioner, "everything", EverythingOptions())
    return replace(default_options, **{name: value for name, value in overrides.items() if value is not None})


@torch.inference_mode()
@check_argument_names(*vars(EverythingOptions()), *GENERATION_OPTIONS)
def caption_everything(
    predictor: Predictor,
    task: str = "caption",
    options: EverythingOptions | None = None,
    proposals: Proposals | None = None,
    progress: Callable[[int, int], None] | None = None,
    max_regions: int | None = None,
    zoom: ZoomValue = DEFAULT_ZOOM,
    **kwargs: Any,
) -> list[Caption]:
    """Find and caption all regions of the current image.

    Args:
        predictor: Predictor on which `set_image` was called.
        task: "caption", or "recognition" for class names.
        options: Options for finding regions; None uses the model's options.
        proposals: Prompts to use instead of the point grid and the crops, for example from a registered proposer.
            Single foreground points (label 1) are processed like grid points: their masks are predicted, filtered and
            captioned. All other prompts are captioned unchanged; their captions come last, in the order given.
        progress: Function called with the number of processed points and the total.
        max_regions: Maximum number of regions to caption. Regions found from points are kept first, by predicted IoU;
            then the other proposals, by score.
        zoom: Predict the masks and captions of small regions from crops; see `Predictor.predict`.
        **kwargs: Fields of `EverythingOptions` that override those in `options`, and generation options of
            `Predictor.predict`.

    Returns:
        Captions of the regions found from points, highest predicted IoU first, then captions of the other proposals,
        with their names and scores.

    Raises:
        TypeError: Unknown keyword argument; the message suggests the closest one.
        ValueError: A value is out of range, no image is set, or the captioner cannot predict masks.
    """
    default_fields = vars(EverythingOptions())
    if not isinstance(predictor, Predictor):
        raise ValueError(
            f"predictor is of type {type(predictor).__name__}; pass sca.Predictor(model) after its set_image(image)"
        )
    check_task(task, predictor.engine.tasks)
    if max_regions is not None and (not isinstance(max_regions, int) or max_regions < 1):
        raise ValueError(f"max_regions is {max_regions!r}; expected an integer of at least 1")
    if not isinstance(options, EverythingOptions | None):
        raise ValueError(
            f"options is of type {type(options).__name__}; pass sca.EverythingOptions(...), or its fields as keyword "
            "arguments"
        )
    overrides = {name: value for name, value in kwargs.items() if name in default_fields and value is not None}
    engine, encoded = predictor.engine, predictor.encoded
    options = make_everything_options({**vars(options or engine.everything), **overrides}) if overrides else options
    generation = resolve_generation_options(
        engine, **{name: kwargs[name] for name in kwargs.keys() & {*GENERATION_OPTIONS}}
    )
    if references := list_region_references(generation.get("question", "")):
        raise ValueError(
            f"the question refers to <region {references[0]}>, but the regions of everything mode have no numbers; ask "
            "about one region, or pass the regions as prompts"
        )
    zoom_options = resolve_zoom(engine, zoom)
    if encoded is None:
        raise ValueError("no image is set; call set_image(image) first")
    masks, prompts = find_everything(engine, encoded, options, proposals, progress)
    masks, prompts = masks[:max_regions], prompts[:max_regions]
    captions = caption_masks(engine, encoded, masks, prompts, task, zoom_options, **generation) if masks else []
    max_proposed = None if max_regions is None else max_regions - len(masks)
    selected = select_region_proposals(proposals, max_proposed) if proposals else None
    if selected and selected.prompts:
        (proposed_captions,) = caption_regions(engine, encoded, [selected.prompts], task, zoom_options, **generation)
        captions += [
            replace(each, region_id=len(masks) + each.region_id, name=name, proposal_score=score)
            for each, score, name in zip(proposed_captions, selected.scores, selected.names, strict=True)
        ]
    return captions
