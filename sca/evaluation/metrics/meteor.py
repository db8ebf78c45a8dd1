"""Alignment of words by form, stem, synonym and paraphrase (METEOR 1.5, WMT 2014)."""

from __future__ import annotations

import atexit
import os
import subprocess
import threading
from collections.abc import Sequence
from importlib.metadata import version
from typing import IO

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
    figures = [answer.split() for answer in PROGRAM.ask(lines)]
    return np.array(figures, dtype=float).reshape(-1, FIGURES)


class Program:
    """METEOR's own program. It takes seconds to start, so it is started once and kept for later captions."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._last_error = b""

    def ask(self, lines: Sequence[str]) -> list[str]:
        """Return the program's answer to each line.

        Raises:
            ValueError: Java is absent, or the program fails.
        """
        asked = "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")
        with self._lock:
            if not self._is_running():
                self._start()
            assert self._process
            assert self._process.stdin
            assert self._process.stdout
            writer = threading.Thread(target=_write, args=(self._process.stdin, asked), daemon=True)
            writer.start()
            answers = [self._process.stdout.readline().decode("utf-8") for _ in lines]
            writer.join()
            answered = [len(answer.split()) == FIGURES for answer in answers]
            if not all(answered):
                self._end()
                said = self._last_error.decode("utf-8", "replace") or "it said nothing"
                raise ValueError(f"METEOR gave {sum(answered)} answers for {len(lines)} captions: {said}")
        return answers

    def _is_running(self) -> bool:
        ours = self._process is not None and self._owner == os.getpid()  # a forked process shares its parent's pipes
        return ours and self._process.poll() is None

    def _start(self) -> None:
        command = java("-jar", str(jar("meteor", "meteor-1.5.jar")), "-", "-", "-stdio", "-l", "en", "-norm")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, **pipes, start_new_session=True)  # Ctrl-C is for whoever asks
        self._process, self._owner, self._last_error = process, os.getpid(), b""
        self._listener = threading.Thread(target=self._listen, args=(process.stderr,), daemon=True)
        self._listener.start()
        atexit.register(self._end)

    def _listen(self, errors: IO[bytes]) -> None:
        for line in errors:
            self._last_error = line.strip() or self._last_error

    def _end(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
            self._listener.join()
        self._process = None
        atexit.unregister(self._end)


PROGRAM = Program()


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


def _write(stream: IO[bytes], content: bytes) -> None:
    try:
        stream.write(content)
        stream.flush()
    except BrokenPipeError:  # the program has ended; what it said is read elsewhere
        pass
