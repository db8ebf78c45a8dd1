"""Small vision transformer with a convolutional stem and SAM's neck, for models that train on a laptop."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sca.io.errors import InputError
from sca.io.hub import fetch_config_fields, fetch_pretrained_config, load_pretrained
from sca.nn.tiny_vit import TinyVitBody

if TYPE_CHECKING:
    from sca.encoders.tiny_vit_weights import TinyVitConfig

SEGMENTER_PREFIXES = ("prompt_encoder.", "mask_decoder.", "shared_image_embedding.")  # of tensors that `sam` loads


class TinyVit(TinyVitBody):
    """Small vision transformer with a convolutional stem.

    It maps normalized images (B, 3, S, S) to features (B, output_channels, S/8, S/8). The stem of strided convolutions
    makes a transformer of this size learn fast ("Early convolutions help transformers see better", arXiv 2106.14881).
    Blocks are pre-norm (ViT, arXiv 2010.11929), and the neck is SAM's (arXiv 2304.02643).

    Args:
        image_size: S in pixels, a multiple of 8.
        hidden_size: Width of the transformer.
        depth: Layers of the transformer.
        num_heads: Attention heads.
        output_channels: Feature channels.
        stem_channels: Channels at 1/2 and 1/4 of the resolution.
        stem_blocks: Residual convolution blocks at 1/4 of the resolution.
        resize_mode: "pad" or "stretch", see `ImageFormat`.
        weights: Hub id or folder in the format of `TinyVitConfig`. The options above are those stored with the weights.
            If the weights contain those of the segmenter `sam`, it uses them. Otherwise the default segmenter is `box`.
        revision: Revision of the Hub id.
        pretrained: Load `weights`; False initializes randomly with the options stored with them.

    Raises:
        ValueError: `image_size` is not a multiple of 8.
        InputError: The weights cannot be read or do not fit, or an option differs from that stored with them.
    """

    default_segmenter = "sam"

    def __init__(
        self,
        image_size: int = 128,
        hidden_size: int = 128,
        depth: int = 4,
        num_heads: int = 4,
        output_channels: int = 96,
        stem_channels: tuple[int, int] = (32, 64),
        stem_blocks: int = 1,
        resize_mode: str = "pad",
        weights: str | None = None,
        revision: str | None = None,
        pretrained: bool = True,
    ):
        options: dict[str, Any] = {
            "image_size": image_size,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
            "output_channels": output_channels,
            "stem_channels": stem_channels,
            "stem_blocks": stem_blocks,
            "resize_mode": resize_mode,
        }
        config: TinyVitConfig | None = None
        if weights:
            from sca.encoders.tiny_vit_weights import TinyVitConfig

            config = fetch_pretrained_config(TinyVitConfig, weights, revision)
            options = _choose_stored_options(options, config, weights)
        super().__init__(**options)
        if config is not None and config.mask_decoder_config is None:
            self.default_segmenter = "box"
        self.checkpoint: str | None = weights if pretrained else None
        self.revision = revision
        self._config_source = (weights, revision, None)
        if self.checkpoint:
            from sca.encoders.tiny_vit_weights import TinyVitModel

            model = load_pretrained(
                TinyVitModel, self.checkpoint, revision, SEGMENTER_PREFIXES, dtype="float32", use_safetensors=True
            )
            self.load_state_dict(model.encoder.state_dict())

    def get_config_fields(self) -> Mapping[str, Any]:
        """Return the stored configuration, including that of the segmenter; empty without weights."""
        return fetch_config_fields(*self._config_source)


def _choose_stored_options(options: Mapping[str, Any], config: TinyVitConfig, weights: str) -> dict[str, Any]:
    """Return the options stored with weights; InputError if an option is neither the stored value nor the default."""
    stored = {name: tuple(value) if isinstance(value, list) else value for name, value in config.encoder.items()}
    if stored.keys() != options.keys():
        raise InputError(
            f"{weights} has no weights of tiny-vit: its config.json requires a table encoder with the options "
            f"{', '.join(options)}; choose another folder"
        )
    parameters = inspect.signature(TinyVit.__init__).parameters
    for name, value in options.items():
        value = tuple(value) if isinstance(value, list) else value
        if value not in (stored[name], parameters[name].default):
            raise InputError(f"{weights} was trained with {name}={stored[name]!r}; remove {name}={value!r}")
    return stored
