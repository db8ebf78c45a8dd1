"""Text on a picture: captions as blocks of lines, and the places where they hide least."""

from __future__ import annotations

import functools
import math
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Rectangle = tuple[int, int, int, int]

HIDING = 2.0  # what hiding a whole region weighs, where 1 is a label on the other side of the picture
CELLS = 512  # of the grid on the longer side of a picture
LINES = 4  # a longer caption ends in an ellipsis
# Pillow's own font knows little more than ASCII; of these, where one is installed, the first that has all characters.
_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "arial.ttf")


class Block:
    """A caption wrapped to `width` pixels; `size` is (width, height) with its margin."""

    def __init__(self, text: str, font_size: int, width: int):
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split()) or "(no caption)"
        self._font, text = _legible(text, font_size)
        self.margin = max(2, font_size // 4)
        self.text = "\n".join(_wrapped(text, self._font, width - 2 * self.margin))
        left, top, right, bottom = _ruler().multiline_textbbox((0, 0), self.text, self._font, spacing=self.margin)
        self._offset = self.margin - left, self.margin - top
        self.size = round(right - left + 2 * self.margin + 0.5), round(bottom - top + 2 * self.margin + 0.5)

    def draw(self, canvas: ImageDraw.ImageDraw, x: int, y: int, ink: tuple, background: tuple) -> None:
        """With its left upper corner at x, y."""
        canvas.rectangle((x, y, x + self.size[0] - 1, y + self.size[1] - 1), fill=background)
        at = (x + self._offset[0], y + self._offset[1])
        canvas.multiline_text(at, self.text, fill=ink, font=self._font, spacing=self.margin)


class Placement:
    """Finds a place for one label after another; the time for each does not depend on how many there are.

    What is covered is counted in cells of a grid over the canvas, whose sums over rectangles come from its integral.

    Args:
        canvas: Width and height.
        taken: Rectangles that labels should not cover.
        shown: Rectangles that labels should hide little of.
    """

    def __init__(self, canvas: tuple[int, int], taken: Sequence[Rectangle], shown: Sequence[Rectangle]):
        self._canvas = canvas
        self._cell = math.ceil(max(canvas) / CELLS)
        shape = math.ceil(canvas[1] / self._cell), math.ceil(canvas[0] / self._cell)
        self._taken, hidden = np.zeros(shape, np.int32), np.zeros(shape)
        for rectangle in taken:
            self._taken[self._cells(rectangle)] += 1
        for rectangle in shown:
            cells = hidden[self._cells(rectangle)]
            cells += 1 / max(cells.size, 1)  # what a whole region weighs is 1
        self._covered, self._hidden = _integral(self._taken), _integral(hidden)

    def place(self, size: tuple[int, int], near: Rectangle) -> Rectangle:
        """Return the place that covers least of what is taken, and take it.

        Among equals it is the best balance of hiding little and being close to the rectangle `near`. Above, below and
        inside `near` (its upper left corner first) count as close.
        """
        width, height = size
        x1, y1, x2, y2 = near
        good = [(x1, y1 - height), (x1, y2), (x1, y1), (x2 - width, y1), (x1, y2 - height), (x2, y1), (x1 - width, y1)]
        step = max(height // 2, 1)
        free = np.maximum(np.subtract(self._canvas, size), 0)
        grid = np.mgrid[0 : free[0] + 1 : height, 0 : free[1] + 1 : step]
        corners = np.concatenate([np.array(good), grid.reshape(2, -1).T])  # (K, 2) x y
        corners = np.clip(corners, 0, free)
        covered, hidden = (self._sums(integral, corners, size) for integral in (self._covered, self._hidden))
        away = np.abs(corners - np.array(good[0])).sum(1) / max(self._canvas)
        away[: len(good)] = np.arange(len(good)) / 100
        x, y = (int(value) for value in corners[np.lexsort((HIDING * hidden + away, covered))[0]])
        spot = x, y, x + width, y + height
        self._taken[self._cells(spot)] += 1
        self._covered = _integral(self._taken)
        return spot

    def _cells(self, rectangle: Rectangle) -> tuple[slice, slice]:
        """Return the cells that a rectangle touches, as rows and columns."""
        x1, y1, x2, y2 = (max(value, 0) for value in rectangle)
        return slice(y1 // self._cell, -(-y2 // self._cell)), slice(x1 // self._cell, -(-x2 // self._cell))

    def _sums(self, integral: np.ndarray, corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """(K, 2) upper left corners of rectangles of one size -> (K,) sums over the cells that each touches."""
        low = corners // self._cell
        high = np.minimum(-(-(corners + np.array(size)) // self._cell), np.array(integral.shape[::-1]) - 1)
        (x1, y1), (x2, y2) = low.T, high.T
        return integral[y2, x2] - integral[y1, x2] - integral[y2, x1] + integral[y1, x1]


def _integral(cells: np.ndarray) -> np.ndarray:
    """(h, w) -> (h + 1, w + 1) sums over all cells above and to the left."""
    return np.pad(cells.cumsum(0).cumsum(1), ((1, 0), (1, 0)))


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        line = f"{lines[-1]} {word}".strip()
        if font.getlength(line) <= width:
            lines[-1] = line
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
        if len(lines) > LINES:
            break
    if len(lines) > LINES:
        last = lines[LINES - 1]
        while last and font.getlength(f"{last}...") > width:
            last = last[:-1]
        lines = [*lines[: LINES - 1], f"{last.rstrip()}..."]
    return lines


def _legible(text: str, size: int) -> tuple[ImageFont.FreeTypeFont, str]:
    """A font that can write the text; where none can, the text with its accents folded and Pillow's font."""
    for name in (None, *_FONTS):
        font = _font(name, size)
        if font and not any(_missing(font, character) for character in set(text)):
            return font, text
    folded = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return _font(None, size), folded


@functools.cache
def _font(name: str | None, size: int) -> Any:
    """An installed font, or Pillow's own for None."""
    try:
        return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    except OSError:
        return None


@functools.lru_cache(4096)
def _missing(font: ImageFont.FreeTypeFont, character: str) -> bool:
    """Whether the font would show its box for unknown characters."""
    return not character.isspace() and bytes(font.getmask(character)) == bytes(font.getmask("\uffff"))


@functools.cache
def _ruler() -> ImageDraw.ImageDraw:
    return ImageDraw.Draw(Image.new("L", (1, 1)))
