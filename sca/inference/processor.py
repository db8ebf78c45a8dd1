"""From pictures and pointing to tensors of the input frame, and from masks back to pictures.

Frames: an image's own pixels (as its viewer sees it), and the input frame, the SxS square that the encoder reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from sca_registry.contracts import Encoder, ImageFormat, Prompt, PromptBatch
from torch import Tensor
from torch.nn import functional as F

from sca.nn.masks import masks_to_boxes

FRAMES = 16  # sizes of images whose stretching is kept
PIXELS = 2**26  # of masks that are copied to the host at a time
MASK_PROMPT_LOGIT = 10.0  # how sure a mask drawn by a user is, as a logit


class Frame(NamedTuple):
    """How one image lies in the input frame: `scale` takes image pixels to frame pixels, x and y apart."""

    width: int
    height: int
    used: tuple[int, int]  # width and height that the image takes up in the frame

    @property
    def scale(self) -> tuple[float, float]:
        return self.used[0] / self.width, self.used[1] / self.height


class Stretch(NamedTuple):
    """A row of cells of a mask stretched to pixels: `weights` (pixels, cells), none below zero; and of each cell the
    first pixel that it has a say in, and the one after the last.
    """

    weights: Tensor
    first: list[int]
    last: list[int]


class Processor:
    """Knows one encoder's `ImageFormat` and the side of its feature grid. Works on the CPU, copies nothing it keeps."""

    def __init__(self, image: ImageFormat, grid: int):
        self.image = image
        self.grid = grid
        self._resample = Image.Resampling[image.resample.upper()]
        self._mean = np.asarray(image.mean, dtype=np.float32)
        self._std = np.asarray(image.std, dtype=np.float32)
        self._ways: dict[tuple[Frame, torch.device], tuple[Stretch, Stretch]] = {}

    @classmethod
    def of(cls, encoder: Encoder) -> Processor:
        return cls(encoder.image_format, encoder.image_format.size // encoder.stride)

    def frame(self, width: int, height: int) -> Frame:
        size = self.image.size
        if self.image.fit == "stretch":
            return Frame(width, height, (size, size))
        scale = size / max(width, height)
        return Frame(width, height, (max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))))

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB pictures -> (B, 3, S, S), normalised; what a padded picture does not fill is zero."""
        size = self.image.size
        batch = np.zeros((len(images), 3, size, size), dtype=np.float32)
        for row, image in zip(batch, images, strict=True):
            width, height = self.frame(*image.size).used
            plain = image if image.mode == "RGB" else image.convert("RGB")  # a copy of a large image takes a while
            values = np.asarray(plain.resize((width, height), self._resample), dtype=np.float32) / 255.0
            values = (values - self._mean) / self._std
            if self.image.order == "bgr":
                values = values[:, :, ::-1]
            row[:, :height, :width] = values.transpose(2, 0, 1)
        return torch.from_numpy(batch)

    def prompts(self, requests: Sequence[Sequence[Prompt]], frames: Sequence[Frame]) -> list[tuple[list[int], PromptBatch]]:
        """Requests of B images -> homogeneous buckets, each with the place of its rows in the flattened request."""
        buckets: dict[tuple, list[tuple[int, int, Prompt]]] = {}
        place = 0
        for owner, request in enumerate(requests):
            for prompt in request:
                shape = (prompt.box is not None, len(prompt.points), prompt.mask is not None)
                buckets.setdefault(shape, []).append((place, owner, prompt))
                place += 1
        return [([place for place, _, _ in rows], self._bucket(rows, frames)) for rows in buckets.values()]

    def _bucket(self, rows: list[tuple[int, int, Prompt]], frames: Sequence[Frame]) -> PromptBatch:
        first = rows[0][2]
        scales = torch.tensor([frames[owner].scale for _, owner, _ in rows])  # (N, 2)
        boxes = points = labels = masks = None
        if first.box is not None:
            boxes = torch.tensor([prompt.box for _, _, prompt in rows], dtype=torch.float32) * scales.repeat(1, 2)
        if first.points:
            given = torch.tensor([prompt.points for _, _, prompt in rows], dtype=torch.float32)  # (N, P, 3)
            points, labels = given[:, :, :2] * scales[:, None], given[:, :, 2].long()
        if first.mask is not None:
            masks = torch.stack([self.mask_prompt(prompt.mask, frames[owner]) for _, owner, prompt in rows])
        return PromptBatch(torch.tensor([owner for _, owner, _ in rows]), boxes, points, labels, masks)

    def coverage(self, mask: np.ndarray, frame: Frame) -> Tensor:
        """A mask in image pixels -> (4h, 4w), the share of each cell of the input frame that it covers."""
        side, size = 4 * self.grid, self.image.size
        width, height = (round(used * side / size) for used in frame.used)
        covered = np.zeros((side, side), dtype=np.float32)
        picture = Image.fromarray(mask.astype(np.uint8) * 255)
        small = picture.resize((max(width, 1), max(height, 1)), Image.Resampling.BOX)
        covered[: max(height, 1), : max(width, 1)] = np.asarray(small, dtype=np.float32) / 255.0
        return torch.from_numpy(covered)

    def valid(self, frame: Frame) -> Tensor:
        """(4h, 4w) bool: the cells that show the image and not its padding."""
        return self.coverage(np.ones((1, 1), dtype=bool), frame) > 0

    def mask_prompt(self, mask: np.ndarray, frame: Frame) -> Tensor:
        """A mask in image pixels -> logits (1, 4h, 4w)."""
        return ((self.coverage(mask, frame) * 2 - 1) * MASK_PROMPT_LOGIT).unsqueeze(0)

    def masks(self, logits: Tensor, frame: Frame) -> Tensor:
        """(N, M, 4h, 4w) logits -> (N, M, height, width) logits in the image's own pixels, as SAM's processor does."""
        size = self.image.size
        full = F.interpolate(logits.float(), (size, size), mode="bilinear", align_corners=False)
        width, height = frame.used
        return F.interpolate(
            full[..., :height, :width], (frame.height, frame.width), mode="bilinear", align_corners=False
        )

    def inside(self, logits: Tensor, frames: Sequence[Frame]) -> Iterator[np.ndarray]:
        """Yield where `masks` is above zero: (height, width) bool in each image's own pixels, column-major in memory.

        Only the rows and columns that can be above zero are computed. From an accelerator masks are copied `PIXELS` at
        a time, so that the host does not wait for each.

        Args:
            logits: (N, 4h, 4w).
            frames: of the image that each mask is of.
        """
        ways = [self._stretched(frame, logits.device) for frame in frames]
        windows = _windows(logits > 0, ways)

        def cut(row: int) -> Tensor:
            return (_pixels(logits[row], ways[row], windows[row]) > 0).flatten()

        step = max(1, PIXELS // max((frame.width * frame.height for frame in frames), default=1))
        for start in range(0, len(frames), step):
            rows = range(start, min(start + step, len(frames)))
            parts = [cut(row) for row in rows]
            pixels = torch.cat(parts).cpu().numpy()
            for row, part in zip(rows, np.split(pixels, np.cumsum([len(part) for part in parts])[:-1]), strict=True):
                y, x = windows[row]
                whole = np.zeros((frames[row].width, frames[row].height), dtype=bool)
                whole[x, y] = part.reshape(x.stop - x.start, y.stop - y.start)
                yield whole.T

    def measure(self, logits: Tensor, frame: Frame, offset: float) -> tuple[Tensor, Tensor]:
        """Return the stability and the box of each mask in the image's own pixels, without padding.

        Stability is SAM's: the pixels above `offset` as a share of those above `-offset`, 0 if there are none.

        Args:
            logits: (N, 4h, 4w), all of one image.
            frame: of the image.
            offset: At least 0.

        Returns:
            (N,) in 0..1, and (N, 4) x1 y1 x2 y2 of the pixels above zero, far edges exclusive, zeros if there are none.
        """
        way = self._stretched(frame, logits.device)
        counts, boxes = [], []
        for row, (y, x) in enumerate(_windows(logits > -offset, [way] * len(logits))):
            pixels = _pixels(logits[row], way, (y, x)).T
            counts.append(torch.stack(((pixels > offset).sum(), (pixels > -offset).sum())))
            (box,) = masks_to_boxes((pixels > 0)[None])
            shift = torch.tensor((x.start, y.start) * 2, device=box.device)
            boxes.append(torch.where(box.any(), box + shift, box))
        if not counts:
            return logits.new_zeros(0), logits.new_zeros(0, 4)
        sure, possible = torch.stack(counts).unbind(1)
        return sure / possible.clamp(min=1), torch.stack(boxes)

    def _stretched(self, frame: Frame, device: torch.device) -> tuple[Stretch, Stretch]:
        """What `masks` does, down and across: of the images seen lately."""
        if (frame, device) not in self._ways:
            if len(self._ways) >= FRAMES:
                self._ways.clear()
            used = frame.used[::-1], (frame.height, frame.width)
            self._ways[frame, device] = tuple(self._stretch(*each, device) for each in zip(*used, strict=True))
        return self._ways[frame, device]

    def _stretch(self, used: int, length: int, device: torch.device) -> Stretch:
        """One side of a mask, of which `used` of S pixels are the image, stretched to `length` pixels."""
        cells = torch.eye(4 * self.grid)[None, None]
        full = F.interpolate(cells, (self.image.size, len(cells[0, 0])), mode="bilinear", align_corners=False)
        weights = F.interpolate(full[..., :used, :], (length, len(cells[0, 0])), mode="bilinear", align_corners=False)
        weights = weights[0, 0]
        seen = weights != 0
        first, last = seen.int().argmax(0), length - seen.flip(0).int().argmax(0)
        return Stretch(weights.to(device), first.tolist(), last.tolist())


def _windows(above: Tensor, ways: Sequence[tuple[Stretch, Stretch]]) -> list[tuple[slice, slice]]:
    """Rows and columns of pixels that the true cells of (N, 4h, 4w) masks have a say in; no other pixel is above the
    level that those cells are above.
    """
    hit = torch.stack((above.any(2), above.any(1)), dim=1).cpu().numpy()  # (N, 2, 4h): rows, columns
    return [
        (_span(down, rows), _span(across, columns)) for (down, across), (rows, columns) in zip(ways, hit, strict=True)
    ]


def _pixels(logits: Tensor, way: tuple[Stretch, Stretch], window: tuple[slice, slice]) -> Tensor:
    """(4h, 4w) logits stretched to the pixels of a window: (columns, rows)."""
    (down, across), (y, x) = way, window
    return across.weights[x] @ logits.float().T @ down.weights[y].T


def _span(way: Stretch, hit: np.ndarray) -> slice:
    """The pixels in which the cells from the first to the last that is hit have a say."""
    cells = np.flatnonzero(hit)
    return slice(way.first[cells[0]], way.last[cells[-1]]) if len(cells) else slice(0, 0)
