"""Regions of a batch: those of one image, and those that were looked at in parts as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from sca_registry.contracts import SegmenterOutput
from torch import Tensor

OWN = ("owner", "prompt_tokens", "tokens", "mask_tokens", "grid", "masks", "scores", "boxes")  # rows of each region


def joined(parts: Sequence[SegmenterOutput]) -> SegmenterOutput:
    """Regions of the same images, in the order of the parts."""

    def rows(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    dense = rows("dense") if parts[0].dense_embeddings.dim() == 4 else parts[0].dense_embeddings  # (N, D, h, w), or one for all
    return replace(parts[0], dense=dense, **{name: rows(name) for name in OWN})


def rows_by_image(owner: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield each image that has regions, with the rows of its regions.

    On an accelerator the host waits once for all images; choosing rows by truth values would wait for each.

    Args:
        owner: (N,) the image of each region, sorted.
    """
    start = 0
    for image, same in groupby(owner.tolist()):
        end = start + len(list(same))
        yield image, slice(start, end)
        start = end
