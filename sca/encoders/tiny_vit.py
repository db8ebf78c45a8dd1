"""Small vision transformer with a convolutional stem and SAM's neck, for models that train on a laptop."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from sca_registry.contracts import ImageFormat
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionNeck

from sca.io.errors import InputError
from sca.io.hub import fetch_config_fields, fetch_pretrained_config, load_pretrained

SEGMENTER_PREFIXES = ("prompt_encoder.", "mask_decoder.", "shared_image_embedding.")  # of tensors that `sam` loads


class TinyVit(nn.Module):
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

    stride = 8
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
        super().__init__()
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
        self.checkpoint: str | None = weights if pretrained else None
        self.revision = revision
        self._config_source = (weights, revision, None)
        if weights:
            config = fetch_pretrained_config(TinyVitConfig, weights, revision)
            options = _choose_stored_options(options, config, weights)
            self.default_segmenter = "box" if config.mask_decoder_config is None else "sam"
        self._build_modules(**options)
        if self.checkpoint:
            model = load_pretrained(
                TinyVitModel, self.checkpoint, revision, SEGMENTER_PREFIXES, dtype="float32", use_safetensors=True
            )
            self.load_state_dict(model.encoder.state_dict())

    def _build_modules(
        self,
        image_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        output_channels: int,
        stem_channels: tuple[int, int],
        stem_blocks: int,
        resize_mode: str,
    ) -> None:
        if image_size % self.stride:
            raise ValueError(f"image_size {image_size} must be a multiple of the stride {self.stride}")
        self.image_format: ImageFormat = ImageFormat(
            size=image_size, resize_mode=cast("Literal['pad', 'stretch']", resize_mode)
        )
        self.channels = output_channels
        half_channels, quarter_channels = stem_channels
        self.stem: nn.Module = nn.Sequential(
            *_make_convolution_layers(3, half_channels),
            *_make_convolution_layers(half_channels, quarter_channels),
            *(ConvolutionBlock(quarter_channels) for _ in range(stem_blocks)),
            nn.Conv2d(quarter_channels, hidden_size, 3, stride=2, padding=1),
        )
        grid_size = image_size // self.stride
        self.position: nn.Parameter = nn.Parameter(torch.zeros(1, grid_size * grid_size, hidden_size))
        nn.init.normal_(self.position, std=0.02)
        layer = nn.TransformerEncoderLayer(
            hidden_size, num_heads, 4 * hidden_size, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.transformer: nn.TransformerEncoder = nn.TransformerEncoder(
            layer, depth, nn.LayerNorm(hidden_size), enable_nested_tensor=False
        )
        for parameter in self.transformer.parameters():  # TransformerEncoder copies one layer: initialize each anew
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.neck: SamVisionNeck = SamVisionNeck(
            SamVisionConfig(hidden_size=hidden_size, output_channels=output_channels)
        )

    def get_config_fields(self) -> Mapping[str, Any]:
        """Return the stored configuration, including that of the segmenter; empty without weights."""
        return fetch_config_fields(*self._config_source)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images: (B, 3, S, S) -> (B, output_channels, S/8, S/8)."""
        patches = self.stem(pixel_values.contiguous(memory_format=torch.channels_last))  # (B, hidden_size, S/8, S/8)
        tokens = patches.flatten(2).transpose(1, 2) + self.position  # (B, h*w, hidden_size)
        return self.neck(self.transformer(tokens).unflatten(1, patches.shape[-2:]))


class TinyVitConfig(PretrainedConfig):
    """Configuration of pretrained weights: `config.json` of a folder.

    The tensors in `model.safetensors` are those of `TinyVitModel`. A folder with a segmenter also has the tables of
    transformers' `SamConfig` and the tensors of its prompt encoder and mask decoder.

    Args:
        encoder: All options of `TinyVit` before `weights`.
        mask_decoder_config: Fields of transformers' `SamMaskDecoderConfig`; None without a segmenter.
        **fields: Other fields, which are not used.
    """

    model_type = "tiny_vit"

    def __init__(
        self,
        encoder: Mapping[str, Any] | None = None,
        mask_decoder_config: Mapping[str, Any] | None = None,
        **fields: Any,
    ):
        super().__init__(**fields)
        self.encoder = dict(encoder or {})
        self.mask_decoder_config = mask_decoder_config


class TinyVitModel(PreTrainedModel):
    """Model of transformers that loads the tensors of a `TinyVit`, under the prefix `encoder.`.

    Args:
        config: Configuration of the weights.
    """

    config_class = TinyVitConfig

    def __init__(self, config: TinyVitConfig):
        super().__init__(config)
        self.encoder: TinyVit = TinyVit(**config.encoder)
        self.post_init()


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


class ConvolutionBlock(nn.Module):
    """Residual block of two 3x3 convolutions: (B, C, h, w) -> (B, C, h, w).

    Args:
        channels: Channels C.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.layers: nn.Sequential = nn.Sequential(
            *_make_convolution_layers(channels, channels, stride=1),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Apply the block."""
        return nn.functional.gelu(features + self.layers(features))


def _make_convolution_layers(in_channels: int, out_channels: int, stride: int = 2) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.GELU(),
    )
