"""Pretrained weights of `TinyVit` in transformers' format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from sca.nn.tiny_vit import TinyVitBody


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
        self.encoder: TinyVitBody = TinyVitBody(**config.encoder)
        self.post_init()
