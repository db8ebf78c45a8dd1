"""Language models from GGUF files, the format of llama.cpp."""

from __future__ import annotations

from pathlib import Path

import torch
from sca_registry.contracts import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from sca.devices import DTYPES
from sca.io.hub import silence_transformers
from sca.io.weight_files import translate_load_errors
from sca.language_models.causal import CausalLanguageModel, TextTokenizer


class GgufLanguageModel(CausalLanguageModel):
    """Language model and tokenizer of a GGUF file.

    transformers must support the architecture. Quantized weights are dequantized to `dtype` when they are loaded.

    Args:
        weights: GGUF file.
        eos_token: EOS token; None for that of the file.
        dtype: Dtype of the parameters: "float32", "bfloat16" or "float16".

    Raises:
        ValueError: The file does not exist, or the dtype is unknown.
    """

    def __init__(self, weights: str, eos_token: str | None = None, dtype: str = "float32"):
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}; choose from {', '.join(DTYPES)}")
        file = Path(weights).expanduser()
        if not file.is_file():
            raise ValueError(f"no GGUF file {weights}; set weights=FILE")
        load_options = {"dtype": getattr(torch, dtype), "trust_remote_code": False}
        with translate_load_errors(weights), silence_transformers():
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **load_options)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        super().__init__(model, TextTokenizer(tokenizer, eos_token))
        self.source_tokenizer: Tokenizer | None = self.tokenizer
        self.checkpoint = weights
