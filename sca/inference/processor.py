"""Processor: convert images and prompts to model inputs, and predicted masks back to image pixels.

There are two coordinate systems: pixels of the image after its EXIF orientation is applied, and pixels of the model
input, the padded S x S image that the encoder receives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from sca_registry.contracts import Encoder, ImageFormat, Prompt, PromptBatch
from torch import Tensor
from torch.nn import functional as F

from sca.nn.masks import masks_to_boxes

MAX_CACHED_FRAMES = 16  # image sizes with cached upscaling weights
PIXELS_PER_COPY = 2**26  # mask pixels per copy to the host
MASK_PROMPT_LOGIT = 10.0  # logit of a pixel inside a mask prompt


class InputFrame(NamedTuple):
    """Placement of a resized image in the padded S x S model input: at the top left corner.

    Attributes:
        width: Width of the image in pixels.
        height: Height of the image in pixels.
        content_size: Width and height of the resized image in the model input; padding fills the rest.
        whole_image: x1 y1 x2 y2, in image pixels, of the larger image that this one is a crop of; None if it is not a
            crop.
    """

    width: int
    height: int
    content_size: tuple[int, int]
    whole_image: tuple[float, float, float, float] | None = None

    @property
    def scale(self) -> tuple[float, float]:
        """Scale factors for x and y from image pixels to pixels of the model input."""
        return self.content_size[0] / self.width, self.content_size[1] / self.height

    @property
    def whole_image_box(self) -> tuple[float, float, float, float]:
        """Box x1 y1 x2 y2 of the whole image in pixels of the model input."""
        scale_x, scale_y = self.scale
        x1, y1, x2, y2 = self.whole_image or (0, 0, self.width, self.height)
        return x1 * scale_x, y1 * scale_y, x2 * scale_x, y2 * scale_y

    @property
    def aspect_ratio(self) -> float:
        """Width of the whole image divided by its height."""
        x1, y1, x2, y2 = self.whole_image or (0, 0, self.width, self.height)
        return (x2 - x1) / (y2 - y1)


class AxisUpscaling(NamedTuple):
    """Upscaling of one axis of a mask from cells to pixels.

    Attributes:
        weights: (pixels, cells) nonnegative weights.
        nonzero_weights: (pixels, K) nonzero weights of each pixel, and zeros up to the maximum number K.
        cells: (pixels, K) cells of these weights.
        first_pixel: First pixel with a nonzero weight for each cell.
        last_pixel: One past the last pixel with a nonzero weight for each cell.
    """

    weights: Tensor
    nonzero_weights: Tensor
    cells: Tensor
    first_pixel: list[int]
    last_pixel: list[int]


class Processor:
    """Preprocessing and postprocessing for one encoder.

    The model input is an S x S image: the resized image at the top left, and padding. Images and prompts are processed
    on the CPU, masks on the device of their logits.

    Args:
        image_format: Input format of the encoder.
        grid_size: Side length h = w of the square feature grid.
    """

    def __init__(self, image_format: ImageFormat, grid_size: int):
        self.image_format = image_format
        self.grid_size = grid_size
        self._resample = Image.Resampling[image_format.resample.upper()]
        self._mean = np.asarray(image_format.mean, dtype=np.float32)
        self._std = np.asarray(image_format.std, dtype=np.float32)
        self._upscalings: dict[tuple[InputFrame, torch.device], tuple[AxisUpscaling, AxisUpscaling]] = {}

    @classmethod
    def from_encoder(cls, encoder: Encoder) -> Processor:
        """Create the processor of an encoder."""
        return cls(encoder.image_format, encoder.image_format.size // encoder.stride)

    def compute_frame(self, width: int, height: int) -> InputFrame:
        """Compute the resized size of a `width` x `height` image in the padded model input."""
        frame_size = self.image_format.size
        if self.image_format.resize_mode == "stretch":
            return InputFrame(width, height, (frame_size, frame_size))
        scale = frame_size / max(width, height)
        return InputFrame(width, height, (max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))))

    def preprocess_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Resize, normalize and pad images.

        Args:
            images: B images of any size.

        Returns:
            (B, 3, S, S) float32. Padding is zero after normalization.
        """
        frame_size = self.image_format.size
        batch = np.zeros((len(images), 3, frame_size, frame_size), dtype=np.float32)
        for padded_image, image in zip(batch, images, strict=True):
            width, height = self.compute_frame(*image.size).content_size
            rgb_image = image if image.mode == "RGB" else image.convert("RGB")  # avoid a slow copy
            values = np.asarray(rgb_image.resize((width, height), self._resample), dtype=np.float32) / 255.0
            values = (values - self._mean) / self._std
            if self.image_format.channel_order == "bgr":
                values = values[:, :, ::-1]
            padded_image[:, :height, :width] = values.transpose(2, 0, 1)
        return torch.from_numpy(batch)

    def group_prompts(
        self, prompts: Sequence[Sequence[Prompt]], frames: Sequence[InputFrame]
    ) -> list[tuple[list[int], PromptBatch]]:
        """Group the prompts of B images into homogeneous batches.

        Args:
            prompts: One list of prompts per image, in image pixels.
            frames: Placement of each image in the model input.

        Returns:
            For each group, the indices of its prompts in the flattened list, and a `PromptBatch` in pixels of the model
            input.
        """
        buckets: dict[tuple, list[tuple[int, int, Prompt]]] = {}
        index = 0
        for image_index, image_prompts in enumerate(prompts):
            for prompt in image_prompts:
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
                [
                    self.encode_mask_prompt(cast("np.ndarray", prompt.mask), frames[image_index])
                    for _, image_index, prompt in entries
                ]
            )
        image_indices = torch.tensor([image_index for _, image_index, _ in entries])
        image_boxes = torch.tensor([frames[image_index].whole_image_box for _, image_index, _ in entries])
        aspect_ratios = torch.tensor([frames[image_index].aspect_ratio for _, image_index, _ in entries])
        return PromptBatch(image_indices, boxes, points, labels, masks, image_boxes, aspect_ratios)

    def compute_coverage(self, mask: np.ndarray, frame: InputFrame) -> Tensor:
        """Compute how much of each cell of the 4h x 4w mask grid is covered by a mask.

        Args:
            mask: (height, width) bool in image pixels, or any smaller mask to stretch over the image.
            frame: Placement of the image in the model input.

        Returns:
            (4h, 4w) fractions in [0, 1].
        """
        mask_size, frame_size = 4 * self.grid_size, self.image_format.size
        width, height = (round(used * mask_size / frame_size) for used in frame.content_size)
        cell_shares = np.zeros((mask_size, mask_size), dtype=np.float32)
        mask_image = Image.fromarray(mask.astype(np.uint8) * 255)
        resized = mask_image.resize((max(width, 1), max(height, 1)), Image.Resampling.BOX)
        cell_shares[: max(height, 1), : max(width, 1)] = np.asarray(resized, dtype=np.float32) / 255.0
        return torch.from_numpy(cell_shares)

    def compute_valid_cells(self, frame: InputFrame) -> Tensor:
        """Return a (4h, 4w) bool tensor that is True for cells that overlap the image and False for padding."""
        return self.compute_coverage(np.ones((1, 1), dtype=bool), frame) > 0

    def encode_mask_prompt(self, mask: np.ndarray, frame: InputFrame) -> Tensor:
        """Convert a (height, width) bool mask in image pixels to logits (1, 4h, 4w) for the prompt encoder."""
        return ((self.compute_coverage(mask, frame) * 2 - 1) * MASK_PROMPT_LOGIT).unsqueeze(0)

    def postprocess_masks(self, logits: Tensor, frame: InputFrame) -> Tensor:
        """Upscale masks to the original image size and remove the padding.

        The masks are resized to the model input, cropped and then resized to the image, as in SAM's processor. With
        `resize_mode` "stretch", they are resized to the image in one step, as in SAM 2's processor.

        Args:
            logits: (N, M, 4h, 4w).
            frame: Placement of the image in the model input.

        Returns:
            (N, M, height, width) logits.
        """
        logits = logits.float()
        if self.image_format.resize_mode == "pad":
            logits = _resize_bilinear(logits, self.image_format.size, self.image_format.size)
            width, height = frame.content_size
            logits = logits[..., :height, :width]
        return _resize_bilinear(logits, frame.height, frame.width)

    def iter_binary_masks(self, logits: Tensor, frames: Sequence[InputFrame]) -> Iterator[np.ndarray]:
        """Binarize masks in image pixels: `postprocess_masks(...) > 0`, but faster.

        Only the rows and columns that can be above zero are computed. Masks are copied from an accelerator in groups
        of `PIXELS_PER_COPY` pixels, so that the host does not wait for each mask.

        Args:
            logits: (N, 4h, 4w).
            frames: For each mask, the placement of its image in the model input.

        Yields:
            (height, width) bool, column-major in memory.
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
        """Compute the stability score and the box of each mask in image pixels, without padding.

        The stability score is SAM's (arXiv 2304.02643): the number of pixels above `offset` divided by the number
        above `-offset`, or 0 if no pixel is above `-offset`.

        Args:
            logits: (N, 4h, 4w), all of one image.
            frame: Placement of the image in the model input.
            offset: Offset of the logits, 0 or more.

        Returns:
            (N,) stability scores in [0, 1], and (N, 4) boxes x1 y1 x2 y2 of the pixels above zero, with exclusive x2
            and y2. Boxes of empty masks are zero.
        """
        upscaling = self._get_upscalings(frame, logits.device)
        counts, boxes = [], []
        for row, (y, x) in enumerate(_compute_pixel_windows(logits > -offset, [upscaling] * len(logits))):
            pixels = _upscale_window(logits[row], upscaling, (y, x)).T
            counts.append(torch.stack([_count_above(pixels, level) for level in (offset, -offset)]))
            (box,) = masks_to_boxes(pixels[None])
            window_origin = torch.tensor((x.start, y.start) * 2, device=box.device)
            boxes.append(torch.where(box.any(), box + window_origin, box))
        if not counts:
            return logits.new_zeros(0), logits.new_zeros(0, 4)
        num_confident, num_possible = torch.stack(counts).unbind(1)
        return num_confident / num_possible.clamp(min=1), torch.stack(boxes)

    def _get_upscalings(self, frame: InputFrame, device: torch.device) -> tuple[AxisUpscaling, AxisUpscaling]:
        """Return the vertical and horizontal upscaling of `postprocess_masks`, cached for recent images."""
        frame = frame._replace(whole_image=None)  # does not affect the masks of a crop
        if (frame, device) not in self._upscalings:
            if len(self._upscalings) >= MAX_CACHED_FRAMES:
                self._upscalings.clear()
            axis_lengths = frame.content_size[::-1], (frame.height, frame.width)
            vertical, horizontal = (self._compute_upscaling(*each, device) for each in zip(*axis_lengths, strict=True))
            self._upscalings[frame, device] = vertical, horizontal
        return self._upscalings[frame, device]

    def _compute_upscaling(self, content_length: int, length: int, device: torch.device) -> AxisUpscaling:
        """Compute the upscaling of one side of a mask, where `content_length` of S pixels become `length` pixels."""
        num_cells = 4 * self.grid_size
        weights = torch.eye(num_cells)[None, None]
        if self.image_format.resize_mode == "pad":
            weights = _resize_bilinear(weights, self.image_format.size, num_cells)[..., :content_length, :]
        weights = _resize_bilinear(weights, length, num_cells)[0, 0]
        has_weight = weights != 0
        first, last = has_weight.int().argmax(0), length - has_weight.flip(0).int().argmax(0)
        nonzero_weights, cells = (each.to(device) for each in weights.topk(int(has_weight.sum(1).max()), dim=1))
        return AxisUpscaling(weights.to(device), nonzero_weights, cells, first.tolist(), last.tolist())


def _resize_bilinear(values: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(values, (height, width), mode="bilinear", align_corners=False)


def _compute_pixel_windows(
    is_above: Tensor, upscalings: Sequence[tuple[AxisUpscaling, AxisUpscaling]]
) -> list[tuple[slice, slice]]:
    """Return the rows and columns of pixels that the true cells of (N, 4h, 4w) masks contribute to."""
    is_hit = torch.stack((is_above.any(2), is_above.any(1)), dim=1).cpu().numpy()  # (N, 2, 4h): rows, columns
    return [
        (_compute_pixel_span(down, rows), _compute_pixel_span(across, columns))
        for (down, across), (rows, columns) in zip(upscalings, is_hit, strict=True)
    ]


def _upscale_window(
    logits: Tensor, upscalings: tuple[AxisUpscaling, AxisUpscaling], window: tuple[slice, slice]
) -> Tensor:
    """Upscale (4h, 4w) logits to the pixels of a window: (columns, rows)."""
    (down, across), (y, x) = upscalings, window
    logits = logits.float()
    if logits.device.type != "cpu":
        return across.weights[x] @ logits.T @ down.weights[y].T
    rows = _sum_weighted_rows(logits, down, y)
    return _sum_weighted_rows(rows.T.contiguous(), across, x)


def _sum_weighted_rows(values: Tensor, upscaling: AxisUpscaling, pixels: slice) -> Tensor:
    """Compute `upscaling.weights[pixels] @ values` on a CPU, from the few weights that are not zero."""
    cells, weights = upscaling.cells[pixels], upscaling.nonzero_weights[pixels]
    return F.embedding_bag(cells, values, mode="sum", per_sample_weights=weights)


def _count_above(pixels: Tensor, level: float) -> Tensor:
    """Count the pixels above a level."""
    if pixels.device.type != "cpu":
        return torch.count_nonzero(pixels > level)
    return torch.tensor(np.count_nonzero(pixels.numpy() > level))  # four times as fast as torch


def _compute_pixel_span(upscaling: AxisUpscaling, is_hit: np.ndarray) -> slice:
    """Return the pixels that the cells from the first to the last hit contribute to."""
    cells = np.flatnonzero(is_hit)
    return slice(upscaling.first_pixel[cells[0]], upscaling.last_pixel[cells[-1]]) if len(cells) else slice(0, 0)
