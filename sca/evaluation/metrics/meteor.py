"""Alignment of words by form, stem, synonym and paraphrase (METEOR 1.5, WMT 2014)."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterable, Sequence
from importlib.metadata import version

import numpy as np
from sca_registry.contracts import Scores

from sca.evaluation.records import Record, places
from sca.evaluation.texts import NEEDS, jar, java, lacks_java, pairs

ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75  # of METEOR 1.5 for English
STAGES = np.array([1.0, 0.6, 0.8, 0.6])  # exact, stem, synonym, paraphrase
FIGURES = 23  # of one caption: lengths, matches of each stage, chunks, matched words


class Meteor:
    """METEOR of all captions together, which is not the mean of single ones. In 0..1. Needs Java."""

    needs = NEEDS

    def __init__(self, references: str = "all", tokenizer: str | None = None):
        reason = lacks_java()
        if reason:
            raise ValueError(reason)
        self.references, self.tokenizer = references, tokenizer

    @property
    def implementation(self) -> str:
        return f"METEOR 1.5 of pycocoevalcap {version('pycocoevalcap')}"

    def __call__(self, records: Sequence[Record]) -> Scores:
        about, captions, references = pairs(records, "meteor", self.references, self.tokenizer)
        figures = alignments(captions, references)
        summed = addable(figures)
        each = {"meteor": meteor(figures)} | places(about)
        return Scores({"meteor": float(meteor(summed.sum(0)))}, each, {"meteor": (summed, meteor)})


def alignments(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """(R, 23) figures of each caption with the reference that suits it best, from METEOR's own program.

    captions, references: words one space apart. ValueError where Java is absent or fails.
    """
    lines = [
        " ||| ".join(("SCORE", *map(_plain, each), _plain(caption)))
        for caption, each in zip(captions, references, strict=True)
    ]
    command = java("-jar", str(jar("meteor", "meteor-1.5.jar")), "-", "-", "-stdio", "-l", "en", "-norm")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as program:
        writer = threading.Thread(target=_write, args=(program.stdin, lines), daemon=True)
        listener = threading.Thread(target=lambda: said.append(program.stderr.read()), daemon=True)
        said: list[bytes] = []
        writer.start()
        listener.start()
        told = program.stdout.read().decode("utf-8").splitlines()
        writer.join()
        listener.join()
    figures = [line.split() for line in told if line]
    if len(figures) != len(lines) or any(len(each) != FIGURES for each in figures):
        last = b"".join(said).decode("utf-8", "replace").strip().splitlines()[-1:] or ["it said nothing"]
        raise ValueError(f"METEOR gave {len(figures)} answers for {len(lines)} captions: {last[0]}")
    return np.array(figures, dtype=float).reshape(-1, FIGURES)


def meteor(figures: np.ndarray) -> np.ndarray:
    """(..., 23) figures, of one caption or summed over several by `addable`, -> (...) scores."""
    length, other, function, other_function = (figures[..., place] for place in range(4))
    stages = figures[..., 4:20].reshape(*figures.shape[:-1], 4, 4)  # (..., stage, content and function words by turns)
    chunks, matched, other_matched = (figures[..., place] for place in range(20, 23))
    with np.errstate(invalid="ignore", divide="ignore"):
        weight = np.array([DELTA, 1 - DELTA])
        found = (stages[..., [0, 2]] @ weight @ STAGES) / (DELTA * (length - function) + (1 - DELTA) * function)
        kept = (stages[..., [1, 3]] @ weight @ STAGES) / (
            DELTA * (other - other_function) + (1 - DELTA) * other_function
        )
        mean = 1 / ((1 - ALPHA) / found + ALPHA / kept)
        broken = np.where(_perfect(figures), 0.0, chunks / ((matched + other_matched) / 2))
        return np.nan_to_num(mean * (1 - GAMMA * broken**BETA))


def addable(figures: np.ndarray) -> np.ndarray:
    """What captions add to the figures of all: one that is its reference word by word adds no chunk."""
    added = figures.copy()
    added[_perfect(figures), 20] = 0
    return added


def _perfect(figures: np.ndarray) -> np.ndarray:
    chunks, matched, other_matched = (figures[..., place] for place in range(20, 23))
    return (chunks == 1) & (matched == figures[..., 0]) & (other_matched == figures[..., 1])


def _plain(text: str) -> str:
    """Without what separates texts in METEOR's protocol."""
    return " ".join(text.replace("|||", " ").split())


def _write(stream, lines: Iterable[str]) -> None:
    try:
        with stream:
            stream.writelines(f"{line}\n".encode() for line in lines)
    except BrokenPipeError:  # the program has ended; what it said is read elsewhere
        pass
