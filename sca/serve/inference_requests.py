"""Inference requests: their events, their errors, and their entries in the queue of the scheduler."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from PIL import Image
from sca_registry.contracts import Caption, Prompt, list_region_references
from sca_registry.spec import EverythingOptions, ZoomOptions

from sca.inference.engine import PredictedMask
from sca.inference.region_search import SearchProgress


class SchedulerError(Exception):
    """Error of a request that cannot be completed."""


class QueueFullError(SchedulerError):
    """Error of a request that exceeds the queue."""


class DeadlineExceededError(SchedulerError):
    """Error of a request whose deadline has passed."""


class InsufficientMemoryError(SchedulerError):
    """Error of a request that needs too much memory."""


class UnsupportedRequestError(SchedulerError, ValueError):
    """Error of a request that the model does not support."""


class SchedulerClosedError(SchedulerError):
    """Error of a request to a scheduler that is closed or whose worker thread has crashed."""


@dataclass(frozen=True)
class InferenceRequest:
    """Request to caption regions of one image.

    Args:
        image: Image, with the EXIF orientation applied.
        prompts: Regions in image pixels, checked by `sca.io.prompts.check_prompt`.
        everything: Options of a search that finds the regions; None for `prompts`.
        task: "caption", "recognition" or a further task of the captioner.
        generation: Options returned by `sca.inference.generation_options.resolve_generation_options`.
        return_masks: Return the masks of `prompts`.
        return_candidates: Return all candidate masks of each prompt.
        timeout: Seconds to complete the request.
        client_id: Identity of the client; clients take turns.
        max_regions: Maximum number of regions of `everything`, best first.
        zoom: Result of `sca.inference.zoom_options.resolve_zoom` for the captioner.
        text: Text to find: only matching regions are returned, each with the text as `name` and its score as
            `proposal_score`.
        top: Maximum number of matches per turn of the scheduler. The caller selects the best `top` of all turns.
        threshold: Minimum score of a match.
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
    zoom: ZoomOptions | None = None
    text: str | None = None
    top: int | None = None
    threshold: float | None = None


class CaptioningStarted(NamedTuple):
    """Event before the first caption.

    Attributes:
        num_regions: Number of regions to caption.
    """

    num_regions: int


class CandidateMasks(NamedTuple):
    """Event with the candidate masks of a region, highest predicted IoU first.

    Attributes:
        region_index: Index of the region in the request.
        masks: Candidate masks.
    """

    region_index: int
    masks: list[PredictedMask]


class RequestDone(NamedTuple):
    """Last event of a completed request.

    Attributes:
        num_regions: Number of captioned regions, or of searched regions if the request has a `text`.
    """

    num_regions: int


RequestEvent = CaptioningStarted | SearchProgress | Caption | CandidateMasks | RequestDone | SchedulerError


class QueueEntry:
    """Entry of a request in the queue of the scheduler.

    Args:
        request: Request.
        on_event: Function called in the worker thread: with `SearchProgress` during a search, with
            `CaptioningStarted`, with each caption (after its `CandidateMasks`, if requested), and finally with
            `RequestDone` or a `SchedulerError`.
    """

    def __init__(self, request: InferenceRequest, on_event: Callable[[RequestEvent], None]):
        self.request = request
        self.on_event = on_event
        self.image_digest: str = _hash_image(request.image)
        self.prompts: list[Prompt] = list(request.prompts)
        self.found_masks: list[PredictedMask] | None = None  # result of a search
        self.needs_search: bool = request.everything is not None
        self.search_steps: Generator[SearchProgress, None, tuple[list[PredictedMask], list[Prompt]]] | None = None
        self.search_progress: SearchProgress | None = None
        self.num_turns: int = 0
        self.num_captioned: int = 0
        self.deadline: float = time.monotonic() + request.timeout
        self.is_cancelled: bool = False

    @property
    def num_remaining(self) -> int:
        """Number of regions that are not captioned yet."""
        return len(self.prompts) - self.num_captioned

    @property
    def queue_size(self) -> int:
        """Size in the queue: the number of remaining regions, or one for a search."""
        if self.is_cancelled:
            return 0
        return 1 if self.request.everything is not None else self.num_remaining

    @property
    def has_region_references(self) -> bool:
        """Whether the question contains region references, so that all prompts are processed in one turn."""
        return bool(list_region_references(self.request.generation.get("question") or ""))

    @property
    def batch_key(self) -> tuple[Any, ...]:
        """Key that is equal for entries that can be captioned in one batch."""
        request, generation = self.request, tuple(sorted(self.request.generation.items()))
        return (
            request.task,
            generation,
            self.needs_masks,
            request.return_candidates,
            request.zoom,
            self.is_zoomed_search,
            request.text,
            request.top,
            request.threshold,
        )

    @property
    def is_zoomed_search(self) -> bool:
        """Whether the regions were found by a search, and the masks of small ones are predicted again."""
        return self.found_masks is not None and self.request.zoom is not None

    @property
    def needs_masks(self) -> bool:
        """Whether the captioner must compute masks."""
        return self.found_masks is None and self.request.return_masks

    def cancel(self) -> None:
        """Cancel the request: compute nothing more and send no more events."""
        self.is_cancelled = True


def _hash_image(image: Image.Image) -> str:
    """Hash the pixels of an image, in strips to limit memory."""
    digest = hashlib.sha256(repr((image.size, image.mode)).encode())
    strip_height = max(1, 2**22 // image.width)
    for strip_top in range(0, image.height, strip_height):
        digest.update(image.crop((0, strip_top, image.width, min(strip_top + strip_height, image.height))).tobytes())
    return digest.hexdigest()
