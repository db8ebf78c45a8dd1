"""Text layout on images: captions as blocks of lines, placed where they hide least."""

from __future__ import annotations

import functools
import math
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Rectangle = tuple[int, int, int, int]
Color = tuple[int, int, int]

HIDDEN_REGION_WEIGHT = 2.0  # weight of hiding a whole region; 1 is a label at the opposite side of the image
GRID_CELLS = 512  # cells of the grid along the longer image side
MAX_LABEL_LINES = 4  # a longer caption ends in an ellipsis
# Pillow's own font contains little more than ASCII. The first installed font that has all characters is used.
_FONT_NAMES = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "arial.ttf")


class LabelBlock:
    """Caption wrapped to `width` pixels; `size` is (width, height) with its margin."""

    def __init__(self, text: str, font_size: int, width: int):
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split()) or "(no caption)"
        self._load_font, text = _choose_font(text, font_size)
        self.margin: int = max(2, font_size // 4)
        self.text: str = "\n".join(_wrap_text(text, self._load_font, width - 2 * self.margin))
        left, top, right, bottom = _get_measuring_canvas().multiline_textbbox(
            (0, 0), self.text, self._load_font, spacing=self.margin
        )
        self._offset = self.margin - left, self.margin - top
        self.size: tuple[int, int] = (
            round(right - left + 2 * self.margin + 0.5),
            round(bottom - top + 2 * self.margin + 0.5),
        )

    def draw(self, canvas: ImageDraw.ImageDraw, x: int, y: int, text_color: Color, background: Color) -> None:
        """Draw the block with its upper-left corner at x, y."""
        canvas.rectangle((x, y, x + self.size[0] - 1, y + self.size[1] - 1), fill=background)
        position = (x + self._offset[0], y + self._offset[1])
        canvas.multiline_text(position, self.text, fill=text_color, font=self._load_font, spacing=self.margin)


class LabelPlacer:
    """Places labels one after another; the time per label does not depend on their number.

    Coverage is counted in cells of a grid over the canvas. Sums over rectangles use its integral image.

    Args:
        canvas: Width and height.
        avoided_boxes: Rectangles that labels should not cover.
        region_boxes: Rectangles that labels should hide little of.
    """

    def __init__(self, canvas: tuple[int, int], avoided_boxes: Sequence[Rectangle], region_boxes: Sequence[Rectangle]):
        self._canvas = canvas
        self._cell_size = math.ceil(max(canvas) / GRID_CELLS)
        grid_shape = math.ceil(canvas[1] / self._cell_size), math.ceil(canvas[0] / self._cell_size)
        self._occupied_counts, hidden_weights = np.zeros(grid_shape, np.int32), np.zeros(grid_shape)
        for rectangle in avoided_boxes:
            self._occupied_counts[self._get_cell_slices(rectangle)] += 1
        for rectangle in region_boxes:
            cells = hidden_weights[self._get_cell_slices(rectangle)]
            cells += 1 / max(cells.size, 1)  # a whole region has weight 1
        self._occupied_integral, self._hidden_integral = (
            _compute_integral(self._occupied_counts),
            _compute_integral(hidden_weights),
        )

    def place_label(self, size: tuple[int, int], region_box: Rectangle) -> Rectangle:
        """Reserve and return the rectangle that covers the least occupied area.

        Ties are resolved by the best balance of hiding little and being close to `region_box`. Above, below and inside
        `region_box` (its upper-left corner first) count as close.
        """
        width, height = size
        x1, y1, x2, y2 = region_box
        preferred = [
            (x1, y1 - height),
            (x1, y2),
            (x1, y1),
            (x2 - width, y1),
            (x1, y2 - height),
            (x2, y1),
            (x1 - width, y1),
        ]
        step = max(height // 2, 1)
        max_corner = np.maximum(np.subtract(self._canvas, size), 0)
        grid = np.mgrid[0 : max_corner[0] + 1 : height, 0 : max_corner[1] + 1 : step]
        corners = np.concatenate([np.array(preferred), grid.reshape(2, -1).T])  # (K, 2) x y
        corners = np.clip(corners, 0, max_corner)
        covered, hidden = (
            self._sum_cells(integral, corners, size) for integral in (self._occupied_integral, self._hidden_integral)
        )
        distance = np.abs(corners - np.array(preferred[0])).sum(1) / max(self._canvas)
        distance[: len(preferred)] = np.arange(len(preferred)) / 100
        x, y = (int(value) for value in corners[np.lexsort((HIDDEN_REGION_WEIGHT * hidden + distance, covered))[0]])
        label_box = x, y, x + width, y + height
        self._occupied_counts[self._get_cell_slices(label_box)] += 1
        self._occupied_integral = _compute_integral(self._occupied_counts)
        return label_box

    def _get_cell_slices(self, rectangle: Rectangle) -> tuple[slice, slice]:
        """Return the cells that a rectangle touches, as rows and columns."""
        x1, y1, x2, y2 = (max(value, 0) for value in rectangle)
        return slice(y1 // self._cell_size, -(-y2 // self._cell_size)), slice(
            x1 // self._cell_size, -(-x2 // self._cell_size)
        )

    def _sum_cells(self, integral: np.ndarray, corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Return (K,) sums over the cells touched by rectangles of one size with upper-left corners (K, 2)."""
        first_cells = corners // self._cell_size
        last_cells = np.minimum(-(-(corners + np.array(size)) // self._cell_size), np.array(integral.shape[::-1]) - 1)
        (x1, y1), (x2, y2) = first_cells.T, last_cells.T
        return integral[y2, x2] - integral[y1, x2] - integral[y2, x1] + integral[y1, x1]


def _compute_integral(cells: np.ndarray) -> np.ndarray:
    """Compute the integral image: (h, w) -> (h + 1, w + 1)."""
    return np.pad(cells.cumsum(0).cumsum(1), ((1, 0), (1, 0)))


def _wrap_text(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
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
        if len(lines) > MAX_LABEL_LINES:
            break
    if len(lines) > MAX_LABEL_LINES:
        last = lines[MAX_LABEL_LINES - 1]
        while last and font.getlength(f"{last}...") > width:
            last = last[:-1]
        lines = [*lines[: MAX_LABEL_LINES - 1], f"{last.rstrip()}..."]
    return lines


def _choose_font(text: str, size: int) -> tuple[ImageFont.FreeTypeFont, str]:
    """Return a font with all characters of the text; without one, Pillow's font and the text with folded accents."""
    for name in (None, *_FONT_NAMES):
        font = _load_font(name, size)
        if font and not any(_is_glyph_missing(font, character) for character in set(text)):
            return font, text
    folded_text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return _load_font(None, size), folded_text


@functools.cache
def _load_font(name: str | None, size: int) -> Any:
    """Load an installed font, or Pillow's own for None."""
    try:
        return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    except OSError:
        return None


@functools.lru_cache(4096)
def _is_glyph_missing(font: ImageFont.FreeTypeFont, character: str) -> bool:
    """Return whether the font would draw its box for unknown characters."""
    return not character.isspace() and bytes(font.getmask(character)) == bytes(font.getmask("\uffff"))


@functools.cache
def _get_measuring_canvas() -> ImageDraw.ImageDraw:
    return ImageDraw.Draw(Image.new("L", (1, 1)))
