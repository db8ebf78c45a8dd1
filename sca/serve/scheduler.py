"""Scheduler that shares one model between many clients and batches their requests.

    scheduler = RequestScheduler(captioner)
    entry = scheduler.submit(InferenceRequest(image, prompts), on_event=print)
    entry.cancel()

A worker thread owns the model and works in short turns. A turn captions some regions of the queued requests with the
same task and options, or continues the search of one everything request for a moment. New requests and requests that
already had a turn alternate, and so do clients, so that long requests do not delay short ones. Features of recent
images are cached.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import Literal, cast

import torch
from PIL import Image
from sca_registry.contracts import Caption, Captioner, Prompt
from sca_registry.spec import DEFAULT_GENERATION

from sca.allocator import release_memory
from sca.inference.batch import caption_requests
from sca.inference.engine import EncodedImages, MaskEngine
from sca.inference.region_search import search_everything
from sca.inference.text_search import check_can_find, find_in_images
from sca.inference.zoom import Crop, caption_masks, segment_regions
from sca.io.masks import mask_to_box
from sca.serve.feature_cache import FeatureCache
from sca.serve.inference_requests import (
    CandidateMasks,
    CaptioningStarted,
    DeadlineExceededError,
    InferenceRequest,
    InsufficientMemoryError,
    QueueEntry,
    QueueFullError,
    RequestDone,
    RequestEvent,
    SchedulerClosedError,
    SchedulerError,
    UnsupportedRequestError,
)
from sca.serve.memory_budget import is_out_of_memory

log: logging.Logger = logging.getLogger("sca.serve")

SEARCH_SECONDS = 0.1  # maximum duration of one turn of a search
MAX_CONCURRENT_SEARCHES = 2  # searches in progress; the others wait
SEARCH_BYTES = 512 * 2**20 // MAX_CONCURRENT_SEARCHES  # maximum size of candidate masks per search
SHORT_REQUEST_REGIONS = 64  # requests with more regions can use only three quarters of the queue
CROWDED_TURN_DIVISOR = 4  # factor by which turns are shorter while requests outside the turn wait
POINTS_PER_REGION_COST = 32  # points of a prompt that cost as much as a region
MASK_PIXELS_PER_REGION_COST = 2**22  # mask pixels that cost as much as a region
EVERYTHING_UNSUPPORTED_MESSAGE = "this model does not support everything mode; send prompts"


class RequestScheduler:
    """Scheduler that processes requests with a captioner, in turns. Starts the worker thread.

    Args:
        captioner: Captioner, used by the worker thread only.
        max_regions_per_turn: Maximum number of regions captioned per turn. Regions that cost more than the default
            (beams, tokens, points, large masks) count as several.
        max_images_per_encode: Maximum number of images encoded together.
        feature_cache_bytes: Size of the image feature cache.
        max_queue: Maximum queued regions; a search counts as one.
        max_found_regions: Maximum number of regions that a search can find; None for no limit.
    """

    def __init__(
        self,
        captioner: Captioner,
        max_regions_per_turn: int = 64,
        max_images_per_encode: int = 8,
        feature_cache_bytes: int = 512 * 2**20,
        max_queue: int = 10_000,
        max_found_regions: int | None = None,
    ):
        self.captioner = captioner
        self.max_regions_per_turn = max_regions_per_turn
        self.max_images_per_encode = max_images_per_encode
        self.max_queue = max_queue
        self.max_found_regions = max_found_regions
        self.feature_cache: FeatureCache = FeatureCache(feature_cache_bytes)
        self.num_turns: int = 0
        self.num_captioned_regions: int = 0
        self._queue: deque[QueueEntry] = deque()
        self._current_turn: list[QueueEntry] = []
        self._last_turn_was_new = False  # whether the last turn was the first of its entry
        self._last_turn_by_client: dict[str, int] = {}  # for clients with queued entries
        self._condition = threading.Condition()
        self._is_draining = self._is_closed = self._has_crashed = False
        self._thread = threading.Thread(target=self._run_worker, name="sca-scheduler", daemon=True)
        self._thread.start()

    @property
    def num_queued_regions(self) -> int:
        """Number of regions queued or in progress."""
        with self._condition:
            return self._count_queued_regions()

    @property
    def accepts_requests(self) -> bool:
        """Whether the scheduler accepts requests."""
        return self.state == "ok"

    @property
    def state(self) -> Literal["ok", "draining", "down"]:
        """State: "draining" and "down" (closed or crashed) accept no requests."""
        if self._has_crashed or self._is_closed:
            return "down"
        return "draining" if self._is_draining else "ok"

    @property
    def supports_everything(self) -> bool:
        """Whether the captioner supports everything mode."""
        return isinstance(self.captioner, MaskEngine) and self.captioner.model is not None

    @property
    def _engine(self) -> MaskEngine:
        """The captioner, for searches and for captioners with `caption_batch`."""
        return cast(MaskEngine, self.captioner)

    def submit(self, request: InferenceRequest, on_event: Callable[[RequestEvent], None]) -> QueueEntry:
        """Queue a request.

        Args:
            request: Request.
            on_event: Function called in the worker thread with each event; see `QueueEntry`.

        Returns:
            The entry in the queue; `cancel()` cancels the request.

        Raises:
            QueueFullError: The queue is full.
            SchedulerClosedError: The scheduler accepts no requests.
            UnsupportedRequestError: The request needs everything mode and the captioner does not support it.
        """
        if request.everything is not None and not self.supports_everything:
            raise UnsupportedRequestError(EVERYTHING_UNSUPPORTED_MESSAGE)
        entry = QueueEntry(request, on_event)
        with self._condition:
            if self.state != "ok":
                raise self._make_closed_error()
            entry_size, num_queued = entry.queue_size, self._count_queued_regions()
            if num_queued + entry_size > (
                self.max_queue if entry_size <= SHORT_REQUEST_REGIONS else self.max_queue * 3 // 4
            ):
                raise QueueFullError(
                    f"the queue is full ({num_queued} of {self.max_queue} regions); try again later, or send fewer "
                    "regions"
                )
            self._queue.append(entry)
            self._condition.notify_all()
        return entry

    def iter_events(self, request: InferenceRequest) -> Iterator[RequestEvent]:
        """Submit a request and yield its events up to `RequestDone`. Closing the iterator cancels the request.

        Args:
            request: Request to process.

        Yields:
            An event of the request.

        Raises:
            SchedulerError: The request cannot be queued or completed.
        """
        event_queue: SimpleQueue[RequestEvent] = SimpleQueue()
        entry = self.submit(request, event_queue.put)
        try:
            while True:
                event = event_queue.get()
                if isinstance(event, SchedulerError):
                    raise event
                yield event
                if isinstance(event, RequestDone):
                    break
        finally:
            entry.cancel()

    def drain(self, timeout: float) -> None:
        """Stop accepting requests, and close the scheduler after `timeout` seconds.

        Args:
            timeout: Seconds to process the queued requests.
        """
        with self._condition:
            self._is_draining = True
        close_timer = threading.Timer(timeout, self.close)
        close_timer.daemon = True
        close_timer.start()

    def close(self, timeout: float = 1.0) -> None:
        """Stop after the current turn. All other requests fail with `SchedulerClosedError`.

        Args:
            timeout: Time limit in seconds to wait for the current turn.
        """
        with self._condition:
            self._is_closed = True
            waiting_entries = [entry for entry in self._queue if not any(entry is each for each in self._current_turn)]
            self._condition.notify_all()
        for entry in waiting_entries:
            _fail_entry(entry, self._make_closed_error())
        self._thread.join(timeout)
        with self._condition:
            remaining_entries, self._queue = self._queue, deque()
        for entry in remaining_entries:
            _fail_entry(entry, self._make_closed_error())

    def _make_closed_error(self) -> SchedulerClosedError:
        if self._has_crashed:
            return SchedulerClosedError("the worker thread of the model has crashed; restart the server")
        return SchedulerClosedError("the server is shutting down; try again later")

    def _count_queued_regions(self) -> int:
        return sum(entry.queue_size for entry in self._queue)

    def _run_worker(self) -> None:
        try:
            self._process_turns()
        except BaseException:  # including SystemExit: queued requests would never end
            log.critical("the worker thread of the model has crashed; restart the server", exc_info=True)
            self._has_crashed = True
        with self._condition:
            remaining_entries, self._queue, self._current_turn = self._queue, deque(), []
            self._is_closed = True
        for entry in remaining_entries:
            _fail_entry(entry, self._make_closed_error())

    def _process_turns(self) -> None:
        has_worked = False
        while True:
            with self._condition:
                has_work = self._condition.wait_for(lambda: self._queue or self._is_closed, 1.0 if has_worked else None)
                if self._is_closed:
                    return
                self._current_turn = turn = self._select_turn() if has_work else []
            if not has_work:
                has_worked = False
                release_memory()  # without the lock, which would block /health and /metrics
                continue
            if turn:
                self._run_turn(turn)
                has_worked = True
            with self._condition:  # unfinished entries move to the end of the queue
                turn_ids = set(map(id, turn))
                unfinished = [
                    each for each in turn if not each.is_cancelled and (each.num_remaining or each.needs_search)
                ]
                self._queue = deque(each for each in self._queue if id(each) not in turn_ids)
                self._queue.extend(unfinished)
                self._current_turn = []

    def _select_turn(self) -> list[QueueEntry]:
        """Select the entries of the next turn. They stay in the queue, because regions in progress count as queued."""
        now = time.monotonic()
        for entry in [each for each in self._queue if each.is_cancelled or each.deadline < now]:
            self._queue.remove(entry)
            _fail_entry(entry, DeadlineExceededError(format_timeout_message(entry.request.timeout)))
        num_running_searches = sum(each.search_steps is not None for each in self._queue)
        ready_entries = [
            each
            for each in self._queue
            if not each.needs_search or each.search_steps is not None or num_running_searches < MAX_CONCURRENT_SEARCHES
        ]
        if not ready_entries:
            return []
        first = self._select_first_entry(ready_entries)
        if first.needs_search:
            turn = [first]
        else:
            # Rank entries so that each client gets one before any client gets its second.
            num_selected_by_client: Counter[str] = Counter()
            ranked_entries = []
            for each in ready_entries:
                if each is not first and not each.needs_search and each.batch_key == first.batch_key:
                    ranked_entries.append((num_selected_by_client[each.request.client_id], each))
                    num_selected_by_client[each.request.client_id] += 1
            turn = [first, *(each for _, each in sorted(ranked_entries, key=lambda pair: pair[0]))][
                : self.max_regions_per_turn
            ]
        self.num_turns += 1
        waiting_clients = {each.request.client_id for each in self._queue}
        self._last_turn_by_client = {
            client: last for client, last in self._last_turn_by_client.items() if client in waiting_clients
        }
        for each in turn:
            self._last_turn_by_client[each.request.client_id] = self.num_turns
        return turn

    def _select_first_entry(self, ready_entries: Sequence[QueueEntry]) -> QueueEntry:
        """Select the next entry: new and served entries alternate; among these, the client that waited longest."""
        new_entries, served_entries = (
            [each for each in ready_entries if bool(each.num_turns) is was_served] for was_served in (False, True)
        )
        eligible_entries = (served_entries if self._last_turn_was_new else new_entries) or served_entries or new_entries
        self._last_turn_was_new = eligible_entries is new_entries
        return min(eligible_entries, key=lambda each: self._last_turn_by_client.get(each.request.client_id, -1))

    def _run_turn(self, turn: list[QueueEntry]) -> None:
        for entry in turn:
            entry.num_turns += 1
        try:
            if turn[0].needs_search:
                self._continue_search(turn[0])
            else:
                self._caption_turn(turn)
        except Exception as error:  # retry the entries one by one, so that only the faulty one fails
            if len(turn) > 1:
                for entry in turn:
                    self._run_turn([entry])
                return
            (entry,) = turn
            _fail_entry(entry, _to_scheduler_error(error))

    def _continue_search(self, entry: QueueEntry) -> None:
        """Continue the search of an entry for at most `SEARCH_SECONDS`."""
        if entry.search_steps is None:
            entry.search_steps = search_everything(
                self._engine,
                self._encode_images([entry]),
                entry.request.everything,
                max_found_regions=self.max_found_regions,
                max_bytes=SEARCH_BYTES,
            )
        slice_end = time.monotonic() + SEARCH_SECONDS
        try:
            while True:
                progress = next(entry.search_steps)
                if progress != entry.search_progress:
                    entry.search_progress = progress
                    _send_event(entry, progress)
                if entry.is_cancelled or time.monotonic() > slice_end:
                    return
        except StopIteration as search_result:
            entry.found_masks, entry.prompts = (each[: entry.request.max_regions] for each in search_result.value)
            entry.needs_search, entry.search_steps = False, None
            _send_event(entry, CaptioningStarted(len(entry.prompts)))
            if not entry.prompts:
                _send_event(entry, RequestDone(0))

    def _allocate_regions(self, entries: Sequence[QueueEntry]) -> list[int]:
        """Return the number of regions of each entry in a turn, allocated round-robin up to the cost of a turn."""
        has_other_entries = any(
            not each.is_cancelled for each in self._queue if not any(each is one for one in entries)
        )
        budget_left = self.max_regions_per_turn / (CROWDED_TURN_DIVISOR if has_other_entries else 1)
        cost_functions = [self._make_cost_function(entry) for entry in entries]
        region_counts = [0] * len(entries)
        while True:
            previous_total = sum(region_counts)
            for index, entry in enumerate(entries):
                if region_counts[index] < entry.num_remaining:
                    start = entry.num_captioned + region_counts[index]
                    end = len(entry.prompts) if entry.has_region_references else start + 1
                    cost = sum(map(cost_functions[index], entry.prompts[start:end]))
                    if sum(region_counts) and cost > budget_left:
                        return region_counts
                    budget_left -= cost
                    region_counts[index] += end - start
            if sum(region_counts) == previous_total:
                return region_counts

    def _make_cost_function(self, entry: QueueEntry) -> Callable[[Prompt], float]:
        """Return a function that estimates the cost of a region relative to one with default options."""
        default_options = getattr(self.captioner, "generation", DEFAULT_GENERATION)
        options = {**default_options, **entry.request.generation}
        num_sequences = max(options["num_beams"], options.get("num_captions", 1))
        default_cost = default_options["num_beams"] * default_options["max_new_tokens"]
        token_cost = num_sequences * options["max_new_tokens"] / default_cost
        if options.get("seed") is not None:  # such regions are captioned one at a time
            token_cost = max(token_cost, self.max_regions_per_turn)
        cost_per_mask = entry.request.image.width * entry.request.image.height / MASK_PIXELS_PER_REGION_COST
        num_predicted_masks = entry.needs_masks + 3 * entry.request.return_candidates

        def estimate_cost(prompt: Prompt) -> float:
            num_masks = num_predicted_masks + (prompt.mask is not None)
            return max(1.0, token_cost) + len(prompt.points) // POINTS_PER_REGION_COST + int(num_masks * cost_per_mask)

        return estimate_cost

    def _caption_turn(self, turn: list[QueueEntry]) -> None:
        allocated = zip(turn, self._allocate_regions(turn), strict=True)
        served = [(each, share) for each, share in allocated if share or not each.num_remaining]
        turn = [each for each, _ in served]
        requests = [each.prompts[each.num_captioned : each.num_captioned + share] for each, share in served]
        task, generation = turn[0].request.task, turn[0].request.generation
        images, encoded = [entry.request.image for entry in turn], None
        if (text := turn[0].request.text) is not None:
            self._send_matches(turn, requests, text)
            return
        if turn[0].is_zoomed_search:
            captions_by_entry = [self._caption_found_regions(*pair) for pair in zip(turn, requests, strict=True)]
        else:
            if hasattr(self.captioner, "caption_batch"):
                encoded, generation = self._encode_images(turn), {**generation, "return_masks": turn[0].needs_masks}
            zoom, encode_crops = turn[0].request.zoom, partial(self._encode_crops, turn)
            captions_by_entry = caption_requests(
                self.captioner, images, requests, task, encoded, zoom, encode_crops, **generation
            )
        for entry, prompts, captions in zip(turn, requests, captions_by_entry, strict=True):
            if not entry.num_captioned and entry.found_masks is None:
                _send_event(entry, CaptioningStarted(len(entry.prompts)))
            # the answer to a question with region references belongs to one of the prompts
            first_index = 0 if entry.has_region_references else entry.num_captioned
            region_indices = [first_index + caption.region_id for caption in captions]
            if entry.request.return_candidates and captions and captions[0].mask is not None:
                self._send_candidate_masks(entry, region_indices)
            for caption, index in zip(captions, region_indices, strict=True):
                _send_caption(entry, caption, index)
            entry.num_captioned += len(prompts)
            self.num_captioned_regions += len(prompts)
            if not entry.num_remaining:
                _send_event(entry, RequestDone(entry.num_captioned))

    def _caption_found_regions(self, entry: QueueEntry, prompts: Sequence[Prompt]) -> list[Caption]:
        """Caption the next regions that a search found, small ones from crops."""
        assert entry.found_masks is not None  # see `QueueEntry.is_zoomed_search`
        request, masks = entry.request, entry.found_masks[entry.num_captioned :][: len(prompts)]
        zoom, encode_crops = request.zoom, partial(self._encode_crops, [entry])
        encoded = self._encode_images([entry])
        return caption_masks(
            self._engine, encoded, masks, prompts, request.task, zoom, encode_crops, **request.generation
        )

    def _send_matches(self, turn: Sequence[QueueEntry], requests: Sequence[Sequence[Prompt]], text: str) -> None:
        """Score the next regions of entries, and send those that match a text, with masks only for these."""
        encoded, engine, request = self._encode_images(turn), check_can_find(self.captioner), turn[0].request
        matches_by_entry = find_in_images(
            engine, encoded, requests, text, request.top, request.threshold, return_masks=turn[0].needs_masks
        )
        for entry, prompts, matches in zip(turn, requests, matches_by_entry, strict=True):
            if not entry.num_captioned and entry.found_masks is None:
                _send_event(entry, CaptioningStarted(len(entry.prompts)))
            for match in matches:
                _send_caption(entry, match, entry.num_captioned + match.region_id)
            entry.num_captioned += len(prompts)
            self.num_captioned_regions += len(prompts)
            if not entry.num_remaining:
                _send_event(entry, RequestDone(entry.num_captioned))

    def _send_candidate_masks(self, entry: QueueEntry, region_indices: Sequence[int]) -> None:
        """Send the candidate masks of regions."""
        prompts = [entry.prompts[index] for index in region_indices]
        zoom, encode_crops = entry.request.zoom, partial(self._encode_crops, [entry])
        masks_by_region = segment_regions(
            self._engine, self._encode_images([entry]), [prompts], zoom=zoom, encode_crops=encode_crops
        )
        for region_index, masks in zip(region_indices, masks_by_region, strict=True):
            _send_event(entry, CandidateMasks(region_index, masks))

    def _encode_images(self, turn: Sequence[QueueEntry]) -> EncodedImages:
        """Return the image features of entries, in order."""
        return self._encode([(entry.image_digest, entry.request.image) for entry in turn])

    def _encode_crops(self, turn: Sequence[QueueEntry], crops: Sequence[Crop]) -> EncodedImages:
        """Return the features of crops of the images of entries, in order."""
        entries = [(turn[crop.image_index], crop.window) for crop in crops]
        return self._encode(
            [(f"{entry.image_digest} {window}", entry.request.image.crop(window)) for entry, window in entries]
        )

    def _encode(self, digested_images: Sequence[tuple[str, Image.Image]]) -> EncodedImages:
        """Return the features of images with their digests, in order; encode those that are not cached, in batches."""
        images_by_digest = dict(digested_images)
        cached_by_digest = {digest: self.feature_cache.get(digest) for digest in images_by_digest}
        encoded_by_digest = {digest: encoded for digest, encoded in cached_by_digest.items() if encoded is not None}
        missing_digests = [digest for digest in images_by_digest if digest not in encoded_by_digest]
        for start in range(0, len(missing_digests), self.max_images_per_encode):
            batch_digests = missing_digests[start : start + self.max_images_per_encode]
            encoded_batch = self._engine.encode([images_by_digest[digest] for digest in batch_digests])
            for index, digest in enumerate(batch_digests):
                encoded_by_digest[digest] = _copy_encoded_image(encoded_batch, index)
                self.feature_cache.put(digest, encoded_by_digest[digest])
        encoded_entries = [encoded_by_digest[digest] for digest, _ in digested_images]
        images = [image for _, image in digested_images]
        entry_features = [encoded.features for encoded in encoded_entries if encoded.features is not None]
        if not entry_features:  # no encoder
            return EncodedImages(images, None, ())
        features = entry_features[0] if len(entry_features) == 1 else torch.cat(entry_features)
        return EncodedImages(images, features, [frame for encoded in encoded_entries for frame in encoded.frames])


def _send_caption(entry: QueueEntry, caption: Caption, region_index: int) -> None:
    """Send the caption of a region of an entry, with the mask that a search found."""
    result = replace(caption, region_id=region_index)
    if entry.found_masks is not None and not entry.is_zoomed_search:
        rle, predicted_iou = entry.found_masks[region_index]
        result = replace(result, mask=rle, box=mask_to_box(rle), predicted_iou=predicted_iou)
    _send_event(entry, result)


def _send_event(entry: QueueEntry, event: RequestEvent) -> None:
    if entry.is_cancelled:
        return
    try:
        entry.on_event(event)
    except RuntimeError:  # the event loop is closed
        entry.cancel()


def _fail_entry(entry: QueueEntry, error: SchedulerError) -> None:
    """End an entry with an error as its last event."""
    _send_event(entry, error)
    entry.cancel()
    entry.search_steps = None


def _to_scheduler_error(error: Exception) -> SchedulerError:
    """Convert an error to one with a message for clients; log unexpected errors."""
    if isinstance(error, SchedulerError):
        return error
    if is_out_of_memory(error):
        return InsufficientMemoryError("not enough memory; request fewer regions or beams")
    if isinstance(error, ValueError):  # raised by the library for invalid requests
        return UnsupportedRequestError(str(error))
    log.exception("request failed", exc_info=error)
    return SchedulerError("the model failed; see the server log")


def format_timeout_message(timeout: float) -> str:
    """Return the message of a request that was not completed within `timeout` seconds."""
    return f"no response within {timeout:g} s; request fewer regions or try again later"


def _copy_encoded_image(encoded: EncodedImages, index: int) -> EncodedImages:
    """Copy the features of one image out of a batch, without the image, so that the batch can be freed."""
    if encoded.features is None:
        return EncodedImages((), None, ())
    return EncodedImages((), encoded.features[index : index + 1].clone(), [encoded.frames[index]])
