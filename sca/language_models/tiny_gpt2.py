"""GPT-2 with a few hundred thousand parameters and its own byte-level vocabulary, trained from scratch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any, cast

import tokenizers
import torch
from sca_registry.contracts import GenerationOutput, LanguageModel, Tokenizer
from torch import Tensor, nn

from sca.language_models.greedy_search import generate_greedy
from sca.language_models.limits import check_num_positions, check_num_tokens
from sca.language_models.plain_tokenizer import PlainTokenizer
from sca.nn.gpt2 import Gpt2, Gpt2Block, KeyValueCache
from sca.nn.int8_linear import Int8Linear
from sca.nn.parameters import share_parameters

if TYPE_CHECKING:
    from sca.language_models.causal import CausalLanguageModel

END_TOKEN, END_TOKEN_ID = "<|end|>", 0
NUM_BYTE_TOKENS = 257  # the end token and one token per byte


class TinyGpt2(nn.Module):
    """Small model of GPT-2's architecture (Radford et al. 2019) with random weights.

    The tokenizer is byte-level BPE: it encodes any text, and each word of its training data is one token. Greedy search
    does not import transformers; beam search and sampling do, see `to_transformers`.

    Args:
        hidden_size: Width E.
        depth: Layers.
        num_heads: Attention heads.
        max_positions: Maximum length of prefix and caption together.
        dropout: Dropout probability of embeddings, attention and residuals.
        vocab_size: Vocabulary size: the first `vocab_size` tokens are kept; None keeps all. The tokens from id 726 on
            are words of generated questions.

    Attributes:
        eos_token_ids: Ids that end a caption.
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
        super().__init__()
        tokenizer = PlainTokenizer(_read_tokenizer(vocab_size), END_TOKEN)
        self.hidden_size = hidden_size
        self.max_positions = max_positions
        self.model: Gpt2 = Gpt2(tokenizer.vocab_size, max_positions, hidden_size, depth, num_heads, dropout)
        self.tokenizer = tokenizer
        self._lora_options: dict[str, Any] | None = None

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Tokenizer; None for token ids only.

        Raises:
            ValueError: A new tokenizer has more tokens than the model has embeddings.
        """
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer | None) -> None:
        check_num_tokens(getattr(tokenizer, "vocab_size", 0), self.model.transformer.wte.num_embeddings)
        self._tokenizer = tokenizer

    @property
    def eos_token_ids(self) -> list[int]:
        """Ids that end a caption."""
        return [END_TOKEN_ID if self.tokenizer is None else self.tokenizer.eos_token_id]

    @property
    def pad_token_id(self) -> int:
        """Id that fills sequences after EOS."""
        return END_TOKEN_ID if self.tokenizer is None else self.tokenizer.pad_token_id

    def embed_tokens(self, input_ids: Tensor) -> Tensor:
        """Embed token ids: (N, L) -> (N, L, E)."""
        return self.model.transformer.wte(input_ids)

    def hidden_states(self, embeddings: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute the hidden states of the last layer.

        Args:
            embeddings: (N, L, E) embeddings.
            attention_mask: (N, L) 1 for tokens, 0 for padding on the right.

        Returns:
            Hidden states (N, L, E).

        Raises:
            ValueError: The sequences are longer than `max_positions`.
        """
        check_num_positions(embeddings.shape[1], self.max_positions)
        return self.model.transformer(embeddings.to(self._dtype), attention_mask)

    def lm_head(self, hidden_states: Tensor) -> Tensor:
        """Return the logits of hidden states: (..., E) -> (..., V)."""
        return self.model.lm_head(hidden_states)

    @torch.no_grad()
    def generate(
        self,
        prefix: Tensor,
        max_new_tokens: int,
        num_beams: int = 1,
        num_captions: int = 1,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> GenerationOutput:
        """Generate captions by greedy search, beam search or sampling, as `CausalLanguageModel.generate` does."""
        max_steps = min(max_new_tokens, self.max_positions - prefix.shape[1])
        if not (num_beams == num_captions == 1 and not do_sample and len(prefix) and max_steps > 0):
            return self.to_transformers().generate(
                prefix, max_new_tokens, num_beams, num_captions, do_sample, temperature, top_p
            )
        sequences, scores = generate_greedy(
            lambda embeddings, cache: self.model.transformer(embeddings, cache=cache),
            self.embed_tokens,
            self.lm_head,
            KeyValueCache(),
            prefix.to(self._dtype),
            max_steps,
            self.pad_token_id,
            self.eos_token_ids,
        )
        return GenerationOutput(sequences[:, None], scores[:, None])

    def add_lora(
        self, rank: int, alpha: float, dropout: float = 0.0, target_modules: Sequence[str] | None = None
    ) -> None:
        """Add LoRA adapters; the arguments are those of `sca.language_models.lora.add_lora`."""
        from sca.language_models.lora import add_lora

        add_lora(self.model, "gpt2", rank, alpha, dropout, target_modules)
        self._lora_options = {"rank": rank, "alpha": alpha, "dropout": dropout, "target_modules": target_modules}

    def to_transformers(self) -> CausalLanguageModel:
        """Return transformers' GPT-2 with the parameters and the tokenizer of this model, which are not copied.

        Returns:
            The model of transformers.

        Raises:
            ValueError: The model has int8 layers.
        """
        from transformers import GPT2Config, GPT2LMHeadModel

        from sca.language_models.causal import CausalLanguageModel

        if any(isinstance(module, Int8Linear) for module in self.model.modules()):
            raise ValueError(
                "tiny-gpt2 with int8 layers supports greedy search only; load the model with precision=float32"
            )
        body = self.model.transformer
        dropout = body.drop.p
        config = GPT2Config(
            vocab_size=body.wte.num_embeddings,
            n_positions=self.max_positions,
            n_embd=self.hidden_size,
            n_layer=len(body.h),
            n_head=cast("Gpt2Block", body.h[0]).attn.num_heads,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            resid_pdrop=dropout,
            bos_token_id=self.eos_token_ids[0],
            eos_token_id=self.eos_token_ids[0],
            pad_token_id=self.pad_token_id,
        )
        with torch.device("meta"):
            language_model = CausalLanguageModel(GPT2LMHeadModel(config), self.tokenizer)
            if self._lora_options is not None:
                language_model.add_lora(**self._lora_options)
        share_parameters(self.model, language_model.model)
        return language_model.train(self.training)

    @property
    def _dtype(self) -> torch.dtype:
        return self.model.transformer.wte.weight.dtype


def convert_tiny_gpt2(language_model: LanguageModel) -> LanguageModel:
    """Return a `TinyGpt2` as a model of transformers, see `TinyGpt2.to_transformers`; others are unchanged."""
    return language_model.to_transformers() if isinstance(language_model, TinyGpt2) else language_model


def _read_tokenizer(vocab_size: int | None) -> tokenizers.Tokenizer:
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
    return tokenizers.Tokenizer.from_str(json.dumps(content))
