"""The tiny checkpoint that PAM's code wrote, and a tokenizer for it."""

import shutil
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

GOLDEN_FOLDER = Path(__file__).resolve().parent / "data" / "golden" / "pam-tiny"
VOCABULARY_SIZE = 97
SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>")
TOKENS = (
    *("system", "user", "assistant", "You", "are", "a", "helpful", "this", "subject", "label", "its", "definition"),
    *("concise", "caption", "detailed", "dog", "brown", "."),
)


def copy_pam_checkpoint(folder, with_tokenizer=False):
    """Copy the checkpoint without its recorded outputs."""
    shutil.copytree(GOLDEN_FOLDER, folder, ignore=shutil.ignore_patterns("golden.safetensors"))
    if with_tokenizer:
        save_pam_tokenizer(folder)
    return folder


def save_pam_tokenizer(folder, size=VOCABULARY_SIZE, special_tokens=SPECIAL_TOKENS):
    """Save a tokenizer of words, whose special tokens are the last of its tokens."""
    fillers = [f"w{index}" for index in range(size - len(TOKENS) - len(special_tokens))]
    vocabulary = {token: index for index, token in enumerate([*fillers, *TOKENS, *special_tokens])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="w2", additional_special_tokens=[*special_tokens]
    ).save_pretrained(folder)
