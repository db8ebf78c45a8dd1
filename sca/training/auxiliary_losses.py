"""Losses that exist only while training: they shape queries and features, and are thrown away with the recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from sca_registry.contracts import Dataset, SegmenterOutput, Targets
from torch import Tensor, nn
from torch.nn import functional as F

from sca.nn.masks import pool_under_masks

UNKNOWN_LABEL = -100  # the label of an attribute whose value is not known


class AttributeValues(NamedTuple):
    """The values that each attribute of a region can have: those that are to be seen in the region itself, and those
    that are about it and another one.
    """

    region_attributes: dict[str, tuple[str, ...]]
    relation_attributes: dict[str, tuple[str, ...]]

    @classmethod
    def from_datasets(cls, datasets: Iterable[Dataset]) -> AttributeValues:
        """All that the datasets have, as their `attributes` and `between` list."""
        attribute_groups: tuple[dict[str, tuple[str, ...]], ...] = {}, {}
        for dataset in datasets:
            for name, values in getattr(dataset, "attributes", {}).items():
                group = attribute_groups[name in getattr(dataset, "between", ())]
                group[name] = tuple(dict.fromkeys((*group.get(name, ()), *values)))
        return cls(*attribute_groups)


class AttributeHead(nn.Module):
    """Names each attribute of a region from Q vectors of it, (N, Q, D).

    The loss is the sum of one cross-entropy an attribute, each averaged over all N regions; a region whose value is
    unknown adds nothing.
    """

    def __init__(self, hidden_size: int, num_vectors: int, attributes: Mapping[str, Sequence[str]]):
        super().__init__()
        self.heads = nn.ModuleDict(
            {name: nn.Linear(hidden_size * num_vectors, len(v)) for name, v in attributes.items()}
        )

    def forward(self, vectors: Tensor, labels: Mapping[str, Tensor]) -> Tensor:
        """labels: (N,) for each attribute, the index of its value, or `UNKNOWN_LABEL`."""
        flat = vectors.flatten(1)
        losses = [
            F.cross_entropy(head(flat).float(), labels[name], ignore_index=UNKNOWN_LABEL, reduction="sum")
            for name, head in self.heads.items()
        ]
        return sum(losses) / len(vectors)


def pool_ground_truth_features(regions: SegmenterOutput, targets: Targets) -> Tensor:
    """The image's features averaged under the true mask of each region, (N, 1, D): what a grid cell has to tell."""
    return pool_under_masks(
        regions.image_embeddings, regions.image_index, targets.masks.to(regions.image_embeddings.dtype)
    ).unsqueeze(1)
