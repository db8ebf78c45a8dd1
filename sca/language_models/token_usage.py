"""Token counts of generated captions."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sca_registry.contracts import LanguageModel, TokenUsage


def get_eos_token_ids(language_model: LanguageModel) -> list[int]:
    """Return the ids that end a caption: `eos_token_ids` of a language model, else EOS of its tokenizer."""
    if (eos_token_ids := getattr(language_model, "eos_token_ids", None)) is not None:
        return list(eos_token_ids)
    return [] if language_model.tokenizer is None else [language_model.tokenizer.eos_token_id]


def count_tokens(prompt_tokens: int, rows: Sequence[Sequence[int]], eos_token_ids: Collection[int]) -> TokenUsage:
    """Count the tokens of one region's captions.

    Args:
        prompt_tokens: Positions of the prefix or tokens of the prompt.
        rows: Token ids of each caption, best first.
        eos_token_ids: EOS ids; ids after the first EOS are padding.

    Returns:
        The counts of prompt and completion tokens.
    """
    end_indices = [next((index for index, token in enumerate(row) if token in eos_token_ids), None) for row in rows]
    lengths = [len(row) if end is None else end + 1 for row, end in zip(rows, end_indices, strict=True)]
    return TokenUsage(prompt_tokens, tuple(lengths), tuple(end is None for end in end_indices))
