"""Masks without captions, from the segmenter of an encoder."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import sca_registry
from sca_registry.spec import ComponentSpec

from sca.captioners.region_captioner import RegionCaptioner, RegionView, ScoredText, resolve_generation_options
from sca.inference.engine import REGION_BATCH_SIZE, EncodedImages
from sca.precision import set_precision

logger: logging.Logger = logging.getLogger(__name__)


class MaskOnly(RegionCaptioner):
    """Captioner whose texts are empty: it predicts masks only, and scores them by their predicted IoU.

    `sca.load_captioner` uses it for the name of an encoder, such as "sam-vit-b", and for a folder or Hub id of a
    segmenter in transformers' format.

    Args:
        encoder: Encoder whose segmenter predicts the masks, see `RegionCaptioner`.
        device: Device of the encoder and the segmenter.
        precision: Precision of the encoder and the segmenter, see `sca.load`; None for float32.
        region_batch_size: Regions per batch of the segmenter. Affects memory, not results.

    Raises:
        ValueError: `encoder` is None, or its segmenter predicts no masks.
        RegistryError: The encoder is unknown, or an option is invalid.
        InputError: The weights cannot be read.
    """

    def __init__(
        self,
        encoder: str | Mapping[str, Any] | None = None,
        device: str = "cpu",
        precision: str | None = None,
        region_batch_size: int = REGION_BATCH_SIZE,
    ):
        if encoder is None:
            raise ValueError("masks require an encoder; pass its name, such as sam-vit-b+none")
        super().__init__(encoder, device)
        assert self.model is not None  # there is an encoder
        is_built = ComponentSpec.from_dict(encoder, "encoder").name in sca_registry.encoders
        if is_built and getattr(self.model.segmenter, "checkpoint", None) is None:
            logger.warning("sca: the segmenter has random weights, so its masks have no meaning")
        set_precision(self.model, precision)
        self.region_batch_size = region_batch_size
        self.metadata: dict[str, Any] = {"captioner": "none", "encoder": encoder, "precision": self.precision}

    def caption_regions(
        self, regions: Sequence[RegionView], task: str, encoded: EncodedImages, **generation: Any
    ) -> list[ScoredText]:
        """Return an empty text per region, scored by the predicted IoU of its mask."""
        resolve_generation_options(generation)  # only checks the options
        return [ScoredText("", view.predicted_iou or 0.0) for view in regions]
