"""Alignment of words by form, stem, synonym and paraphrase (METEOR 1.5, WMT 2014)."""

from __future__ import annotations

import atexit
import os
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import IO

import numpy as np
from sca_registry.contracts import MetricOutput

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

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        about, captions, references = pairs(records, "meteor", self.references, self.tokenizer)
        figures = alignments(captions, references)
        summed = addable(figures)
        each = {"meteor": meteor(figures)} | places(about)
        return MetricOutput({"meteor": float(meteor(summed.sum(0)))}, each, {"meteor": (summed, meteor)})


def alignments(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """(R, 23) figures of each caption with the reference that suits it best, from METEOR's own program.

    captions, references: words one space apart. ValueError where Java is absent or fails.
    """
    lines = [
        " ||| ".join(("SCORE", *map(_plain, each), _plain(caption)))
        for caption, each in zip(captions, references, strict=True)
    ]
    figures = [output.split() for output in PROGRAM.score_lines(lines)]
    return np.array(figures, dtype=float).reshape(-1, FIGURES)


class Program:
    """METEOR's own program, which takes seconds to start: started by the first call and kept for later ones."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._last_error = b""

    def score_lines(self, lines: Sequence[str]) -> list[str]:
        """Return the program's output for each input line.

        Raises:
            ValueError: Java is absent, or the program fails.
        """
        content = "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._end()
                self._start()
            try:
                outputs = self._exchange(content, len(lines))
                complete = sum(len(output.split()) == FIGURES for output in outputs)
                if complete < len(lines):
                    self._end()
                    reason = self._last_error.decode("utf-8", "replace") or "it printed no reason"
                    raise ValueError(f"METEOR returned {complete} results for {len(lines)} captions: {reason}")
            except BaseException:  # also Ctrl-C: a later call would read the results that remain in the pipes
                self._end()
                raise
        return outputs

    def detach_after_fork(self) -> None:
        """Leave the program to the parent process, with which a forked one would share its pipes."""
        self.__init__()

    def _exchange(self, content: bytes, count: int) -> list[str]:
        assert self._process
        assert self._process.stdin
        assert self._process.stdout
        writer = threading.Thread(target=_write, args=(self._process.stdin, content), daemon=True)
        writer.start()
        outputs = [self._process.stdout.readline().decode("utf-8") for _ in range(count)]
        writer.join()
        return outputs

    def _start(self) -> None:
        command = java("-jar", str(jar("meteor", "meteor-1.5.jar")), "-", "-", "-stdio", "-l", "en", "-norm")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self._process = subprocess.Popen(command, **pipes, start_new_session=True)  # Ctrl-C is not meant for it
        self._last_error = b""
        self._listener = threading.Thread(target=self._listen, args=(self._process.stderr,), daemon=True)
        self._listener.start()
        atexit.register(self._end)

    def _listen(self, errors: IO[bytes]) -> None:
        for line in errors:
            self._last_error = line.strip() or self._last_error

    def _end(self) -> None:
        atexit.unregister(self._end)
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._listener.join()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            with suppress(BrokenPipeError):
                stream.close()
        self._process = None


PROGRAM = Program()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=PROGRAM.detach_after_fork)


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
