"""Requests to the scheduler, their events, and their tickets in the queue."""

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

from sca.inference.automatic import SearchProgress
from sca.inference.engine import PredictedMask


class SchedulerError(Exception):
    """A question that got no answer; the message says why."""


class QueueFullError(SchedulerError):
    """Too much waits already."""


class DeadlineExceededError(SchedulerError):
    """The time that a question had is over."""


class InsufficientMemoryError(SchedulerError):
    """The answer does not fit into memory."""


class UnsupportedRequestError(SchedulerError, ValueError):
    """The model is not of the kind that could answer."""


class SchedulerClosedError(SchedulerError):
    """The scheduler answers no more: it was closed, or its thread has died."""


@dataclass(frozen=True)
class InferenceRequest:
    """A request to caption regions of one image: its `prompts`, checked by `sca.io.prompts.check_prompt`, or the
    regions that a search with `everything` finds.

    generation: options of `Predictor.predict`. return_masks: also return the masks of `prompts`. return_candidates:
    also return all candidate masks of each prompt. timeout: seconds to complete the response. client_id: clients take
    turns. max_regions: maximum regions of `everything`, best first.
    """

    image: Image.Image
    prompts: Sequence[Prompt] = ()
    everything: EverythingOptions | None = None
    task: str = "caption"
    generation: Mapping[str, Any] = field(default_factory=dict)
    return_masks: bool = True
    return_candidates: bool = False
    timeout: float = math.inf
    client_id: str = ""
    max_regions: int | None = None


class RegionsFound(NamedTuple):
    """The number of regions to caption."""

    regions: int


class CandidateMasks(NamedTuple):
    """All masks that a region may have, the best first."""

    region: int
    masks: list[PredictedMask]


class RequestDone(NamedTuple):
    """All regions are answered."""

    regions: int


RequestEvent = RegionsFound | SearchProgress | Caption | CandidateMasks | RequestDone | SchedulerError


class Ticket:
    """A queued or running request. `on_event` is called in the scheduler's thread: with `SearchProgress` during a
    search, with `RegionsFound`, with each caption, and finally with `RequestDone` or a `SchedulerError`.
    """

    def __init__(self, request: InferenceRequest, on_event: Callable[[RequestEvent], None]):
        self.request, self.on_event = request, on_event
        self.digest = _hash_image(request.image)
        self.prompts = list(request.prompts)
        self.found_masks: list[PredictedMask] | None = None  # of what was found
        self.needs_search = request.everything is not None
        self.search_steps: Generator[SearchProgress, None, tuple[list[PredictedMask], list[Prompt]]] | None = (
            None  # of a search that runs
        )
        self.search_progress: SearchProgress | None = None
        self.num_turns = self.num_captioned = 0
        self.deadline = time.monotonic() + request.timeout
        self.is_cancelled = False

    @property
    def num_remaining(self) -> int:
        """Regions without an answer."""
        return len(self.prompts) - self.num_captioned

    @property
    def queue_size(self) -> int:
        """Places taken in the queue: regions without an answer, or one if they have to be found first."""
        if self.is_cancelled:
            return 0
        return 1 if self.request.everything is not None else self.num_remaining

    @property
    def batch_key(self) -> tuple[Any, ...]:
        """Tickets of one kind can be answered together."""
        request = self.request
        return request.task, tuple(sorted(request.generation.items())), self.needs_masks, request.return_candidates

    @property
    def needs_masks(self) -> bool:
        """Whether masks are still to be made."""
        return self.found_masks is None and self.request.return_masks

    def cancel(self) -> None:
        """Nothing more is computed or told."""
        self.is_cancelled = True


def _hash_image(image: Image.Image) -> str:
    """Of an image's pixels, a strip at a time."""
    digest = hashlib.sha256(repr((image.size, image.mode)).encode())
    strip_height = max(1, 2**22 // image.width)
    for strip_top in range(0, image.height, strip_height):
        digest.update(image.crop((0, strip_top, image.width, min(strip_top + strip_height, image.height))).tobytes())
    return digest.hexdigest()
