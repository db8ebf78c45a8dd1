"""Questions of clients, the events that answer them, and the tickets of those that wait."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from PIL import Image
from sca_registry.contracts import Caption, Prompt
from sca_registry.spec import EverythingOptions

from sca.inference.automatic import Searched
from sca.inference.engine import Mask


class SchedulerError(Exception):
    """A question that got no answer; the message says why."""


class BusyError(SchedulerError):
    """Too much waits already."""


class LateError(SchedulerError):
    """The time that a question had is over."""


class NoRoomError(SchedulerError):
    """The answer does not fit into memory."""


class CannotError(SchedulerError, ValueError):
    """The model is not of the kind that could answer."""


class ClosedError(SchedulerError):
    """The scheduler answers no more: it was closed, or its thread has died."""


@dataclass(frozen=True)
class Question:
    """What is asked of one picture: its `prompts` as `sca.io.prompts.check` gives them, or all that is found with
    `everything`.

    generation: settings as `Predictor.predict` takes them. masks: whether they are wanted of `prompts`, too.
    candidates: whether all masks that a prompt may mean are wanted besides. seconds: how long the answer may take.
    client: who asks; clients take turns. max_regions: Maximum regions of `everything`, best first.
    """

    image: Image.Image
    prompts: Sequence[Prompt] = ()
    everything: EverythingOptions | None = None
    task: str = "caption"
    generation: Mapping[str, Any] = field(default_factory=dict)
    masks: bool = True
    candidates: bool = False
    seconds: float = math.inf
    client: str = ""
    max_regions: int | None = None


class Found(NamedTuple):
    """So many regions are to be captioned."""

    regions: int


class Candidates(NamedTuple):
    """All masks that a region may have, the best first."""

    region: int
    masks: list[Mask]


class Done(NamedTuple):
    """All regions are answered."""

    regions: int


Event = Found | Searched | Caption | Candidates | Done | SchedulerError


class Ticket:
    """A question that waits or is being answered. `tell` is called in its thread: with `Found`, the captions
    as they are there, and at last `Done` or a `SchedulerError`; with `Searched` while everything is looked for.
    """

    def __init__(self, question: Question, tell: Callable[[Event], None]):
        self.question, self.tell = question, tell
        self.digest = _digest(question.image)
        self.prompts = list(question.prompts)
        self.masks: list[Mask] | None = None  # of what was found
        self.search = question.everything is not None
        self.steps: Generator[Searched, None, tuple[list[Mask], list[Prompt]]] | None = None  # of a search that runs
        self.looked_at: Searched | None = None
        self.turns = self.answered = 0
        self.deadline = time.monotonic() + question.seconds
        self.cancelled = False

    @property
    def left(self) -> int:
        """Regions without an answer."""
        return len(self.prompts) - self.answered

    @property
    def waiting(self) -> int:
        """Places taken in the queue: regions without an answer, or one if they have to be found first."""
        if self.cancelled:
            return 0
        return 1 if self.question.everything is not None else self.left

    @property
    def kind(self) -> tuple[Any, ...]:
        """Tickets of one kind can be answered together."""
        asked = self.question
        return asked.task, tuple(sorted(asked.generation.items())), self.to_mask, asked.candidates

    @property
    def to_mask(self) -> bool:
        """Whether masks are still to be made."""
        return self.masks is None and self.question.masks

    def cancel(self) -> None:
        """Nothing more is computed or told."""
        self.cancelled = True


def _digest(image: Image.Image) -> str:
    """Of an image's pixels, a strip at a time."""
    digest = hashlib.sha256(repr((image.size, image.mode)).encode())
    rows = max(1, 2**22 // image.width)
    for top in range(0, image.height, rows):
        digest.update(image.crop((0, top, image.width, min(top + rows, image.height))).tobytes())
    return digest.hexdigest()
