"""ROI pooling, a baseline of SCA (arXiv 2312.00869): no transformer, only pooling and the projection."""

from __future__ import annotations

from sca_registry.contracts import Segmenter, SegmenterOutput
from torch import Tensor, nn

from sca.nn.boxes import require_boxes
from sca.nn.roi_align import roi_align


class RoiPoolMixer(nn.Module):
    """ROIAlign of the image features under each region's box; returns queries (N, output_size^2, D).

    Args:
        segmenter: Segmenter.
        output_size: Side of the pooled grid.
    """

    uses_grid = False

    def __init__(self, segmenter: Segmenter, output_size: int = 6):
        super().__init__()
        self.hidden_size: int = segmenter.channels
        self.output_size = output_size
        self.num_queries: int = output_size * output_size

    def forward(self, regions: SegmenterOutput) -> Tensor:
        """Return the query embeddings of each region, (N, output_size^2, D).

        Args:
            regions: N regions with boxes.

        Returns:
            (N, output_size^2, D) queries.

        Raises:
            ValueError: The regions have no boxes: point prompts with a segmenter that predicts no masks.
        """
        boxes = require_boxes(regions, "roi-pool")
        scale = regions.image_embeddings.shape[-1] / regions.image_size
        # (N, D, output_size, output_size)
        pooled = roi_align(regions.image_embeddings, regions.image_index, boxes * scale, self.output_size)
        return pooled.flatten(2).transpose(1, 2)
