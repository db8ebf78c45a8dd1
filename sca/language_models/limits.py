"""Checks of what a language model supports: positions and tokens."""

from __future__ import annotations


def check_num_positions(num_positions: int, max_positions: int | None) -> None:
    """Raise ValueError if a prefix and its text are longer than the language model supports.

    Args:
        num_positions: Positions of the prefix and the text.
        max_positions: Positions of the language model; None for any number.
    """
    if max_positions is not None and num_positions > max_positions:
        raise ValueError(
            f"the prefix and the text have {num_positions:,} positions, but the language model supports at most "
            f"{max_positions:,}; use fewer queries or shorter texts (train.max_tokens)"
        )


def check_num_tokens(num_tokens: int, num_embeddings: int) -> None:
    """Raise ValueError if a tokenizer has more tokens than the language model has embeddings.

    Args:
        num_tokens: Tokens of the tokenizer.
        num_embeddings: Embeddings of the language model.
    """
    if num_tokens > num_embeddings:
        raise ValueError(
            f"the tokenizer has {num_tokens:,} tokens, but the language model has {num_embeddings:,} embeddings; use "
            "the tokenizer of these weights, or resize the embeddings with transformers' resize_token_embeddings"
        )
