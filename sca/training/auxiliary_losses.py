"""Auxiliary losses on queries and image features; their heads exist only during training and are not saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from sca_registry.contracts import Dataset, MaskTargets, SegmenterOutput
from torch import Tensor, nn
from torch.nn import functional as F

from sca.nn.masks import pool_under_masks

UNKNOWN_LABEL = -100  # label of an attribute without a known value, ignored by cross_entropy


class AttributeValues(NamedTuple):
    """Possible values of the attributes of regions.

    Attributes:
        region_attributes: Values by attribute, for attributes that are visible in the region itself.
        relation_attributes: Values by attribute, for attributes that relate a region to another one.
    """

    region_attributes: dict[str, tuple[str, ...]]
    relation_attributes: dict[str, tuple[str, ...]]

    @classmethod
    def from_datasets(cls, datasets: Iterable[Dataset]) -> AttributeValues:
        """Merge the attribute values of datasets; `relation_attributes` of a dataset are grouped separately."""
        attribute_groups: tuple[dict[str, tuple[str, ...]], ...] = {}, {}
        for dataset in datasets:
            for name, values in getattr(dataset, "attribute_values", {}).items():
                group = attribute_groups[name in getattr(dataset, "relation_attributes", ())]
                group[name] = tuple(dict.fromkeys((*group.get(name, ()), *values)))
        return cls(*attribute_groups)


class AttributeHead(nn.Module):
    """Linear classifiers of region attributes, with their loss.

    The loss is the sum of one cross-entropy per attribute, each averaged over all N regions. Regions with an unknown
    value contribute zero.

    Args:
        hidden_size: Width D of the vectors.
        num_vectors: Vectors Q per region.
        attributes: Possible values by attribute.
    """

    def __init__(self, hidden_size: int, num_vectors: int, attributes: Mapping[str, Sequence[str]]):
        super().__init__()
        self.heads: nn.ModuleDict = nn.ModuleDict(
            {name: nn.Linear(hidden_size * num_vectors, len(v)) for name, v in attributes.items()}
        )

    def forward(self, vectors: Tensor, labels: Mapping[str, Tensor]) -> Tensor:
        """Return the loss.

        Args:
            vectors: (N, Q, D) vectors of N regions.
            labels: (N,) index of each region's value, or `UNKNOWN_LABEL`, by attribute.

        Returns:
            Scalar loss.
        """
        flat = vectors.flatten(1)
        losses: list[Tensor] = [
            F.cross_entropy(head(flat).float(), labels[name], ignore_index=UNKNOWN_LABEL, reduction="sum")
            for name, head in self.heads.items()
        ]
        return sum(losses, start=vectors.new_zeros(())) / len(vectors)


def pool_ground_truth_features(regions: SegmenterOutput, targets: MaskTargets) -> Tensor:
    """Return the image features averaged under the ground-truth mask of each region, (N, 1, D)."""
    return pool_under_masks(
        regions.image_embeddings, regions.image_index, targets.masks.to(regions.image_embeddings.dtype)
    ).unsqueeze(1)
