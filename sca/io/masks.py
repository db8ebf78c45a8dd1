"""Masks and COCO run-length encodings (RLE).

A mask is a (height, width) array, true inside. An RLE is `{"size": [height, width], "counts": str}`, the compact form
in captions and files. `compute_mask_area` and `mask_to_box` accept either.
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
LOSSY_FORMATS = ("JPEG", "WEBP", "AVIF", "HEIF", "JPEG2000")  # image formats whose masks have values near 0 outside
MIN_SOFT_MAXIMUM = 224  # minimum maximum of 8-bit probabilities; labels and instance ids rarely reach it
MAX_LABELS = 16  # maximum number of distinct values in a label map
MAX_SMOOTH_EDGE_FRACTION = 0.1  # maximum fraction of inside pixels on smooth edges, for few distinct values


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """Encode a (height, width) mask as RLE."""
    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode_rle(rle: RLE) -> np.ndarray:
    """Decode an RLE to (height, width) bool."""
    return coco.decode(rle).astype(bool)


def binarize_mask(values: np.ndarray, is_lossy: bool = False) -> np.ndarray:
    """Binarize a mask.

    Values with at most one distinct value other than 0 are inside where nonzero. Otherwise:

    - Integers up to 255 are inside from 128, if they can only be probabilities or smooth edges.
    - Floating-point values in [0, 1] are probabilities, inside from 0.5.
    - Floating-point values with negative ones are logits, inside above 0, as SAM returns them.

    Args:
        values: (height, width) or (1, height, width).
        is_lossy: Whether the values come from a lossy image format; then values above half of the maximum are inside.

    Returns:
        (height, width) bool.

    Raises:
        InputError: The shape or type is invalid, or the values contain NaN or are none of these, such as a label map.
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
        "(negative outside); use a boolean mask"
    )


def _binarize_integers(values: np.ndarray, low: int, high: int) -> np.ndarray:
    """Binarize 0..255 probabilities or a mask with smooth edges at one half; raise InputError for other values."""
    distinct = np.unique(values)
    if low >= 0 and MIN_SOFT_MAXIMUM <= high <= 255:
        between = ((values > 0) & (values < high)).sum()
        if len(distinct) > MAX_LABELS or between < (values == high).sum() * MAX_SMOOTH_EDGE_FRACTION:
            return values >= 128
    examples = ", ".join(map(str, distinct[:5])) + (", ..." if len(distinct) > 5 else "")
    raise InputError(
        f"{len(distinct)} different integers ({examples}) are neither a mask (0 outside, one value inside) nor "
        "probabilities (0..255); for a label map, use the mask of one label: `values == LABEL`"
    )


def binarize_mask_image(image: Image.Image, is_lossy: bool = False) -> np.ndarray:
    """Binarize a mask image by its alpha channel, or else its colors; see `binarize_mask`.

    Args:
        image: Image of any mode. Transparent pixels are outside.
        is_lossy: Whether it comes from a format in `LOSSY_FORMATS`.

    Returns:
        (height, width) bool.

    Raises:
        InputError: See `binarize_mask`.
    """
    values = np.asarray(image)
    if image.mode not in ("LA", "RGBA"):
        return binarize_mask(values if values.ndim == 2 else values.max(-1), is_lossy)
    colors, alpha = values[..., :-1].max(-1), values[..., -1]
    if is_lossy or alpha.min() == alpha.max():
        return binarize_mask(colors, is_lossy) & binarize_mask(alpha)
    return (colors != 0) & binarize_mask(alpha)


def resize_mask(mask: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize an (h, w) bool mask to (height, width) by nearest neighbor."""
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))


def resize_rle(rle: RLE, width: int, height: int) -> dict[str, Any]:
    """Resize an RLE to `width` x `height` pixels, as `resize_mask` does."""
    return encode_rle(resize_mask(decode_rle(rle), width, height))


def merge_rles(rles: Sequence[RLE]) -> dict[str, Any]:
    """Return the union of RLEs of one size."""
    merged = coco.merge([dict(merged) for merged in rles])
    return {"size": [int(side) for side in merged["size"]], "counts": merged["counts"].decode("ascii")}


def compute_mask_area(mask: np.ndarray | RLE) -> int:
    """Return the number of pixels inside a mask."""
    return int(coco.area(_mask_to_rle(mask)))


def mask_to_box(mask: np.ndarray | RLE) -> tuple[float, float, float, float] | None:
    """Return the tight box x1, y1, x2, y2 of a mask, right and lower edge exclusive; None for an empty mask."""
    rle = _mask_to_rle(mask)
    if not compute_mask_area(rle):
        return None
    x, y, width, height = (float(value) for value in coco.toBbox(rle))
    return x, y, x + width, y + height


def parse_rle(value: Any) -> dict[str, Any]:
    """Parse an RLE from an untrusted source.

    Args:
        value: Compressed RLE, or an RLE with `counts` as a list of integers.

    Returns:
        Compressed RLE.

    Raises:
        InputError: The value is not an RLE, or its runs do not fill the mask; pycocotools leaves the remainder
            undefined.
    """
    if not isinstance(value, Mapping) or not {"size", "counts"} <= value.keys():
        raise InputError("the mask is not a valid RLE; expected an object with 'size' [height, width] and 'counts'")
    size, counts = value["size"], value["counts"]
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(_is_integer(side) and side > 0 for side in size):
        raise InputError(f"the 'size' of an RLE must be [height, width] in integer pixels, not {size!r:.40}")
    height, width = size
    if height * width > PIXEL_LIMIT:
        raise InputError(f"an RLE of {height} x {width} exceeds the limit of {PIXEL_LIMIT:,} pixels per image")
    if isinstance(counts, str) and counts.isascii():
        runs = _parse_run_lengths(counts)
    elif isinstance(counts, list) and all(_is_integer(run) for run in counts):
        runs = counts
    else:
        raise InputError("the 'counts' of an RLE must be a string or a list of integers")
    if any(run < 0 for run in runs) or sum(runs) != height * width:
        raise InputError(f"the runs in 'counts' do not fill the {height} x {width} pixels of 'size'")
    if isinstance(counts, list):
        counts = coco.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"].decode("ascii")
    return {"size": [height, width], "counts": counts}


def _parse_run_lengths(counts: str) -> list[int]:
    """Decode the run lengths of a compressed string: from the fourth on, each is a difference to the run two before."""
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
        raise InputError("'counts' is truncated")
    return runs


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _mask_to_rle(mask: np.ndarray | RLE) -> RLE:
    return mask if isinstance(mask, Mapping) else encode_rle(mask)
