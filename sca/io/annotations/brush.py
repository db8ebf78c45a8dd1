"""Label Studio's code for brush strokes: thi.ng/rle-pack of an RGBA image.

The count of values (32 bits), the bits of a value less one (5), four sizes less one (4 bits each); then runs: a bit
whether the value repeats, two for which of the sizes its length has, the length less one, the value.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sca.io.errors import InputError

SIZES = (3, 4, 8, 16)  # bits of a run's length; each run says which of them it has


def pack(mask: np.ndarray) -> list[int]:
    """(height, width) bool -> the bytes of the code."""
    flat = np.repeat(mask.ravel(), 4)
    ends = np.flatnonzero(np.diff(flat)) + 1
    starts = np.concatenate(([0], ends))
    lengths = np.diff(np.concatenate((starts, [len(flat)])))
    bits = [f"{len(flat):032b}{7:05b}", *(f"{size - 1:04b}" for size in SIZES)]
    most = 1 << SIZES[-1]
    for length, inside in zip(lengths.tolist(), flat[starts].tolist(), strict=True):
        value = "11111111" if inside else "00000000"
        while length:
            run = min(length, most)
            which = next(place for place, size in enumerate(SIZES) if run <= 1 << size)
            bits.append(f"1{which:02b}{run - 1:0{SIZES[which]}b}{value}")
            length -= run
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))


def unpack(code: Sequence[int], width: int, height: int) -> np.ndarray:
    """The bytes of a code -> (height, width) bool, true where the image is not transparent.

    Raises:
        InputError: If they are not the code of an image of that size.
    """
    text = "".join(f"{byte:08b}" for byte in bytes(code))
    place = 0

    def take(count: int) -> int:
        nonlocal place
        place += count
        if place > len(text):
            raise InputError("the run-length code is cut short")
        return int(text[place - count : place], 2)

    count, word = take(32), take(5) + 1
    if count != 4 * width * height:
        raise InputError(
            f"the run-length code has {count} values, and an image of {width} x {height} {4 * width * height}"
        )
    sizes = [take(4) + 1 for _ in range(4)]
    alpha = np.zeros(width * height, bool)
    done = 0
    while done < count:
        repeats, length = take(1), take(sizes[take(2)]) + 1
        end = min(done + length, count)
        if repeats:
            alpha[done // 4 : end // 4] = take(word) > 0  # whose alpha, the last of four values, is in the run
        else:
            for each in range(done, end):
                alpha[each // 4 : (each + 1) // 4] = take(word) > 0
        done = end
    return alpha.reshape(height, width)
