"""Losses that exist only while training: they shape the queries and are thrown away with the recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class AttributeHead(nn.Module):
    """Names each attribute of a region from its queries: (N, Q, D) -> the sum of one cross-entropy an attribute."""

    def __init__(self, width: int, queries: int, attributes: Mapping[str, Sequence[str]]):
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width * queries, len(v)) for name, v in attributes.items()})

    def forward(self, queries: Tensor, labels: Mapping[str, Tensor]) -> Tensor:
        losses = []
        for name, head in self.heads.items():
            known = labels[name] >= 0
            if known.any():
                losses.append(F.cross_entropy(head(queries[known].flatten(1)).float(), labels[name][known]))
        return sum(losses) if losses else queries.sum() * 0.0
