"""Greedy non-maximum suppression."""

from __future__ import annotations

import torch
from torch import Tensor


def suppress(overlaps: Tensor, scores: Tensor, limit: float) -> Tensor:
    """The places that stay, best first: of two that overlap by more than `limit`, the one with the better score.

    overlaps: (N, N), such as the IoU of boxes or of masks. scores: (N,).
    """
    order = scores.argsort(descending=True, stable=True)
    close = (overlaps[order][:, order] > limit).triu(diagonal=1).cpu().numpy()
    alive = [True] * len(order)
    for row in range(len(order)):
        if alive[row]:
            for other in close[row].nonzero()[0]:
                alive[other] = False
    return order[torch.tensor(alive, dtype=torch.bool, device=order.device)]
