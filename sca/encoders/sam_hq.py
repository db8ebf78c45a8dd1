"""HQ-SAM's image encoder (Segment Anything in High Quality, arXiv 2306.01567), built from transformers' modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from sca_registry.contracts import ImageFormat
from torch import Tensor, nn
from transformers import SamHQConfig, SamHQMaskDecoderConfig, SamHQModel, SamHQVisionConfig

from sca.encoders.sam import INITIALIZER_RANGE, ChunkedAttention
from sca.encoders.stored_normalization import apply_stored_normalization
from sca.io.hub import check_model_type, fetch_config_fields, fetch_pretrained_config, load_pretrained
from sca.nn.feature_packing import count_packed_channels, pack_feature_maps


class SamHqEncoder(nn.Module):
    """HQ-SAM's image encoder: SAM's, with features of its first block with global attention at a higher resolution.

    It maps normalized images (B, 3, S, S) to features (B, C, S/16, S/16). The first D = 256 channels are SAM's image
    features. The others are the features of the first block with global attention, compressed to D/8 channels at four
    times the resolution, packed into the grid: C = D + 16 D/8 = 768.

    Args:
        weights: Hub id or folder in transformers' format.
        revision: Revision of the Hub id.
        pretrained: Load `weights`; False initializes randomly from `config`, or else from the configuration stored with
            the weights.
        config: Fields of transformers' `SamHQConfig` that differ from its defaults.
        high_res_features: Include the features of the higher resolution. Without them, C = D: cached features are a
            third of the size, and the borders of masks are coarser.

    Raises:
        ValueError: Neither `weights` nor `config` is set.
    """

    default_segmenter = "sam-hq"

    def __init__(
        self,
        weights: str | None = None,
        revision: str | None = None,
        pretrained: bool = True,
        config: Mapping[str, Any] | None = None,
        high_res_features: bool = True,
    ):
        super().__init__()
        self.checkpoint = weights if pretrained else None
        self.revision = revision
        self._config_source = (weights, revision, config)
        if self.checkpoint:
            check_model_type(self.checkpoint, revision, ("sam_hq",))
            model = load_pretrained(SamHQModel, self.checkpoint, revision, dtype="float32")
        else:
            model = SamHQModel(_build_config(weights, revision, config))
        self.vision = model.vision_encoder
        for layer in self.vision.layers:
            layer.attn.__class__ = ChunkedAttention  # same parameters, other forward
        self.image_format = apply_stored_normalization(
            ImageFormat(size=cast("int", self.vision.config.image_size)), self.checkpoint, revision
        )
        self.stride: int = cast("int", self.vision.config.patch_size)
        self.image_channels: int = self.vision.config.output_channels
        self.high_res_projection: nn.Module | None = None
        self.high_res_shapes: tuple[tuple[int, int], ...] = ()
        if high_res_features:
            decoder = model.mask_decoder
            self.high_res_projection = nn.Sequential(
                decoder.compress_vit_conv1, decoder.compress_vit_norm, decoder.activation, decoder.compress_vit_conv2
            )
            self.high_res_shapes = ((self.image_channels // 8, 4),)
        self.channels = count_packed_channels(self.image_channels, self.high_res_shapes)

    def get_config_fields(self) -> Mapping[str, Any]:
        """Return the stored configuration, including that of the segmenter; empty without weights."""
        return fetch_config_fields(*self._config_source)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images: (B, 3, S, S) -> (B, C, S/16, S/16)."""
        output = self.vision(pixel_values)
        if self.high_res_projection is None:
            return output.last_hidden_state
        early_features = output.intermediate_embeddings[0].permute(0, 3, 1, 2).contiguous()
        return pack_feature_maps(output.last_hidden_state, [self.high_res_projection(early_features)])


def _build_config(weights: str | None, revision: str | None, config: Mapping[str, Any] | None) -> SamHQConfig:
    if config is not None:
        full_config = SamHQConfig(**config)
    elif weights is not None:
        full_config = fetch_pretrained_config(SamHQConfig, weights, revision)
    else:
        raise ValueError(
            "neither weights nor config is set; set weights to a Hub id, such as "
            "weights=syscv-community/sam-hq-vit-base, or to a folder"
        )
    # transformers converts tables
    vision_config = cast("SamHQVisionConfig", full_config.vision_config)
    vision_config._attn_implementation = "sdpa"
    vision_config.initializer_range = INITIALIZER_RANGE
    cast("SamHQMaskDecoderConfig", full_config.mask_decoder_config).vit_dim = vision_config.hidden_size
    return full_config
