"""Phrases that a proposer finds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sca.io.hub import silence_transformers
from sca.io.validation import check_encodable


def parse_phrases(text: str | Sequence[str]) -> tuple[str, ...]:
    """Parse the option `text` of a proposer.

    Args:
        text: One phrase, or several.

    Returns:
        The phrases without surrounding whitespace.

    Raises:
        ValueError: There is no phrase, or a phrase is empty, not text or not valid Unicode.
    """
    phrases = [text] if isinstance(text, str) else list(text)
    if not phrases:
        raise ValueError("no text to find; pass --text PHRASE, or set text=['red car', 'dog']")
    for phrase in phrases:
        if not isinstance(phrase, str) or not phrase.strip():
            raise _make_phrase_error(phrase)
        check_encodable("text", phrase)
    return tuple(phrase.strip() for phrase in phrases)


def split_phrases(phrases: Sequence[str]) -> list[str]:
    """Split phrases into the parts that Grounding DINO finds: in lower case, separated by periods.

    Args:
        phrases: Phrases, such as "Red car" and "a cat. a dog".

    Returns:
        The parts, such as "red car", "a cat" and "a dog".

    Raises:
        ValueError: A phrase consists of periods.
    """
    parts = []
    for phrase in phrases:
        phrase_parts = [part for each in phrase.lower().split(".") if (part := each.strip())]
        if not phrase_parts:
            raise _make_phrase_error(phrase)
        parts += phrase_parts
    return parts


def join_phrases(phrases: Sequence[str]) -> str:
    """Join phrases to the text that Grounding DINO was trained with: lower case, and a period after each phrase.

    Args:
        phrases: Phrases.

    Returns:
        Text such as "red car. dog.".

    Raises:
        ValueError: A phrase consists of periods.
    """
    return " ".join(f"{part}." for part in split_phrases(phrases))


def check_num_tokens(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> None:
    """Check that texts are not too long for a model.

    Args:
        tokenizer: Tokenizer of transformers.
        texts: Texts.
        max_tokens: Maximum tokens per text, including special tokens.

    Raises:
        ValueError: A text is too long.
    """
    for text in texts:
        with silence_transformers():  # it warns of long texts
            num_tokens = len(tokenizer(text)["input_ids"])
        if num_tokens > max_tokens:
            raise ValueError(
                f"the text {text[:80]!r} has {num_tokens} tokens, and the model reads {max_tokens}; shorten it"
            )


def _make_phrase_error(phrase: Any) -> ValueError:
    return ValueError(f"text contains {phrase!r}, which is not a phrase; pass words, such as 'red car'")
