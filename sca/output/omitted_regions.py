"""Regions that an output format cannot represent."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from sca.io.images import format_path
from sca.io.text import format_count

logger: logging.Logger = logging.getLogger(__name__)


class OmittedRegions:
    """Count of the regions that a writer omits, for one warning with the total.

    Args:
        output: What omits them, such as "YOLO labels".
        missing: What a region lacks, such as "a box".
    """

    def __init__(self, output: str, missing: str = "a mask, a box or a point"):
        self._output, self._missing = output, missing
        self._first_image = ""
        self._count = 0

    def add(self, path: str, number: int) -> None:
        """Count omitted regions of the image at a path."""
        if number and not self._count:
            self._first_image = path
        self._count += number

    def log_total(self) -> None:
        """Log a warning with the number of all omitted regions, if there are any."""
        if self._count:
            regions = format_count(self._count, "region")
            first_image = format_path(self._first_image)
            logger.warning(
                "%s omit %s without %s; the first is in %s", self._output, regions, self._missing, first_image
            )


def find_first_point(caption_record: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return x and y of the first point of a region.

    Args:
        caption_record: Record of the region, see `sca.output.jsonl.caption_to_record`.

    Returns:
        The point in pixels; None without points.
    """
    points = caption_record["prompt"].get("points")
    if not points:
        return None
    x, y, _ = points[0]
    return x, y
