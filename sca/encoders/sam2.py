"""Image encoders of SAM 2's family, built from transformers' modules.

SAM 2 and 2.1 (arXiv 2408.00714), EdgeTAM (arXiv 2501.07256) and the tracker of SAM 3 (arXiv 2511.16719).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, cast

from sca_registry.contracts import ImageFormat
from torch import Tensor, nn
from transformers import Sam3TrackerModel

from sca.encoders.stored_normalization import apply_stored_normalization
from sca.io.errors import InputError
from sca.io.hub import fetch_config_fields
from sca.io.validation import check_choice
from sca.nn.feature_packing import count_packed_channels, pack_feature_maps
from sca.nn.sam2 import NUM_LEVELS, build_sam2_model, get_high_res_shapes, load_sam2_model

SAM3_MEAN = SAM3_STD = (0.5, 0.5, 0.5)
RESAMPLE_CHOICES = ("bilinear", "bicubic")


class Sam2Encoder(nn.Module):
    """Image encoder of SAM 2, EdgeTAM or SAM 3's tracker.

    It maps normalized images (B, 3, S, S) to features (B, C, S/s, S/s). The first D = 256 channels are the image
    features that SAM 2's mask decoder attends to. The others are the features at two and four times the resolution,
    which the decoder adds while it upscales masks, packed into the grid: C = D + 4 D/4 + 16 D/8 = 1024.

    Args:
        weights: Hub id or folder in transformers' format, of the image model or of the video model.
        revision: Revision of the Hub id.
        pretrained: Load `weights`; False initializes randomly from `config`, or else from the configuration stored with
            the weights.
        model_type: "sam2", "edgetam" or "sam3_tracker"; None for that of the weights, or for SAM 2 without weights.
        config: Fields of transformers' configuration that differ from its defaults.
        high_res_features: Include the features of higher resolutions. Without them, C = D: cached features are a
            quarter of the size, and the borders of masks are coarser.
        resample: Interpolation used for resizing images; PAM uses "bicubic".

    Raises:
        ValueError: Neither `weights` nor `config` is set, or the model type or `resample` is unknown.
        InputError: The weights belong to a different model.
    """

    default_segmenter = "sam2"

    def __init__(
        self,
        weights: str | None = None,
        revision: str | None = None,
        pretrained: bool = True,
        model_type: str | None = None,
        config: Mapping[str, Any] | None = None,
        high_res_features: bool = True,
        resample: str = "bilinear",
    ):
        super().__init__()
        check_choice("resample", resample, RESAMPLE_CHOICES)
        self.checkpoint = weights if pretrained else None
        self.revision = revision
        self._config_source = (weights, revision, config)
        if self.checkpoint:
            model = load_sam2_model(self.checkpoint, revision, model_type)
        else:
            model = build_sam2_model(weights, revision, model_type, config)
        self.vision, self.no_memory_embedding = model.vision_encoder, model.no_memory_embedding
        if isinstance(model, Sam3TrackerModel):  # SAM 3's detector uses a fourth level, its tracker does not
            self.vision.neck.fpn_layers = self.vision.neck.fpn_layers[:NUM_LEVELS]
        self.high_res_projections = nn.ModuleList()
        self.high_res_shapes: tuple[tuple[int, int], ...] = ()
        prompt_config: Any = model.config.prompt_encoder_config  # transformers converts tables
        self.image_channels: int = prompt_config.hidden_size
        if high_res_features:
            self.high_res_projections.extend((model.mask_decoder.conv_s1, model.mask_decoder.conv_s0))
            self.high_res_shapes = get_high_res_shapes(self.image_channels)
        self.channels = count_packed_channels(self.image_channels, self.high_res_shapes)
        self.image_format = ImageFormat(
            size=_get_side(prompt_config.image_size),
            resample=cast("Literal['bilinear', 'bicubic']", resample),
            resize_mode="stretch",
        )
        if isinstance(model, Sam3TrackerModel):
            self.image_format = replace(self.image_format, mean=SAM3_MEAN, std=SAM3_STD)
        self.image_format = apply_stored_normalization(self.image_format, self.checkpoint, revision)
        self.stride = _get_side(prompt_config.patch_size)

    def get_config_fields(self) -> Mapping[str, Any]:
        """Return the stored configuration, including that of the segmenter; empty without weights."""
        return fetch_config_fields(*self._config_source)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images: (B, 3, S, S) -> (B, C, S/s, S/s)."""
        # from the highest resolution to the lowest
        high, middle, low = self.vision(pixel_values).fpn_hidden_states[:NUM_LEVELS]
        image_features = low + self.no_memory_embedding.reshape(1, -1, 1, 1)
        if not self.high_res_projections:
            return image_features
        maps = [project(each) for project, each in zip(self.high_res_projections, (middle, high), strict=True)]
        return pack_feature_maps(image_features, maps)


def _get_side(size: int | list[int] | tuple[int, int]) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise InputError(f"the configuration has the size {size}; SCA encodes square images and patches")
    return sides.pop()
