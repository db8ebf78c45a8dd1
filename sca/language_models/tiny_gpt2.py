"""GPT-2 with a few hundred thousand parameters and its own byte-level vocabulary, trained from scratch."""

from __future__ import annotations

from importlib.resources import files

from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sca.language_models.causal import CausalLanguageModel, TextTokenizer

END_TOKEN = "<|end|>"


class TinyGpt2(CausalLanguageModel):
    """Small model of GPT-2's architecture (Radford et al. 2019) with random weights.

    The tokenizer is byte-level BPE: it encodes any text, and each word of its training data is one token.

    Args:
        hidden_size: Width E.
        depth: Layers.
        num_heads: Attention heads.
        max_positions: Maximum length of prefix and caption together.
        dropout: Dropout probability of embeddings, attention and residuals.
    """

    def __init__(
        self, hidden_size: int = 128, depth: int = 2, num_heads: int = 4, max_positions: int = 96, dropout: float = 0.0
    ):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(files("sca.language_models") / "tiny_tokenizer.json"),
            eos_token=END_TOKEN,
            pad_token=END_TOKEN,
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
