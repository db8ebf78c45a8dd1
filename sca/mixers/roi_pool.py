"""Pooling under the box, the baseline of SCA (arXiv 2312.00869): no transformer, the projection does the work."""

from __future__ import annotations

from sca_registry.contracts import Segmenter, SegmenterOutput
from torch import Tensor, nn

from sca.nn.roi_align import roi_align


class RoiPoolMixer(nn.Module):
    """The image's features under each region's box as queries, by ROIAlign: (N, output_size^2, D).

    A region without a box (a point, with a segmenter that finds none) is refused with a ValueError.
    """

    uses_grid = False

    def __init__(self, segmenter: Segmenter, output_size: int = 6):
        super().__init__()
        self.hidden_size = segmenter.channels
        self.output_size = output_size
        self.num_queries = output_size * output_size

    def forward(self, regions: SegmenterOutput) -> Tensor:
        if regions.boxes is None:
            raise ValueError("the mixer 'roi-pool' needs boxes: ask with boxes, or use segmenter=sam, which finds them")
        scale = regions.image_embeddings.shape[-1] / regions.image_size
        pooled = roi_align(
            regions.image_embeddings, regions.image_index, regions.boxes * scale, self.output_size
        )  # (N, D, size, size)
        return pooled.flatten(2).transpose(1, 2)
