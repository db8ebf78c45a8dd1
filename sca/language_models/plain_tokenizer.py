"""Tokenizers that need the `tokenizers` package only, not transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from sca.io.json import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
PLAIN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")  # of transformers, without rules of an architecture
SPECIAL_TOKEN_KEYS = frozenset({"eos_token", "pad_token"})
IGNORED_KEYS = frozenset({"backend", "is_local", "local_files_only", "model_max_length", "tokenizer_class"})


class PlainTokenizer:
    """Adapter from the `tokenizers` package to the `Tokenizer` contract: ids end with EOS and have no BOS.

    Args:
        tokenizer: Tokenizer.
        eos_token: EOS token.
        pad_token: Padding token; None for EOS.

    Attributes:
        eos_token_id: Id of the EOS token.
        pad_token_id: Id of the padding token.

    Raises:
        ValueError: A special token is not in the vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer, eos_token: str, pad_token: str | None = None):
        self.tokenizer = tokenizer
        self.eos_token = eos_token
        self.pad_token: str = eos_token if pad_token is None else pad_token
        self.eos_token_id: int = self._find_token_id(self.eos_token)
        self.pad_token_id: int = self._find_token_id(self.pad_token)
        self.special_token_ids: frozenset[int] = frozenset({self.eos_token_id, self.pad_token_id})

    def _find_token_id(self, token: str) -> int:
        token_id = self.tokenizer.token_to_id(token)
        if token_id is None:
            raise ValueError(f"the special token {token!r} is not in the vocabulary of the tokenizer; add it")
        return token_id

    @property
    def vocab_size(self) -> int:
        """Largest token id plus one."""
        return max(self.tokenizer.get_vocab().values(), default=-1) + 1

    @property
    def special_tokens(self) -> list[str]:
        """Texts of the special tokens."""
        return [token.content for token in self.tokenizer.get_added_tokens_decoder().values() if token.special]

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """Return at most `max_length` token ids, EOS included."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [*ids[: None if max_length is None else max_length - 1], self.eos_token_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text up to EOS, without special tokens."""
        ids = list(ids)
        if self.eos_token_id in ids:
            ids = ids[: ids.index(self.eos_token_id)]
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def to_transformers(self) -> PreTrainedTokenizerFast:
        """Return the same tokenizer as one of transformers."""
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(
            tokenizer_object=self.tokenizer, eos_token=self.eos_token, pad_token=self.pad_token
        )

    def save(self, folder: str) -> None:
        """Save the tokenizer in transformers' format."""
        self.to_transformers().save_pretrained(folder)


def read_plain_tokenizer(folder: Path) -> PlainTokenizer | None:
    """Read a tokenizer in transformers' format without transformers.

    Args:
        folder: Folder of the tokenizer.

    Returns:
        The tokenizer; None if its files are damaged, or have settings that only transformers implements.
    """
    try:
        if {path.name for path in folder.iterdir()} != {TOKENIZER_FILE, CONFIG_FILE}:
            return None
        config = read_json(folder / CONFIG_FILE)
        special_tokens = {key: config[key] for key in SPECIAL_TOKEN_KEYS & config.keys()}
        is_plain = config["tokenizer_class"] in PLAIN_CLASSES and config.keys() <= SPECIAL_TOKEN_KEYS | IGNORED_KEYS
        return PlainTokenizer(Tokenizer.from_file(str(folder / TOKENIZER_FILE)), **special_tokens) if is_plain else None
    except Exception:  # `tokenizers` raises no narrower one; transformers then reports the error
        return None
