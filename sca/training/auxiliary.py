"""Losses that exist only while training: they shape the queries and are thrown away with the recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class AttributeHead(nn.Module):
    """Names each attribute of a region from its queries (N, Q, D).

    The loss is the sum of one cross-entropy an attribute, each averaged over all N regions; a region whose value is
    unknown adds nothing.
    """

    def __init__(self, width: int, queries: int, attributes: Mapping[str, Sequence[str]]):
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width * queries, len(v)) for name, v in attributes.items()})

    def forward(self, queries: Tensor, labels: Mapping[str, Tensor]) -> Tensor:
        """labels: (N,) for each attribute, the place of its value, -100 where unknown."""
        flat = queries.flatten(1)
        losses = [
            F.cross_entropy(head(flat).float(), labels[name], ignore_index=-100, reduction="sum")
            for name, head in self.heads.items()
        ]
        return sum(losses) / len(queries)
