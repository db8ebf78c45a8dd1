"""Tokens of generated texts, counted."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sca_registry.contracts import TokenUsage


def count_tokens(prompt: int, rows: Sequence[Sequence[int]], ends: Collection[int]) -> TokenUsage:
    """Count the tokens of one region's captions.

    Args:
        prompt: Tokens or positions that the model reads before it writes.
        rows: Ids of each caption, the best first.
        ends: Ids that end a text; what follows the first of them fills up the row.
    """
    places = [next((place for place, token in enumerate(row) if token in ends), None) for row in rows]
    lengths = [len(row) if end is None else end + 1 for row, end in zip(rows, places, strict=True)]
    return TokenUsage(prompt, tuple(lengths), tuple(end is None for end in places))
