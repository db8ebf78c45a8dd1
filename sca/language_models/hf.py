"""Causal language models of transformers by Hub id or folder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sca_registry.contracts import Tokenizer
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from sca.devices import DTYPES
from sca.io.errors import InputError
from sca.io.hub import fetch_model_folder, load_pretrained, make_config, silence_transformers
from sca.io.weight_files import has_tokenizer, translate_load_errors
from sca.language_models.causal import CausalLanguageModel, TextTokenizer
from sca.language_models.phi import FusedPhiForCausalLM, has_fused_attention
from sca.language_models.quantization import (
    check_layers,
    check_weights_are_full,
    make_load_options,
    prepare_layers,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HfLanguageModel(CausalLanguageModel):
    """Decoder-only model of transformers' `AutoModelForCausalLM`.

    Args:
        weights: Hub id or folder in transformers' format.
        revision: Revision of the Hub id.
        pretrained: Load `weights`; False initializes randomly from `config`, or else from the configuration stored with
            the weights.
        config: Fields of the configuration, including `model_type`.
        tokenizer: Hub id or folder of the tokenizer; None for that of the weights. A model without a tokenizer works
            with token ids.
        eos_token: EOS token; None for that of the tokenizer.
        dtype: Dtype of the parameters: "float32", "bfloat16" or "float16".
        quantization: How the weights of the linear layers are stored: "int8", "nf4" or "int4", see
            `sca.language_models.quantization`; None for `dtype`.
        gradient_checkpointing: Recompute the layers in the backward pass to save memory.
        trust_remote_code: Run code stored with the weights; use it only with sources that you trust.

    Raises:
        ValueError: An option is invalid, or neither `weights` nor `config` is set.
    """

    def __init__(
        self,
        weights: str | None = None,
        revision: str | None = None,
        pretrained: bool = True,
        config: Mapping[str, Any] | None = None,
        tokenizer: str | None = None,
        eos_token: str | None = None,
        dtype: str = "float32",
        quantization: str | None = None,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
    ):
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}; choose from {', '.join(DTYPES)}")
        if not isinstance(trust_remote_code, bool):
            raise ValueError(f"trust_remote_code is {trust_remote_code!r}; expected true or false")
        load_options: dict[str, Any] = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code}
        if weights and pretrained:
            if quantization is not None:
                check_weights_are_full(weights, revision)
                load_options |= make_load_options(quantization, load_options["dtype"])
            model: PreTrainedModel = load_pretrained(
                _resolve_model_class(weights, revision, trust_remote_code), weights, revision, **load_options
            )
        else:
            model = AutoModelForCausalLM.from_config(make_config(weights, revision, config), **load_options)
            model.tie_weights()  # even if the caller disables the initialization of parameters
            if quantization is not None and model.device.type != "meta":
                raise ValueError("random weights cannot be quantized; omit quantization, or set weights")
        if quantization is not None:
            check_layers(model, quantization)
            prepare_layers(model, quantization)
        tokenizer_folder: Path | None = None
        if tokenizer:
            tokenizer_folder = fetch_model_folder(tokenizer, include_weights=False)
        elif weights and pretrained:
            tokenizer_folder = fetch_model_folder(weights, revision)
        super().__init__(
            model, load_tokenizer(tokenizer_folder, eos_token, trust_remote_code) if tokenizer_folder else None
        )
        self.source_tokenizer: Tokenizer | None = (
            self.tokenizer
        )  # a tokenizer that is set later is not stored with the weights
        self.checkpoint: str | None = weights if pretrained else None
        self.revision = revision
        self.quantization = quantization
        self.gradient_checkpointing = gradient_checkpointing

    def hidden_states(self, embeddings: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the hidden states of the last layer: (N, L, E) and (N, L) -> (N, L, E)."""
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return super().hidden_states(embeddings, attention_mask)
        layers: list[Any] = [layer for layer in self.model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        training_modes = [layer.training for layer in layers]
        for layer in layers:
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
            layer.gradient_checkpointing = True
            layer.training = True  # transformers checkpoints layers in training mode only; submodules keep their mode
        try:
            return super().hidden_states(embeddings, attention_mask)
        finally:
            for layer, mode in zip(layers, training_modes, strict=True):
                layer.gradient_checkpointing, layer.training = False, mode


def load_tokenizer(folder: Path, eos_token: str | None = None, trust_remote_code: bool = False) -> TextTokenizer | None:
    """Load the tokenizer of a folder.

    Args:
        folder: Folder in transformers' format.
        eos_token: EOS token; None for the tokenizer's own.
        trust_remote_code: Run code stored in the folder.

    Returns:
        The tokenizer; None if the folder has none.

    Raises:
        InputError: The tokenizer cannot be loaded.
    """
    if not has_tokenizer(folder):
        return None
    try:
        with translate_load_errors(f"the tokenizer in {folder}"), silence_transformers():
            return TextTokenizer(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code), eos_token)
    except InputError as error:
        hint = ""
        if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
            hint = ". SentencePiece tokenizers require an extra: pip install 'segment-caption-anything[sentencepiece]'"
        raise InputError(f"{error}{hint}") from error


def _resolve_model_class(
    weights: str, revision: str | None, trust_remote_code: bool
) -> type[FusedPhiForCausalLM] | type[AutoModelForCausalLM]:
    with translate_load_errors(weights):
        is_fused = has_fused_attention(fetch_model_folder(weights, revision, include_code=trust_remote_code))
    return FusedPhiForCausalLM if is_fused else AutoModelForCausalLM
