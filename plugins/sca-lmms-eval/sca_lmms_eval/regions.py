"""Regions of documents in the format of lmms-eval's RefCOCO tasks."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from sca_registry.contracts import Prompt

from sca.io.annotations.coco import parse_segmentation
from sca.io.errors import InputError
from sca.io.prompts import parse_prompt
from sca.io.validation import check_numbers

PROMPT_TYPES = ("box", "mask")


def read_region(doc: Mapping[str, Any], prompt_type: str, location: str) -> tuple[Image.Image, Prompt]:
    """Return the image and the prompt of a document.

    Args:
        doc: Document with `image`, and `bbox` (x, y, width, height in pixels) or `segmentation` (a polygon x, y, x, y,
            ..., several of them, or an RLE).
        prompt_type: "box" or "mask".
        location: Task and document, for messages.

    Returns:
        The RGB image, and the prompt in its pixels.

    Raises:
        InputError: A field is missing or invalid.
    """
    key = {"box": "bbox", "mask": "segmentation"}[prompt_type]
    if not isinstance(doc.get("image"), Image.Image) or doc.get(key) is None:
        raise InputError(
            f"{location} has no image or no {key!r}; choose a region captioning task such as refcoco_bbox_val"
        )
    image = doc["image"].convert("RGB")
    if prompt_type == "box":
        check_numbers(f"{location}, 'bbox'", doc[key], "x, y, width, height")
        x, y, width, height = doc[key]
        return image, parse_prompt({"box": [x, y, x + width, y + height]}, location, *image.size)
    try:
        rle = parse_segmentation(_nest_polygon(doc[key]), image.size, lambda *_: None)
    except InputError as error:
        raise InputError(f"{location}, 'segmentation': {error}") from error
    return image, parse_prompt({"mask": rle}, location, *image.size)


def _nest_polygon(segmentation: Any) -> Any:
    """Return a flat polygon as a list of one polygon."""
    is_flat = isinstance(segmentation, Sequence) and segmentation and not isinstance(segmentation[0], Sequence)
    return [segmentation] if is_flat else segmentation
