"""METEOR 1.5: alignment of words by exact form, stem, synonym and paraphrase (WMT 2014)."""

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

from sca.evaluation.records import Record, collect_region_ids
from sca.evaluation.tokenization import (
    CAPTION_NEEDS,
    build_java_command,
    find_java_problem,
    get_jar_path,
    tokenize_pairs,
)

ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75  # parameters of METEOR 1.5 for English
STAGE_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])  # exact, stem, synonym, paraphrase
NUM_STATISTICS = 23  # per caption: lengths, matches per stage, chunks, matched words


class Meteor:
    """Corpus-level METEOR in [0, 1], which is not the mean over captions. Requires Java.

    Args:
        references: "all" or only the "first" reference per region.
        tokenizer: One of `sca.evaluation.tokenization.TOKENIZERS`. Defaults to the best available.

    Raises:
        ValueError: Java or pycocoevalcap is missing.
    """

    required_fields = CAPTION_NEEDS

    def __init__(self, references: str = "all", tokenizer: str | None = None):
        reason = find_java_problem()
        if reason:
            raise ValueError(reason)
        self.references = references
        self.tokenizer = tokenizer

    @property
    def implementation(self) -> str:
        """Version of the implementation."""
        return f"METEOR 1.5 of pycocoevalcap {version('pycocoevalcap')}"

    def __call__(self, records: Sequence[Record]) -> MetricOutput:
        scored_records, captions, references = tokenize_pairs(records, "meteor", self.references, self.tokenizer)
        statistics = align_captions(captions, references)
        summable = make_summable(statistics)
        per_record = {"meteor": compute_meteor(statistics)} | collect_region_ids(scored_records)
        return MetricOutput(
            {"meteor": float(compute_meteor(summable.sum(0)))}, per_record, {"meteor": (summable, compute_meteor)}
        )


def align_captions(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Return the METEOR statistics of each caption with its best-matching reference.

    Args:
        captions: R captions as tokens separated by single spaces.
        references: References of each caption in the same form.

    Returns:
        (R, 23) statistics from the METEOR program.

    Raises:
        ValueError: Java is missing, or the program fails.
    """
    lines = [
        " ||| ".join(("SCORE", *map(_remove_separators, each), _remove_separators(caption)))
        for caption, each in zip(captions, references, strict=True)
    ]
    statistics = [output.split() for output in METEOR_PROGRAM.score_lines(lines)]
    return np.array(statistics, dtype=float).reshape(-1, NUM_STATISTICS)


class MeteorProgram:
    """The METEOR program. It takes seconds to start, so the first call starts it and later calls reuse it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._last_error = b""

    def score_lines(self, lines: Sequence[str]) -> list[str]:
        """Return the output of the program for each input line.

        Args:
            lines: Input lines.

        Returns:
            Output lines, one per input line.

        Raises:
            ValueError: Java is missing, or the program fails.
        """
        content = "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._stop()
                self._start()
            try:
                outputs = self._exchange_lines(content, len(lines))
                num_complete = sum(len(output.split()) == NUM_STATISTICS for output in outputs)
                if num_complete < len(lines):
                    self._stop()
                    reason = self._last_error.decode("utf-8", "replace") or "no error output"
                    raise ValueError(f"METEOR returned {num_complete} results for {len(lines)} captions: {reason}")
            except BaseException:  # also on Ctrl-C: a later call would read stale results from the pipes
                self._stop()
                raise
        return outputs

    def detach_after_fork(self) -> None:
        """Leave the program to the parent process, since a forked process would share its pipes."""
        self._lock = threading.Lock()
        self._process = None
        self._last_error = b""

    def _exchange_lines(self, content: bytes, count: int) -> list[str]:
        assert self._process
        assert self._process.stdin
        assert self._process.stdout
        writer = threading.Thread(target=_write_input, args=(self._process.stdin, content), daemon=True)
        writer.start()
        outputs = [self._process.stdout.readline().decode("utf-8") for _ in range(count)]
        writer.join()
        return outputs

    def _start(self) -> None:
        command = build_java_command(
            "-jar", str(get_jar_path("meteor", "meteor-1.5.jar")), "-", "-", "-stdio", "-l", "en", "-norm"
        )
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # shields it from Ctrl-C
        )
        self._last_error = b""
        self._error_reader = threading.Thread(target=self._read_errors, args=(self._process.stderr,), daemon=True)
        self._error_reader.start()
        atexit.register(self._stop)

    def _read_errors(self, errors: IO[bytes]) -> None:
        for line in errors:
            self._last_error = line.strip() or self._last_error

    def _stop(self) -> None:
        atexit.unregister(self._stop)
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._error_reader.join()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
        self._process = None


METEOR_PROGRAM = MeteorProgram()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=METEOR_PROGRAM.detach_after_fork)


def compute_meteor(statistics: np.ndarray) -> np.ndarray:
    """Compute METEOR from the (..., 23) statistics of captions, or of their sum by `make_summable`; returns (...)."""
    length, reference_length, function_words, reference_function_words = (statistics[..., index] for index in range(4))
    # (..., stage, content and function words alternating)
    stage_matches = statistics[..., 4:20].reshape(*statistics.shape[:-1], 4, 4)
    chunks, matched, reference_matched = (statistics[..., index] for index in range(20, 23))
    with np.errstate(invalid="ignore", divide="ignore"):
        weight = np.array([DELTA, 1 - DELTA])
        precision = (stage_matches[..., [0, 2]] @ weight @ STAGE_WEIGHTS) / (
            DELTA * (length - function_words) + (1 - DELTA) * function_words
        )
        recall = (stage_matches[..., [1, 3]] @ weight @ STAGE_WEIGHTS) / (
            DELTA * (reference_length - reference_function_words) + (1 - DELTA) * reference_function_words
        )
        mean = 1 / ((1 - ALPHA) / precision + ALPHA / recall)
        fragmentation = np.where(_is_perfect(statistics), 0.0, chunks / ((matched + reference_matched) / 2))
        return np.nan_to_num(mean * (1 - GAMMA * fragmentation**BETA))


def make_summable(statistics: np.ndarray) -> np.ndarray:
    """Return statistics that can be summed over captions: a caption identical to its reference adds no chunk."""
    summable = statistics.copy()
    summable[_is_perfect(statistics), 20] = 0
    return summable


def _is_perfect(statistics: np.ndarray) -> np.ndarray:
    chunks, matched, reference_matched = (statistics[..., index] for index in range(20, 23))
    return (chunks == 1) & (matched == statistics[..., 0]) & (reference_matched == statistics[..., 1])


def _remove_separators(text: str) -> str:
    """Remove the field separator of METEOR's protocol."""
    return " ".join(text.replace("|||", " ").split())


def _write_input(stream: IO[bytes], content: bytes) -> None:
    try:
        stream.write(content)
        stream.flush()
    except BrokenPipeError:  # the program has ended; its error output is read elsewhere
        pass
