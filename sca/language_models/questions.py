"""Questions about regions as token ids, with references to regions such as `<region 1>`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from sca_registry.contracts import REGION_PATTERN, Tokenizer, list_region_references
from sca_registry.spec import IMAGE_MARK, PROMPT_MARK

LENGTH_REQUESTS = {  # texts that follow the prefix, by length of the caption
    "short": "describe it in one to three words.",
    "phrase": "describe it in one phrase.",
    "full": "describe it in full.",
}
REFERENCE_LIKE_PATTERN = re.compile(r"<\s*regions?(?![a-z])[^<>]*>", re.IGNORECASE)
MAX_SHORT_WORDS, MAX_PHRASE_WORDS = 3, 8


class EncodedQuestion(NamedTuple):
    """Token ids of a question. The id -n refers to region n, counted from 1.

    Attributes:
        before: Ids before the visual prefix: the start of the user's turn in a chat template.
        after: Ids after the visual prefix. The answer follows.
    """

    before: list[int]
    after: list[int]

    @property
    def regions(self) -> list[int]:
        """Numbers of the regions that the question refers to, in order, without duplicates."""
        return [*dict.fromkeys(-token for token in self.after if token < 0)]


def classify_length(text: str) -> str:
    """Return the length of a caption, a key of `LENGTH_REQUESTS`: up to 3 words, 4 to 8 words, or more.

    Args:
        text: Caption.

    Returns:
        "short", "phrase" or "full".
    """
    num_words = len(text.split())
    return "short" if num_words <= MAX_SHORT_WORDS else "phrase" if num_words <= MAX_PHRASE_WORDS else "full"


def check_question_text(tokenizer: Tokenizer, question: str) -> None:
    """Check the text of a user's question.

    Args:
        tokenizer: Tokenizer of the language model; `special_tokens` are the texts of its special tokens.
        question: Text.

    Raises:
        ValueError: It contains a malformed reference to a region, or a special token, which would end the question.
    """
    for reference in REFERENCE_LIKE_PATTERN.findall(question):
        if not REGION_PATTERN.fullmatch(reference):
            raise ValueError(
                f"the question contains {reference!r:.40}; refer to regions as <region 1>, <region 2>, ..."
            )
    for token in getattr(tokenizer, "special_tokens", ()):
        if token in question:
            raise ValueError(f"the question contains the special token {token!r} of the language model; remove it")


def encode_question(tokenizer: Tokenizer, question: str, template: str | None = None) -> EncodedQuestion:
    """Convert a question, or the prompt of a task, to token ids.

    Args:
        tokenizer: Tokenizer of the language model. A method `format_question(question)` returns the texts before and
            after the visual prefix.
        question: Text; every "<region n>" is replaced by the embeddings of that region.
        template: Text around the visual prefix and the question, see `ModelSpec.prompt_template`; None for the chat
            template of the tokenizer, if it has one.

    Returns:
        Token ids.

    Raises:
        ValueError: The question is empty, or a region number is 0.
    """
    if not question.strip():
        raise ValueError("the question is empty; pass a text such as 'what color is it?'")
    if 0 in list_region_references(question):
        raise ValueError("the question refers to <region 0>; regions are counted from 1")
    question = " ".join(question.split())
    format_question = getattr(tokenizer, "format_question", None)
    if template is not None:
        before, _, after = template.partition(IMAGE_MARK)
        after = after.replace(PROMPT_MARK, question)
    else:
        before, after = ("", question) if format_question is None else format_question(question)
    *leading, last_text = REGION_PATTERN.split(after)  # texts alternate with numbers
    pieces = [
        [-int(piece)] if index % 2 else _encode_text(tokenizer, piece.rstrip()) for index, piece in enumerate(leading)
    ]
    pieces.append(_encode_text(tokenizer, last_text))
    return EncodedQuestion(_encode_text(tokenizer, before), [token for piece in pieces for token in piece])


def expand_references(ids: Sequence[int], positions_per_region: int) -> tuple[list[int], list[tuple[int, int] | None]]:
    """Replace each reference to a region by as many positions as its embeddings have.

    Args:
        ids: Token ids; -n refers to region n.
        positions_per_region: Embeddings per region.

    Returns:
        Token ids, 0 at the positions of regions; and for each position the number of the region and the index of its
        embedding, or None for a token.
    """
    expanded: list[int] = []
    slots: list[tuple[int, int] | None] = []
    for token in ids:
        if token >= 0:
            expanded.append(token)
            slots.append(None)
        else:
            expanded += [0] * positions_per_region
            slots += [(-token, index) for index in range(positions_per_region)]
    return expanded, slots


def _encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text)[:-1] if text.strip() else []  # without EOS
