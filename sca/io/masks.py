"""Masks and their COCO run-length codes.

A mask is a (height, width) array, true inside. A code (RLE) is `{"size": [height, width], "counts": str}`: small, and
what captions and files carry. `area` and `mask_to_box` take either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from sca.io.coordinates import PIXEL_LIMIT
from sca.io.errors import InputError

RLE = Mapping[str, Any]
LOSSY_FORMATS = ("JPEG", "WEBP", "AVIF", "HEIF", "JPEG2000")  # formats of images whose masks have values near 0 outside
MIN_SOFT_MAXIMUM = 224  # the least maximum of 8-bit probabilities; labels and instances rarely have as high numbers
MAX_LABELS = 16  # different values of a mask that may be labels
MAX_SMOOTH_EDGE_FRACTION = 0.1  # of the pixels inside: the most that smooth edges have, if they have few values


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """(height, width) array -> RLE."""
    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode_rle(rle: RLE) -> np.ndarray:
    """RLE -> (height, width) bool."""
    return coco.decode(rle).astype(bool)


def binarize_mask(values: np.ndarray, is_lossy: bool = False) -> np.ndarray:
    """Return where a mask is inside, as (height, width) bool.

    Args:
        values: (height, width) or (1, height, width). Values of which at most one other than 0 exists are inside where
            they are not 0. Otherwise integers up to 255 are inside from 128 if they can only be probabilities or smooth
            edges, floating-point values in 0..1 are probabilities, inside from 0.5, and with negative ones they are
            logits, inside above 0, as SAM returns them.
        is_lossy: The values come from a lossy image format: inside is what exceeds half of the maximum.

    Raises:
        InputError: Another shape or type, NaN, or values that are none of these, such as a label map.
    """
    if values.ndim == 3 and len(values) == 1:
        values = values[0]
    if values.ndim != 2 or values.dtype.kind not in "biuf":
        raise InputError(f"an array of {values.dtype} with shape {values.shape}, not (height, width) of numbers")
    if is_lossy and values.size:
        return values > values.max() / 2
    if values.dtype.kind == "b" or not values.size:
        return values != 0
    low, high = values.min().item(), values.max().item()
    if np.isnan(low):
        raise InputError("a value is NaN; replace NaN by 0 outside the region")
    if low >= 0 and ((values == 0) | (values == high)).all():
        return values != 0
    if values.dtype.kind != "f":
        return _binarize_integers(values, low, high)
    if low < 0:
        return values > 0
    if high <= 1:
        return values >= 0.5
    raise InputError(
        f"floating-point values from {low:g} to {high:g} are neither probabilities (0..1) nor logits "
        "(negative outside); give booleans"
    )


def _binarize_integers(values: np.ndarray, low: int, high: int) -> np.ndarray:
    """Return where probabilities of 0..255, or a mask with smooth edges, are at least half. InputError for others."""
    distinct = np.unique(values)
    if low >= 0 and MIN_SOFT_MAXIMUM <= high <= 255:
        between = ((values > 0) & (values < high)).sum()
        if len(distinct) > MAX_LABELS or between < (values == high).sum() * MAX_SMOOTH_EDGE_FRACTION:
            return values >= 128
    examples = ", ".join(map(str, distinct[:5])) + (", ..." if len(distinct) > 5 else "")
    raise InputError(
        f"{len(distinct)} different integers ({examples}) are neither a mask (0 outside, one value inside) nor "
        "probabilities (0..255); of a label map give one label, `values == LABEL`"
    )


def binarize_mask_image(image: Image.Image, is_lossy: bool = False) -> np.ndarray:
    """Return where a mask that is an image is inside, see `binarize_mask`: its alpha channel, or else its colors.

    Args:
        image: Any mode. Transparent pixels are outside.
        is_lossy: It comes from a format of `LOSSY_FORMATS`.

    Returns:
        (height, width) bool.

    Raises:
        InputError: As for `binarize_mask`.
    """
    values = np.asarray(image)
    if image.mode not in ("LA", "RGBA"):
        return binarize_mask(values if values.ndim == 2 else values.max(-1), is_lossy)
    colors, alpha = values[..., :-1].max(-1), values[..., -1]
    if is_lossy or alpha.min() == alpha.max():
        return binarize_mask(colors, is_lossy) & binarize_mask(alpha)
    return (colors != 0) & binarize_mask(alpha)


def resize_mask(mask: np.ndarray, width: int, height: int) -> np.ndarray:
    """Scale a mask (h, w) bool to (height, width) by nearest neighbor."""
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))


def resize_rle(rle: RLE, width: int, height: int) -> dict[str, Any]:
    """Scale an RLE to `width` x `height` pixels, as `resize` does."""
    return encode_rle(resize_mask(decode_rle(rle), width, height))


def merge_rles(rles: Sequence[RLE]) -> dict[str, Any]:
    """Return the union of RLEs of one size."""
    merged = coco.merge([dict(merged) for merged in rles])
    return {"size": [int(side) for side in merged["size"]], "counts": merged["counts"].decode("ascii")}


def compute_mask_area(mask: np.ndarray | RLE) -> int:
    """Pixels inside."""
    return int(coco.area(_mask_to_rle(mask)))


def mask_to_box(mask: np.ndarray | RLE) -> tuple[float, float, float, float] | None:
    """The tight box x1 y1 x2 y2, right and lower edge exclusive; None if nothing is inside."""
    rle = _mask_to_rle(mask)
    if not compute_mask_area(rle):
        return None
    x, y, width, height = (float(value) for value in coco.toBbox(rle))
    return x, y, x + width, y + height


def parse_rle(value: Any) -> dict[str, Any]:
    """An RLE that came from outside, compressed or with `counts` as a list of numbers, as the compressed kind.

    InputError when it is no RLE. The runs must fill the mask: pycocotools leaves the rest of it to chance.
    """
    if not isinstance(value, Mapping) or not {"size", "counts"} <= value.keys():
        raise InputError("an RLE is an object with 'size' [height, width] and 'counts'")
    size, counts = value["size"], value["counts"]
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(_is_integer(side) and side > 0 for side in size):
        raise InputError(f"'size' of an RLE is [height, width] in whole pixels, not {size!r:.40}")
    height, width = size
    if height * width > PIXEL_LIMIT:
        raise InputError(f"an RLE of {height} x {width} is larger than the {PIXEL_LIMIT:,} pixels an image may have")
    if isinstance(counts, str) and counts.isascii():
        runs = _parse_run_lengths(counts)
    elif isinstance(counts, list) and all(_is_integer(run) for run in counts):
        runs = counts
    else:
        raise InputError("'counts' of an RLE is a string, or a list of whole numbers")
    if any(run < 0 for run in runs) or sum(runs) != height * width:
        raise InputError(f"the runs in 'counts' do not fill the {height} x {width} pixels of 'size'")
    if isinstance(counts, list):
        counts = coco.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"].decode("ascii")
    return {"size": [height, width], "counts": counts}


def _parse_run_lengths(counts: str) -> list[int]:
    """The run lengths in a compressed string: from the fourth on as the difference to the run two back."""
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            raise InputError("'counts' is not a compressed RLE string")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise InputError("'counts' is cut short")
    return runs


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _mask_to_rle(mask: np.ndarray | RLE) -> RLE:
    return mask if isinstance(mask, Mapping) else encode_rle(mask)
