"""Wrapper for decoder-only language models of transformers with embedding inputs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from sca_registry.contracts import GenerationOutput, Tokenizer
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from sca.io.hub import silence_transformers
from sca.language_models.greedy_search import generate_greedy, has_plain_greedy_settings
from sca.language_models.kv_cache import make_buffered_cache
from sca.language_models.limits import check_num_positions, check_num_tokens
from sca.language_models.model_inspection import ModelStructure, inspect_model

if TYPE_CHECKING:
    from transformers._typing import GenerativePreTrainedModel

POSITION_LIMIT_FIELDS = ("max_position_embeddings", "max_target_positions", "max_seq_len")  # in configurations
PREFIX_MARK = "<visual prefix>"  # replaced by the embeddings of a region
SPECIAL_TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class CausalLanguageModel(nn.Module):
    """Causal language model with embedding inputs.

    Hidden states and logits are those of the model's own forward. The generation config of the model, such as a
    repetition penalty, is not used: captions depend on the arguments of `generate` only. Captions are padded on the
    right, so that no token attends to padding.

    Args:
        model: Causal model of transformers.
        tokenizer: Tokenizer; None for a checkpoint without one, which still works with token ids.

    Attributes:
        hidden_size: Width E of the embeddings.
        max_positions: Maximum length of prefix and caption together; None if the configuration has no limit.
        quantization: Quantization of the stored weights, see `sca.language_models.quantization`; None for none.

    Raises:
        ValueError: The model does not accept embeddings, is not causal, or has fewer embeddings than the tokenizer has
            tokens.
    """

    quantization: str | None = None

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer | None):
        super().__init__()
        self.model: PreTrainedModel = model
        if model.can_generate():
            special_tokens = {name: getattr(model.generation_config, name) for name in SPECIAL_TOKEN_FIELDS}
            model.generation_config = GenerationConfig(**special_tokens)
        self.structure: ModelStructure = inspect_model(model)
        self.tokenizer = tokenizer
        self.hidden_size: int = self._embedding_layer.embedding_dim
        config = model.config.get_text_config(decoder=True)
        limits = (getattr(config, name, None) for name in POSITION_LIMIT_FIELDS)
        self.max_positions: int | None = next((limit for limit in limits if limit), None)

    @property
    def _embedding_layer(self) -> nn.Embedding:
        return cast("nn.Embedding", self.model.get_input_embeddings())

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Tokenizer; None if the checkpoint has none.

        Raises:
            ValueError: A new tokenizer has more tokens than the model has embeddings.
        """
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer | None) -> None:
        check_num_tokens(getattr(tokenizer, "vocab_size", 0), self._embedding_layer.num_embeddings)
        self._tokenizer = tokenizer

    def embed_tokens(self, input_ids: Tensor) -> Tensor:
        """Embed token ids: (N, L) -> (N, L, E)."""
        return self.model.get_input_embeddings()(input_ids)

    def hidden_states(self, embeddings: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute the hidden states of the last layer.

        Args:
            embeddings: (N, L, E) embeddings.
            attention_mask: (N, L) 1 for tokens, 0 for padding.

        Returns:
            Hidden states (N, L, E).

        Raises:
            ValueError: The sequences are longer than `max_positions`.
        """
        check_num_positions(embeddings.shape[1], self.max_positions)
        return self.structure.compute_hidden_states(self.model, embeddings.to(self.model.dtype), attention_mask)

    def lm_head(self, hidden_states: Tensor) -> Tensor:
        """Return the logits of hidden states: (..., E) -> (..., V)."""
        return self.structure.compute_logits(self.model, hidden_states)

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
        """Generate captions by greedy search, beam search or sampling.

        Args:
            prefix: (N, K, E) prefixes.
            max_new_tokens: Maximum number of tokens per caption, also limited by the positions of the model.
            num_beams: Beams of beam search; 1 for greedy search or sampling.
            num_captions: Captions per region, best first.
            do_sample: Sample tokens.
            temperature: Sampling temperature.
            top_p: Cumulative probability of nucleus sampling.

        Returns:
            Token ids and scores of N x `num_captions` captions, best first.

        Raises:
            ValueError: `num_captions` is less than 1, or exceeds `num_beams` without sampling.
        """
        if num_captions < 1:
            raise ValueError(f"num_captions is {num_captions}; expected an integer of at least 1")
        if num_captions > 1 and not do_sample and num_captions > num_beams:
            raise ValueError(
                f"num_captions={num_captions} requires num_beams >= {num_captions} (it is {num_beams}) or "
                "do_sample=true"
            )
        pad_token_id, eos_token_ids = self._resolve_special_tokens()
        max_length = self.max_positions or prefix.shape[1] + max_new_tokens
        max_steps = min(max_new_tokens, max_length - prefix.shape[1])
        if num_beams == num_captions == 1 and not do_sample and len(prefix) and max_steps > 0 and self.has_greedy_loop:
            sequences, scores = generate_greedy(
                partial(self.structure.compute_cached_states, self.model),
                self.embed_tokens,
                self.lm_head,
                make_buffered_cache(self.model.config, prefix.shape[1] + max_steps),
                prefix.to(self.model.dtype),
                max_steps,
                pad_token_id,
                eos_token_ids,
            )
            return GenerationOutput(sequences[:, None], scores[:, None])
        sampling_options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": 0} if do_sample else {}
        with silence_transformers():
            output: Any = cast("GenerativePreTrainedModel", self.model).generate(
                inputs_embeds=prefix.to(self.model.dtype),
                attention_mask=prefix.new_ones(prefix.shape[:2], dtype=torch.long),
                max_new_tokens=max_steps,
                num_beams=num_beams,
                do_sample=do_sample,
                num_return_sequences=num_captions,
                pad_token_id=pad_token_id,
                eos_token_id=eos_token_ids or None,
                return_dict_in_generate=True,
                output_logits=True,
                **sampling_options,
            )
        sequences, scores = extract_new_tokens(output, eos_token_ids, pad_token_id)
        sequences, scores = (each.unflatten(0, (len(prefix), num_captions)) for each in (sequences, scores))
        if do_sample:  # beams are sorted by score, samples are not
            order = scores.argsort(dim=1, descending=True, stable=True)
            sequences, scores = sequences.gather(1, order[..., None].expand_as(sequences)), scores.gather(1, order)
        return GenerationOutput(sequences, scores)

    @property
    def has_greedy_loop(self) -> bool:
        """Whether `generate_greedy` returns the same captions as the model's own `generate`, with less work."""
        return self.structure.has_greedy_loop and has_plain_greedy_settings(self.model)

    def add_lora(
        self, rank: int, alpha: float, dropout: float = 0.0, target_modules: Sequence[str] | None = None
    ) -> None:
        """Add LoRA adapters; the arguments are those of `sca.language_models.lora.add_lora`."""
        from sca.language_models.lora import add_lora

        add_lora(self.model, self.model.config.model_type, rank, alpha, dropout, target_modules)

    @property
    def pad_token_id(self) -> int:
        """Id that fills sequences after EOS."""
        return self._resolve_special_tokens()[0]

    @property
    def eos_token_ids(self) -> list[int]:
        """Ids that end a caption: EOS of the tokenizer, and those of the generation config.

        With a tokenizer, the latter have to be special tokens, because they can belong to another vocabulary.
        """
        config_ids: Any = self.model.generation_config.eos_token_id
        config_ids = [] if config_ids is None else [config_ids] if isinstance(config_ids, int) else list(config_ids)
        if self.tokenizer is None:
            return config_ids
        special_ids = getattr(self.tokenizer, "special_token_ids", ())
        eos_token_id = self.tokenizer.eos_token_id
        return [eos_token_id, *(each for each in config_ids if each in special_ids and each != eos_token_id)]

    def _resolve_special_tokens(self) -> tuple[int, list[int]]:
        """Return the padding id and the EOS ids."""
        eos_token_ids = self.eos_token_ids
        pad_token_id = self.tokenizer.pad_token_id if self.tokenizer else self.model.generation_config.pad_token_id
        return (eos_token_ids or [0])[0] if pad_token_id is None else pad_token_id, eos_token_ids


def extract_new_tokens(output: Any, eos_token_ids: Sequence[int], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Extract the new tokens and their scores from an output of transformers' `generate`.

    Args:
        output: Output of `generate` with `output_logits=True`.
        eos_token_ids: EOS ids.
        pad_token_id: Id that fills sequences after EOS.

    Returns:
        Token ids (N, T), and the mean log-probability (N,) of the tokens up to and including EOS. It is computed from
        the logits before temperature, top-p and penalties.
    """
    beam_indices = getattr(output, "beam_indices", None)
    steps = len(output.logits) if beam_indices is None else int((beam_indices >= 0).sum(1).max())
    ids = output.sequences[:, output.sequences.shape[1] - steps :]
    is_end = torch.isin(ids, torch.tensor(eos_token_ids, dtype=ids.dtype, device=ids.device)).int()
    ends_before = is_end.cumsum(1) - is_end  # number of earlier EOS tokens
    log_likelihood = torch.zeros(len(ids), device=ids.device)
    for step, logits in enumerate(output.logits[:steps]):
        rows = slice(None) if beam_indices is None else beam_indices[:, step].clamp(min=0)
        token_log_probs = logits[rows].float().log_softmax(1).gather(1, ids[:, step : step + 1])[:, 0]
        log_likelihood += token_log_probs.masked_fill(ends_before[:, step] > 0, 0.0)
    return ids.masked_fill(ends_before > 0, pad_token_id), log_likelihood / (ends_before == 0).sum(1)


class TextTokenizer:
    """Adapter from a transformers tokenizer to the `Tokenizer` contract: ids end with EOS and have no BOS.

    The tokenizer needs neither a padding token (EOS replaces it) nor an unknown token.

    Args:
        tokenizer: Tokenizer of transformers.
        eos_token: EOS token; None for the tokenizer's own.

    Attributes:
        eos_token_id: Id of the EOS token.
        pad_token_id: Id of the padding token.

    Raises:
        ValueError: The tokenizer has no EOS token, or `eos_token` is not in its vocabulary.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_token: str | None = None):
        if eos_token is not None:
            if eos_token not in tokenizer.get_vocab():
                raise ValueError(f"eos_token {eos_token!r} is not in the vocabulary of the tokenizer")
            tokenizer.eos_token = eos_token
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token; choose one of its tokens with eos_token=TOKEN")
        self.tokenizer = tokenizer
        self.eos_token_id: int = tokenizer.eos_token_id
        self.pad_token_id: int = self.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.special_token_ids: frozenset[int] = frozenset(tokenizer.all_special_ids)

    @property
    def vocab_size(self) -> int:
        """Largest token id plus one."""
        return max(self.tokenizer.get_vocab().values(), default=-1) + 1

    @property
    def special_tokens(self) -> list[str]:
        """Texts of the special tokens, those of the chat template included."""
        return [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """Return at most `max_length` token ids, EOS included."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids[: None if max_length is None else max_length - 1], self.eos_token_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text up to EOS, without special tokens."""
        ids = list(ids)
        if self.eos_token_id in ids:
            ids = ids[: ids.index(self.eos_token_id)]
        return cast("str", self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def format_question(self, question: str) -> tuple[str, str]:
        """Format a question about the visual prefix, with the chat template of the tokenizer if it has one.

        Args:
            question: Question of the user.

        Returns:
            The texts before and after the visual prefix. The answer follows the latter.

        Raises:
            ValueError: The chat template fails, or omits the question.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            return "", question
        messages = [{"role": "user", "content": PREFIX_MARK + question}]
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates are programs, and can raise anything
            raise ValueError(
                f"the chat template of the tokenizer fails with {type(error).__name__}: {error}; use another tokenizer"
            ) from error
        before, mark, after = cast("str", text).partition(PREFIX_MARK)
        if not mark or question not in after:
            raise ValueError(
                "the chat template of the tokenizer does not contain the text of the user; use another tokenizer"
            )
        return before, after

    def save(self, folder: str) -> None:
        """Save the tokenizer in transformers' format."""
        self.tokenizer.save_pretrained(folder)
