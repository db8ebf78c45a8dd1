"""Pair captions with their references and tokenize both for caption metrics.

The tokenizer is part of the protocol: it changes the scores of the same captions.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from sca.evaluation.records import Record, require_records

REFERENCE_CHOICES = ("all", "first")
TOKENIZERS = {
    "ptb": "Penn Treebank tokenizer of Stanford CoreNLP 3.4.1 without punctuation, as in pycocoevalcap; requires Java",
    "plain": "lower-case runs of letters, digits and apostrophes",
}
PUNCTUATION = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";")
)
CAPTION_NEEDS = ("task=caption", "caption", "truth.phrases")
WORD_PATTERN = re.compile(r"\w+(?:'\w+)*")


class TokenizedPairs(NamedTuple):
    """Captions and references of the same regions as tokens separated by single spaces."""

    records: list[Record]
    captions: list[str]
    references: list[list[str]]


def tokenize_pairs(
    records: Sequence[Record], metric: str, references: str = "all", tokenizer: str | None = None
) -> TokenizedPairs:
    """Collect and tokenize the captions and references that a metric scores.

    Args:
        records: Prediction records.
        metric: Name of the metric in the message.
        references: "all" phrases of a region, or only the "first", as in SCA (arXiv 2312.00869).
        tokenizer: One of `TOKENIZERS`. Defaults to `choose_default_tokenizer`.

    Returns:
        The tokenized captions and references, with their records.

    Raises:
        ValueError: No record has a caption and references, or an unknown option.
    """
    if references not in REFERENCE_CHOICES:
        raise ValueError(f"unknown references {references!r}; choose from {', '.join(REFERENCE_CHOICES)}")
    scored_records = require_records(records, CAPTION_NEEDS, metric)
    phrases = [record["truth"]["phrases"][: 1 if references == "first" else None] for record in scored_records]
    texts = [record["caption"] for record in scored_records] + [phrase for each in phrases for phrase in each]
    tokenized = tokenize_texts(tuple(texts), tokenizer or choose_default_tokenizer())
    tokenized_phrases = iter(tokenized[len(scored_records) :])
    return TokenizedPairs(
        scored_records,
        list(tokenized[: len(scored_records)]),
        [[next(tokenized_phrases) for _ in each] for each in phrases],
    )


def choose_default_tokenizer() -> str:
    """Return "ptb" if Java and pycocoevalcap are available, else "plain"."""
    return "plain" if find_java_problem() else "ptb"


@functools.lru_cache(maxsize=2)  # consecutive metrics score the same captions
def tokenize_texts(texts: tuple[str, ...], tokenizer: str) -> tuple[str, ...]:
    """Tokenize texts into tokens separated by single spaces.

    Args:
        texts: Texts without line breaks.
        tokenizer: One of `TOKENIZERS`.

    Returns:
        The tokenized texts, in the same order.

    Raises:
        ValueError: An unknown tokenizer, or "ptb" without Java.
    """
    if tokenizer not in TOKENIZERS:
        raise ValueError(f"unknown tokenizer {tokenizer!r}; choose from {', '.join(TOKENIZERS)}")
    single_line_texts = [" ".join(text.split()) for text in texts]
    if tokenizer == "plain":
        return tuple(" ".join(WORD_PATTERN.findall(text.lower())) for text in single_line_texts)
    unique_texts = list(dict.fromkeys(single_line_texts))
    tokenized = dict(zip(unique_texts, _tokenize_ptb(unique_texts), strict=True))
    return tuple(tokenized[text] for text in single_line_texts)


def find_java_problem() -> str | None:
    """Return why the Java tools of pycocoevalcap cannot run, or None if they can."""
    try:
        get_jar_path("tokenizer", "stanford-corenlp-3.4.1.jar")
    except ImportError as error:
        return str(error)
    if not shutil.which("java"):
        return "needs Java: install a JRE of version 8 or later (apt install default-jre-headless)"
    return None


def get_jar_path(folder: str, name: str) -> Path:
    """Return the path of a file in pycocoevalcap.

    Args:
        folder: Folder in pycocoevalcap.
        name: Name of the file.

    Returns:
        Path of the file.

    Raises:
        ImportError: pycocoevalcap is not installed; the message contains the install command.
    """
    try:
        import pycocoevalcap
    except ImportError:
        raise ImportError("needs pycocoevalcap: pip install 'segment-caption-anything[metrics]'") from None
    return Path(next(iter(pycocoevalcap.__path__))) / folder / name


def build_java_command(*arguments: str) -> list[str]:
    """Return the command of a Java program that reads and writes UTF-8 in any locale.

    Args:
        *arguments: Arguments of `java`.

    Returns:
        The command and its arguments.

    Raises:
        ValueError: The Java tools cannot run.
    """
    reason = find_java_problem()
    if reason:
        raise ValueError(reason)
    return ["java", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", "-Xmx2G", *arguments]


def _tokenize_ptb(texts: Sequence[str]) -> Iterable[str]:
    """Return the tokens of each text. Texts have no line breaks; all whitespace is single spaces."""
    command = build_java_command(
        "-cp", str(get_jar_path("tokenizer", "stanford-corenlp-3.4.1.jar")), "edu.stanford.nlp.process.PTBTokenizer"
    )
    handle, path = tempfile.mkstemp(suffix=".txt", prefix="sca-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{text}\n" for text in texts)
        options = ("-preserveLines", "-lowerCase", "-encoding", "UTF-8", path)
        result = subprocess.run([*command, *options], capture_output=True, check=False)
    finally:
        os.unlink(path)
    lines = result.stdout.decode("utf-8").split("\n")[:-1]
    if result.returncode or len(lines) != len(texts):
        error_lines = result.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["no error output"]
        raise ValueError(f"the tokenizer 'ptb' returned {len(lines)} lines for {len(texts)} texts: {error_lines[0]}")
    return (" ".join(word for word in line.split() if word not in PUNCTUATION) for line in lines)
