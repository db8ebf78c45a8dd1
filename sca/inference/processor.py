"""Convert images and prompts to tensors of the input frame, and masks back to image pixels.

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

MAX_CACHED_FRAMES = 16  # sizes of images whose stretching is kept
PIXELS_PER_COPY = 2**26  # of masks that are copied to the host at a time
MASK_PROMPT_LOGIT = 10.0  # how sure a mask drawn by a user is, as a logit


class InputFrame(NamedTuple):
    """How one image lies in the input frame: `scale` takes image pixels to frame pixels, x and y apart."""

    width: int
    height: int
    content_size: tuple[int, int]  # width and height that the image takes up in the frame

    @property
    def scale(self) -> tuple[float, float]:
        return self.content_size[0] / self.width, self.content_size[1] / self.height


class AxisUpscaling(NamedTuple):
    """A row of cells of a mask stretched to pixels: `weights` (pixels, cells), none below zero; and of each cell the
    first pixel that it has a say in, and the one after the last.
    """

    weights: Tensor
    first_pixel: list[int]
    last_pixel: list[int]


class Processor:
    """Knows one encoder's `ImageFormat` and the side of its feature grid. Works on the CPU, copies nothing it keeps."""

    def __init__(self, image_format: ImageFormat, grid_size: int):
        self.image_format = image_format
        self.grid_size = grid_size
        self._resample = Image.Resampling[image_format.resample.upper()]
        self._mean = np.asarray(image_format.mean, dtype=np.float32)
        self._std = np.asarray(image_format.std, dtype=np.float32)
        self._upscalings: dict[tuple[InputFrame, torch.device], tuple[AxisUpscaling, AxisUpscaling]] = {}

    @classmethod
    def from_encoder(cls, encoder: Encoder) -> Processor:
        return cls(encoder.image_format, encoder.image_format.size // encoder.stride)

    def compute_frame(self, width: int, height: int) -> InputFrame:
        frame_size = self.image_format.size
        if self.image_format.fit == "stretch":
            return InputFrame(width, height, (frame_size, frame_size))
        scale = frame_size / max(width, height)
        return InputFrame(width, height, (max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))))

    def preprocess_images(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB pictures -> (B, 3, S, S), normalized; what a padded picture does not fill is zero."""
        frame_size = self.image_format.size
        batch = np.zeros((len(images), 3, frame_size, frame_size), dtype=np.float32)
        for padded_image, image in zip(batch, images, strict=True):
            width, height = self.compute_frame(*image.size).content_size
            rgb_image = image if image.mode == "RGB" else image.convert("RGB")  # a copy of a large image takes a while
            values = np.asarray(rgb_image.resize((width, height), self._resample), dtype=np.float32) / 255.0
            values = (values - self._mean) / self._std
            if self.image_format.order == "bgr":
                values = values[:, :, ::-1]
            padded_image[:, :height, :width] = values.transpose(2, 0, 1)
        return torch.from_numpy(batch)

    def group_prompts(
        self, requests: Sequence[Sequence[Prompt]], frames: Sequence[InputFrame]
    ) -> list[tuple[list[int], PromptBatch]]:
        """Group the prompts of B images into homogeneous batches, each with its indices in the flattened requests."""
        buckets: dict[tuple, list[tuple[int, int, Prompt]]] = {}
        index = 0
        for image_index, request in enumerate(requests):
            for prompt in request:
                prompt_type = (prompt.box is not None, len(prompt.points), prompt.mask is not None)
                buckets.setdefault(prompt_type, []).append((index, image_index, prompt))
                index += 1
        return [
            ([index for index, _, _ in entries], self._make_prompt_batch(entries, frames))
            for entries in buckets.values()
        ]

    def _make_prompt_batch(self, entries: list[tuple[int, int, Prompt]], frames: Sequence[InputFrame]) -> PromptBatch:
        first_prompt = entries[0][2]
        scales = torch.tensor([frames[image_index].scale for _, image_index, _ in entries])  # (N, 2)
        boxes = points = labels = masks = None
        if first_prompt.box is not None:
            boxes = torch.tensor([prompt.box for _, _, prompt in entries], dtype=torch.float32) * scales.repeat(1, 2)
        if first_prompt.points:
            labeled_points = torch.tensor([prompt.points for _, _, prompt in entries], dtype=torch.float32)  # (N, P, 3)
            points, labels = labeled_points[:, :, :2] * scales[:, None], labeled_points[:, :, 2].long()
        if first_prompt.mask is not None:
            masks = torch.stack(
                [self.encode_mask_prompt(prompt.mask, frames[image_index]) for _, image_index, prompt in entries]
            )
        image_indices = torch.tensor([image_index for _, image_index, _ in entries])
        return PromptBatch(image_indices, boxes, points, labels, masks)

    def compute_coverage(self, mask: np.ndarray, frame: InputFrame) -> Tensor:
        """A mask in image pixels -> (4h, 4w), the share of each cell of the input frame that it covers."""
        mask_size, frame_size = 4 * self.grid_size, self.image_format.size
        width, height = (round(used * mask_size / frame_size) for used in frame.content_size)
        cell_shares = np.zeros((mask_size, mask_size), dtype=np.float32)
        mask_image = Image.fromarray(mask.astype(np.uint8) * 255)
        resized = mask_image.resize((max(width, 1), max(height, 1)), Image.Resampling.BOX)
        cell_shares[: max(height, 1), : max(width, 1)] = np.asarray(resized, dtype=np.float32) / 255.0
        return torch.from_numpy(cell_shares)

    def compute_valid_cells(self, frame: InputFrame) -> Tensor:
        """(4h, 4w) bool: the cells that show the image and not its padding."""
        return self.compute_coverage(np.ones((1, 1), dtype=bool), frame) > 0

    def encode_mask_prompt(self, mask: np.ndarray, frame: InputFrame) -> Tensor:
        """A mask in image pixels -> logits (1, 4h, 4w)."""
        return ((self.compute_coverage(mask, frame) * 2 - 1) * MASK_PROMPT_LOGIT).unsqueeze(0)

    def postprocess_masks(self, logits: Tensor, frame: InputFrame) -> Tensor:
        """(N, M, 4h, 4w) logits -> (N, M, height, width) logits in the image's own pixels, as SAM's processor does."""
        frame_size = self.image_format.size
        upscaled = F.interpolate(logits.float(), (frame_size, frame_size), mode="bilinear", align_corners=False)
        width, height = frame.content_size
        return F.interpolate(
            upscaled[..., :height, :width], (frame.height, frame.width), mode="bilinear", align_corners=False
        )

    def iter_binary_masks(self, logits: Tensor, frames: Sequence[InputFrame]) -> Iterator[np.ndarray]:
        """Yield where `postprocess_masks` is above zero: (height, width) bool in image pixels, column-major in memory.

        Only the rows and columns that can be above zero are computed. Masks are copied from an accelerator
        `PIXELS_PER_COPY` pixels at a time, so that the host does not wait for each.

        Args:
            logits: (N, 4h, 4w).
            frames: of the image that each mask is of.
        """
        upscalings = [self._get_upscalings(frame, logits.device) for frame in frames]
        windows = _compute_pixel_windows(logits > 0, upscalings)

        def binarize_row(row: int) -> Tensor:
            return (_upscale_window(logits[row], upscalings[row], windows[row]) > 0).flatten()

        masks_per_copy = max(1, PIXELS_PER_COPY // max((frame.width * frame.height for frame in frames), default=1))
        for start in range(0, len(frames), masks_per_copy):
            rows = range(start, min(start + masks_per_copy, len(frames)))
            flat_masks = [binarize_row(row) for row in rows]
            pixels = torch.cat(flat_masks).cpu().numpy()
            for row, flat_mask in zip(
                rows, np.split(pixels, np.cumsum([len(flat_mask) for flat_mask in flat_masks])[:-1]), strict=True
            ):
                y, x = windows[row]
                mask = np.zeros((frames[row].width, frames[row].height), dtype=bool)
                mask[x, y] = flat_mask.reshape(x.stop - x.start, y.stop - y.start)
                yield mask.T

    def compute_stability_and_boxes(self, logits: Tensor, frame: InputFrame, offset: float) -> tuple[Tensor, Tensor]:
        """Return the stability and the box of each mask in the image's own pixels, without padding.

        Stability is SAM's: the pixels above `offset` as a share of those above `-offset`, 0 if there are none.

        Args:
            logits: (N, 4h, 4w), all of one image.
            frame: of the image.
            offset: At least 0.

        Returns:
            (N,) in 0..1, and (N, 4) x1 y1 x2 y2 of the pixels above zero, far edges exclusive, zeros if there are none.
        """
        upscaling = self._get_upscalings(frame, logits.device)
        counts, boxes = [], []
        for row, (y, x) in enumerate(_compute_pixel_windows(logits > -offset, [upscaling] * len(logits))):
            pixels = _upscale_window(logits[row], upscaling, (y, x)).T
            counts.append(torch.stack(((pixels > offset).sum(), (pixels > -offset).sum())))
            (box,) = masks_to_boxes((pixels > 0)[None])
            window_origin = torch.tensor((x.start, y.start) * 2, device=box.device)
            boxes.append(torch.where(box.any(), box + window_origin, box))
        if not counts:
            return logits.new_zeros(0), logits.new_zeros(0, 4)
        num_confident, num_possible = torch.stack(counts).unbind(1)
        return num_confident / num_possible.clamp(min=1), torch.stack(boxes)

    def _get_upscalings(self, frame: InputFrame, device: torch.device) -> tuple[AxisUpscaling, AxisUpscaling]:
        """Return the vertical and horizontal upscaling of `postprocess_masks`, cached for recent images."""
        if (frame, device) not in self._upscalings:
            if len(self._upscalings) >= MAX_CACHED_FRAMES:
                self._upscalings.clear()
            axis_lengths = frame.content_size[::-1], (frame.height, frame.width)
            self._upscalings[frame, device] = tuple(
                self._compute_upscaling(*each, device) for each in zip(*axis_lengths, strict=True)
            )
        return self._upscalings[frame, device]

    def _compute_upscaling(self, content_length: int, length: int, device: torch.device) -> AxisUpscaling:
        """Compute the upscaling of one side of a mask, where `content_length` of S pixels become `length` pixels."""
        identity = torch.eye(4 * self.grid_size)[None, None]
        upscaled = F.interpolate(
            identity, (self.image_format.size, len(identity[0, 0])), mode="bilinear", align_corners=False
        )
        weights = F.interpolate(
            upscaled[..., :content_length, :], (length, len(identity[0, 0])), mode="bilinear", align_corners=False
        )
        weights = weights[0, 0]
        has_weight = weights != 0
        first, last = has_weight.int().argmax(0), length - has_weight.flip(0).int().argmax(0)
        return AxisUpscaling(weights.to(device), first.tolist(), last.tolist())


def _compute_pixel_windows(
    is_above: Tensor, upscalings: Sequence[tuple[AxisUpscaling, AxisUpscaling]]
) -> list[tuple[slice, slice]]:
    """Rows and columns of pixels that the true cells of (N, 4h, 4w) masks have a say in; no other pixel is above the
    level that those cells are above.
    """
    is_hit = torch.stack((is_above.any(2), is_above.any(1)), dim=1).cpu().numpy()  # (N, 2, 4h): rows, columns
    return [
        (_compute_pixel_span(down, rows), _compute_pixel_span(across, columns))
        for (down, across), (rows, columns) in zip(upscalings, is_hit, strict=True)
    ]


def _upscale_window(
    logits: Tensor, upscalings: tuple[AxisUpscaling, AxisUpscaling], window: tuple[slice, slice]
) -> Tensor:
    """(4h, 4w) logits stretched to the pixels of a window: (columns, rows)."""
    (down, across), (y, x) = upscalings, window
    return across.weights[x] @ logits.float().T @ down.weights[y].T


def _compute_pixel_span(upscaling: AxisUpscaling, is_hit: np.ndarray) -> slice:
    """The pixels in which the cells from the first to the last that is hit have a say."""
    cells = np.flatnonzero(is_hit)
    return slice(upscaling.first_pixel[cells[0]], upscaling.last_pixel[cells[-1]]) if len(cells) else slice(0, 0)
