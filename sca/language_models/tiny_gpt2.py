"""GPT-2 with a few hundred thousand parameters and its own byte-level vocabulary, trained from scratch."""

from __future__ import annotations

import json
from importlib.resources import files

from tokenizers import Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sca.language_models.causal import CausalLanguageModel, TextTokenizer

END_TOKEN = "<|end|>"
NUM_BYTE_TOKENS = 257  # the end token and one token per byte


class TinyGpt2(CausalLanguageModel):
    """Small model of GPT-2's architecture (Radford et al. 2019) with random weights.

    The tokenizer is byte-level BPE: it encodes any text, and each word of its training data is one token.

    Args:
        hidden_size: Width E.
        depth: Layers.
        num_heads: Attention heads.
        max_positions: Maximum length of prefix and caption together.
        dropout: Dropout probability of embeddings, attention and residuals.
        vocab_size: Vocabulary size: the first `vocab_size` tokens are kept; None keeps all. The tokens from id 726 on
            are words of generated questions.
    """

    def __init__(
        self,
        hidden_size: int = 128,
        depth: int = 2,
        num_heads: int = 4,
        max_positions: int = 96,
        dropout: float = 0.0,
        vocab_size: int | None = None,
    ):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=_read_tokenizer(vocab_size), eos_token=END_TOKEN, pad_token=END_TOKEN
        )
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=max_positions,
            n_embd=hidden_size,
            n_layer=depth,
            n_head=num_heads,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            resid_pdrop=dropout,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        super().__init__(GPT2LMHeadModel(config), TextTokenizer(tokenizer))


def _read_tokenizer(vocab_size: int | None) -> Tokenizer:
    """Read the tokenizer; with `vocab_size`, without the tokens from that id on and their merges."""
    content = json.loads((files("sca.language_models") / "tiny_tokenizer.json").read_text("utf-8"))
    model = content["model"]
    if vocab_size is not None:
        if not NUM_BYTE_TOKENS <= vocab_size <= len(model["vocab"]):
            raise ValueError(
                f"vocab_size is {vocab_size}; expected a number from {NUM_BYTE_TOKENS} to {len(model['vocab'])}"
            )
        model["vocab"] = {token: index for token, index in model["vocab"].items() if index < vocab_size}
        model["merges"] = [merge for merge in model["merges"] if "".join(merge) in model["vocab"]]
    return Tokenizer.from_str(json.dumps(content))
