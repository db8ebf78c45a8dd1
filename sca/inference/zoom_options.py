"""The option `zoom` of captioning. Importing the module does not import torch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from sca_registry.spec import ZoomOptions

ZOOM_AUTO, ZOOM_OFF = "auto", "off"
DEFAULT_ZOOM = ZOOM_OFF
ZoomValue = str | float


def check_zoom(value: Any) -> ZoomValue:
    """Check a value of the option `zoom`.

    Args:
        value: "auto", "off", or the area of the largest region to zoom into, in grid cells, as a number or as text.

    Returns:
        "auto", "off" or the area.

    Raises:
        ValueError: The value is none of these.
    """
    if value in (ZOOM_AUTO, ZOOM_OFF):
        return value
    try:
        max_cells = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        max_cells = math.nan
    if not 0 < max_cells < math.inf:
        raise ValueError(f"zoom is {value!r:.80}; expected auto, off, or a number of grid cells above 0")
    return max_cells


def resolve_zoom(captioner: Any, value: ZoomValue) -> ZoomOptions | None:
    """Return the zoom options of a captioner.

    Args:
        captioner: Any captioner.
        value: "auto" for the options of the model, "off", or the area of the largest region to zoom into, in grid
            cells.

    Returns:
        The options. None for "off", and for "auto" if the model has no measured maximum area.

    Raises:
        ValueError: The value is invalid, or the captioner has no encoder.
    """
    value = check_zoom(value)
    if value == ZOOM_OFF:
        return None
    options = getattr(captioner, "zoom", None) if getattr(captioner, "model", None) is not None else None
    if isinstance(value, str):
        return options if options is not None and options.max_cells is not None else None
    if options is None:
        raise ValueError(
            f"{type(captioner).__name__} has no encoder and cannot zoom; omit zoom, or use encoder+captioner, such as "
            "sam-vit-b+blip-base"
        )
    return replace(options, max_cells=value)
