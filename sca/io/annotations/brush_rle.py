"""Label Studio's encoding of brush strokes: thi.ng/rle-pack of an RGBA image.

Header: the number of values (32 bits), the bits per value minus one (5), and four length sizes minus one (4 bits each).
Runs: one bit for whether the value repeats, two bits for the index of the length size, the length minus one, and the
value.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sca.io.errors import InputError

RUN_LENGTH_BITS = (3, 4, 8, 16)  # sizes of a run's length; each run selects one


def encode_brush_rle(mask: np.ndarray) -> list[int]:
    """Encode a (height, width) bool mask as bytes."""
    pixels = mask.ravel()
    starts = np.concatenate(([0], np.flatnonzero(pixels[1:] != pixels[:-1]) + 1))
    lengths = 4 * np.diff(starts, append=pixels.size)
    bits = [f"{4 * pixels.size:032b}{7:05b}", *(f"{size - 1:04b}" for size in RUN_LENGTH_BITS)]
    max_run = 1 << RUN_LENGTH_BITS[-1]
    for length, inside in zip(lengths.tolist(), pixels[starts].tolist(), strict=True):
        value = "11111111" if inside else "00000000"
        while length:
            run = min(length, max_run)
            size_index = next(place for place, size in enumerate(RUN_LENGTH_BITS) if run <= 1 << size)
            bits.append(f"1{size_index:02b}{run - 1:0{RUN_LENGTH_BITS[size_index]}b}{value}")
            length -= run
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))


def decode_brush_rle(code: Sequence[int], width: int, height: int) -> np.ndarray:
    """Decode bytes to a (height, width) bool mask, true where the image is not transparent.

    Args:
        code: Bytes of the encoding.
        width: Width of the image in pixels.
        height: Height of the image in pixels.

    Returns:
        (height, width) bool mask.

    Raises:
        InputError: The bytes do not encode an image of this size.
    """
    text = "".join(f"{byte:08b}" for byte in bytes(code))
    offset = 0

    def read_bits(count: int) -> int:
        nonlocal offset
        offset += count
        if offset > len(text):
            raise InputError("the run-length encoding is truncated")
        return int(text[offset - count : offset], 2)

    count, value_bits = read_bits(32), read_bits(5) + 1
    if count != 4 * width * height:
        raise InputError(
            f"the run-length encoding has {count} values instead of {4 * width * height} for {width} x {height} pixels"
        )
    sizes = [read_bits(4) + 1 for _ in range(4)]
    alpha = np.zeros(width * height, bool)
    done = 0
    while done < count:
        is_run, length = read_bits(1), read_bits(sizes[read_bits(2)]) + 1
        end = min(done + length, count)
        if is_run:
            alpha[done // 4 : end // 4] = read_bits(value_bits) > 0  # alpha, the last of the four values, is in the run
        else:
            for each in range(done, end):
                alpha[each // 4 : (each + 1) // 4] = read_bits(value_bits) > 0
        done = end
    return alpha.reshape(height, width)
