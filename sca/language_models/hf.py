"""Any causal language model of transformers, by hub id or folder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from sca.devices import DTYPES
from sca.io.errors import InputError
from sca.io.hub import fetch_model_folder, fetch_pretrained_config, load_pretrained, silence_transformers
from sca.io.weight_files import has_tokenizer, translate_load_errors
from sca.language_models.causal import CausalLanguageModel, TextTokenizer
from sca.language_models.phi import FusedPhiForCausalLM, has_fused_attention


class HfLanguageModel(CausalLanguageModel):
    """A decoder-only model of transformers' AutoModelForCausalLM.

    weights: a hub id, at a revision, or a folder in the same format. tokenizer: another id or folder for it; a model
    that has none anywhere works with ids. eos: the token that ends a text, where the tokenizer does not say. config:
    fields of the configuration, `model_type` among them; with `pretrained=False` the model is built with random weights
    from them, or from the configuration that lies with the weights. dtype: of the parameters. checkpointing: layers are
    computed again in the backward pass instead of being remembered. trust_remote_code: runs code that lies with the
    weights, so only for sources that you trust.
    """

    def __init__(
        self,
        weights: str | None = None,
        revision: str | None = None,
        pretrained: bool = True,
        config: Mapping[str, Any] | None = None,
        tokenizer: str | None = None,
        eos: str | None = None,
        dtype: str = "float32",
        checkpointing: bool = False,
        trust_remote_code: bool = False,
    ):
        if dtype not in DTYPES:
            raise ValueError(f"no dtype {dtype!r}: there are {', '.join(DTYPES)}")
        if not isinstance(trust_remote_code, bool):
            raise ValueError(f"trust_remote_code is {trust_remote_code!r}; choose true or false")
        load_options = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code}
        if weights and pretrained:
            model = load_pretrained(
                _resolve_model_class(weights, revision, trust_remote_code), weights, revision, **load_options
            )
        else:
            model = AutoModelForCausalLM.from_config(make_config(weights, revision, config), **load_options)
            model.tie_weights()  # also where the caller keeps parameters from being initialized
        tokenizer_folder = None
        if tokenizer:
            tokenizer_folder = fetch_model_folder(tokenizer, include_weights=False)
        elif weights and pretrained:
            tokenizer_folder = fetch_model_folder(weights, revision)
        super().__init__(model, tokenizer_folder and load_tokenizer(tokenizer_folder, eos, trust_remote_code))
        self.source_tokenizer = self.tokenizer  # one that is given later is not to be had from the source
        self.checkpoint = weights if pretrained else None
        self.revision = revision
        self.checkpointing = checkpointing

    def hidden_states(self, embeddings: Tensor, attention_mask: Tensor) -> Tensor:
        if not (self.checkpointing and torch.is_grad_enabled()):
            return super().hidden_states(embeddings, attention_mask)
        layers = [layer for layer in self.model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        training_modes = [layer.training for layer in layers]
        for layer in layers:
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
            layer.gradient_checkpointing = True
            layer.training = True  # transformers checkpoints only what trains; what lies in the layer stays as it is
        try:
            return super().hidden_states(embeddings, attention_mask)
        finally:
            for layer, mode in zip(layers, training_modes, strict=True):
                layer.gradient_checkpointing, layer.training = False, mode


def load_tokenizer(folder: Path, eos_token: str | None = None, trust_remote_code: bool = False) -> TextTokenizer | None:
    """The tokenizer that lies in a folder, None if there is none. Raises InputError for one that cannot be read."""
    if not has_tokenizer(folder):
        return None
    try:
        with translate_load_errors(f"the tokenizer in {folder}"), silence_transformers():
            return TextTokenizer(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code), eos_token)
    except InputError as error:
        hint = ""
        if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
            hint = ". One of SentencePiece needs: pip install 'segment-caption-anything[sentencepiece]'"
        raise InputError(f"{error}{hint}") from error


def _resolve_model_class(weights: str, revision: str | None, trust_remote_code: bool) -> type:
    with translate_load_errors(weights):
        is_fused = has_fused_attention(fetch_model_folder(weights, revision, include_code=trust_remote_code))
    return FusedPhiForCausalLM if is_fused else AutoModelForCausalLM


def make_config(weights: str | None, revision: str | None, config: Mapping[str, Any] | None) -> PreTrainedConfig:
    """Return the configuration with the given fields, or else the one that is stored with the weights."""
    if config is not None:
        return AutoConfig.for_model(**config)
    if weights is None:
        raise ValueError("there are neither weights nor a config: give weights=FOLDER or a hub id")
    return fetch_pretrained_config(AutoConfig, weights, revision)
