"""Add words to the tokenizer of `tiny-gpt2`: `python tools/tiny_tokenizer.py`

Each word of the generated questions, of their answers and of the requests for a length becomes one token. The ids of
existing tokens do not change.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

import sca.language_models
from sca.data.scene_questions import NONE_ANSWER, NUMBERS, WORDINGS
from sca.language_models.questions import LENGTH_REQUESTS

TOKENIZER = Path(sca.language_models.__file__).with_name("tiny_tokenizer.json")
PLACEHOLDER = re.compile(r"\{\w+\}|<region \d+>")


def list_words() -> list[str]:
    """Return the words of questions, answers and requests, sorted."""
    texts = [*(text for wordings in WORDINGS.values() for text in wordings), *LENGTH_REQUESTS.values()]
    texts += [NONE_ANSWER, *NUMBERS, "yes no"]
    return sorted({word for text in texts for word in re.findall(r"[a-z]+", PLACEHOLDER.sub(" ", text))})


def add_word(tokenizer: dict[str, Any], word: str) -> bool:
    """Add the merges that turn a word into one token.

    Args:
        tokenizer: Content of a tokenizer file, which is changed.
        word: Lowercase word.

    Returns:
        Whether the word was not a single token before.
    """
    tokens = Tokenizer.from_str(json.dumps(tokenizer)).encode(word).tokens
    vocabulary, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    merged = tokens[0]
    for token in tokens[1:]:
        merges.append([merged, token])
        merged += token
        vocabulary.setdefault(merged, len(vocabulary))
    return len(tokens) > 1


def main() -> None:
    """Write the tokenizer file."""
    tokenizer = json.loads(TOKENIZER.read_text())
    while any(add_word(tokenizer, word) for word in list_words()):  # a merge of one word can split another one
        pass
    TOKENIZER.write_text(json.dumps(tokenizer, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
