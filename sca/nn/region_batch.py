"""Rows of regions in a batch: group them by image, and concatenate chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from sca_registry.contracts import DecoderMasks, SegmenterOutput
from torch import Tensor

PER_REGION_FIELDS = (  # one row per region
    *("image_index", "prompt_tokens", "tokens", "mask_tokens", "grid", "masks", "iou_scores", "boxes"),
)
DECODER_MASK_FIELDS = ("masks", "iou_scores", "tokens")


def concat_segmenter_outputs(outputs: Sequence[SegmenterOutput]) -> SegmenterOutput:
    """Concatenate the regions of chunks of the same images, in order."""

    def concat_field(name: str) -> Tensor | None:
        values = [getattr(output, name) for output in outputs]
        return None if values[0] is None else torch.cat(values)

    dense_embeddings = outputs[0].dense_embeddings  # (N, D, h, w), or (D, 1, 1) for all regions
    if dense_embeddings.dim() == 4:
        dense_embeddings = torch.cat([output.dense_embeddings for output in outputs])
    per_region: dict[str, Any] = {name: concat_field(name) for name in PER_REGION_FIELDS}
    parts = [output.decoder_masks for output in outputs if output.decoder_masks is not None]
    per_region["decoder_masks"] = (
        DecoderMasks(*(torch.cat([getattr(each, name) for each in parts]) for name in DECODER_MASK_FIELDS))
        if parts
        else None
    )
    return replace(outputs[0], dense_embeddings=dense_embeddings, **per_region)


def is_cpu_inference(values: Tensor) -> bool:
    """Return whether a tensor is on a CPU and is neither differentiated nor traced by `torch.export`."""
    return values.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_exporting()


def split_rows(num_rows: int, rows_per_chunk: int | None) -> list[slice]:
    """Return consecutive slices of rows; None keeps all rows in one slice, whatever their number."""
    if rows_per_chunk is None:
        return [slice(None)]
    step = max(rows_per_chunk, 1)
    return [slice(start, start + step) for start in range(0, num_rows, step)]


def iter_rows_by_image(image_index: Tensor, num_images: int) -> Iterator[tuple[int, slice]]:
    """Yield each image that has regions, with the slice of its rows.

    This synchronizes with an accelerator once, and not at all for one image; boolean masks would synchronize once per
    image.

    Args:
        image_index: (N,) image of each region, sorted.
        num_images: Images B of the batch.

    Yields:
        The index of an image and the slice of its rows.
    """
    if num_images == 1 and len(image_index):
        yield 0, slice(None)
        return
    start = 0
    for index, group in groupby(image_index.tolist()):
        end = start + len(list(group))
        yield index, slice(start, end)
        start = end
