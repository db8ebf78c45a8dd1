"""Service shared by the routes: parsing, decoding, limits and inference."""

from __future__ import annotations

import asyncio
import base64
import io
import re
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from anyio import to_thread
from fastapi import Request
from PIL import Image
from pydantic import BaseModel
from sca_registry.contracts import Caption, Captioner, Prompt, list_region_references
from sca_registry.spec import DEFAULT_GENERATION

from sca.inference.automatic import resolve_everything_options
from sca.inference.generation_options import resolve_generation_options
from sca.inference.prompt_arguments import check_question_task, check_task, get_tasks
from sca.inference.text_search import check_can_find, check_text
from sca.inference.zoom_options import DEFAULT_ZOOM, ZoomValue, resolve_zoom
from sca.io.images import decode_image, open_image_header
from sca.io.prompts import parse_prompt
from sca.io.text import format_count
from sca.output.jsonl import caption_to_record
from sca.serve.errors import ApiError
from sca.serve.inference_requests import (
    DeadlineExceededError,
    InferenceRequest,
    InsufficientMemoryError,
    RequestDone,
    RequestEvent,
    SchedulerError,
)
from sca.serve.limits import MAX_BEAMS, MAX_CROP_LAYERS, MAX_NEW_TOKENS, MAX_POINTS_PER_SIDE, ServerLimits
from sca.serve.memory_budget import MemoryBudget, MemoryBudgetError
from sca.serve.metrics import ServerMetrics
from sca.serve.scheduler import EVERYTHING_UNSUPPORTED_MESSAGE, RequestScheduler, format_timeout_message
from sca.serve.schema import (
    CaptionRequest,
    ErrorResponse,
    EverythingParameters,
    FindRequest,
    MatchResult,
    RegionPrompt,
    RegionResult,
)

BodyModel = TypeVar("BodyModel", bound=BaseModel)
Result = TypeVar("Result")
POLL_INTERVAL = 0.5  # seconds between checks for a disconnected client
ALWAYS_ALLOWED_MASK_PIXELS = 64 * 2**20  # mask pixels per request that are allowed for any `max_pixels`
JSON_MEDIA_TYPE = "application/json"
EVENT_STREAM_MEDIA_TYPE = "text/event-stream"
# peak memory while an image with transparency is decoded and rotated, and memory afterwards
DECODING_BYTES_PER_PIXEL, DECODED_BYTES_PER_PIXEL = 13, 4
MAX_DATA_URL_HEADER = 1000  # characters of a data: URL before its comma
URL_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*):")
URLSAFE_TO_STANDARD = bytes.maketrans(b"-_", b"+/")  # base64 alphabets
PERCENT_ENCODED = {"%2B": "+", "%2F": "/", "%3D": "=", "%0A": "", "%0D": "", "%20": ""}
EVENT_BYTES = 1000  # approximate size of an event without its mask

_ERROR_DESCRIPTIONS = {
    400: "Malformed request.",
    401: "Missing or invalid API key.",
    403: "Host header that is not allowed.",
    408: "Request that did not arrive in time.",
    413: "Request that exceeds a size limit.",
    415: "Content type other than application/json and multipart/form-data.",
    422: "Invalid or unsupported value.",
    503: "Queue full, out of memory, or server shutting down; retry after the seconds in the header Retry-After.",
    504: "Response that was not complete in time.",
}
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": description} for status, description in _ERROR_DESCRIPTIONS.items()
}


class CaptionService:
    """Service shared by the routes.

    Args:
        scheduler: Scheduler with the model.
        model_name: Name of the model for clients.
        limits: Limits on requests.
        zoom: Default of the field `zoom` of requests.

    Attributes:
        metrics: Prometheus metrics.
        budget: Memory budget of all requests.
    """

    def __init__(
        self, scheduler: RequestScheduler, model_name: str, limits: ServerLimits, zoom: ZoomValue = DEFAULT_ZOOM
    ):
        self.scheduler = scheduler
        self.model_name = model_name
        self.limits = limits
        self.zoom = zoom
        self.metrics: ServerMetrics = ServerMetrics(scheduler)
        self.budget: MemoryBudget = MemoryBudget(limits.max_memory_bytes)
        self._small_image_pool = ThreadPoolExecutor(2, thread_name_prefix="sca-decode")
        self._large_image_pool = ThreadPoolExecutor(1, thread_name_prefix="sca-decode-large")
        # Threads of the other pools can wait for memory, so work of a request that holds memory needs its own pool.
        self._mask_pool = ThreadPoolExecutor(1, thread_name_prefix="sca-masks")

    def close(self) -> None:
        """Close the scheduler and the thread pools."""
        self.scheduler.close()
        for pool in (self._small_image_pool, self._large_image_pool, self._mask_pool):
            pool.shutdown(wait=False, cancel_futures=True)

    def get_deadline(self, request: Request) -> float:
        """Return the deadline of a received request in seconds of the event loop clock, set by the first call."""
        if not hasattr(request.state, "deadline"):
            request.state.deadline = asyncio.get_running_loop().time() + self.limits.timeout
        return request.state.deadline

    async def parse_body(self, request: Request, model: type[BodyModel]) -> BodyModel:
        """Read and validate the JSON body of a request.

        Args:
            request: HTTP request.
            model: Model of the body.

        Returns:
            The validated body.

        Raises:
            ApiError: The content type is not JSON (415), or the body has too many values (413).
            ValidationError: The body does not match the model.
        """
        if get_media_type(request) != JSON_MEDIA_TYPE:
            raise ApiError(
                415, f"{describe_media_type(get_media_type(request))} is not supported; send {JSON_MEDIA_TYPE}"
            )
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
        self.get_deadline(request)
        return await to_thread.run_sync(self.parse_json, body, model)

    def parse_json(self, body: bytes | bytearray | str, model: type[BodyModel]) -> BodyModel:
        """Validate JSON.

        The number of values is limited, because parsed values take much more memory than their text.

        Args:
            body: JSON.
            model: Model of the body.

        Returns:
            The validated body.

        Raises:
            ApiError: The body has too many values (413).
            ValidationError: The body does not match the model.
        """
        if isinstance(body, str):
            num_separators = sum(body.count(each) for each in ",[{")
        else:
            num_separators = sum(body.count(each) for each in b",[{")
        if num_separators > self.limits.max_json_values:
            raise ApiError(413, f"the request exceeds the limit of {self.limits.max_json_values:,} JSON values")
        return model.model_validate_json(body)

    async def decode_request_image(
        self,
        request: Request,
        image_bytes: bytes,
        num_masks: int = 0,
        name: str = "the image",
        kept_bytes: int = 0,
        extra_bytes_per_pixel: int = 0,
    ) -> Image.Image:
        """Decode the image of a request when memory is available.

        Args:
            request: HTTP request; its memory lease is resized.
            image_bytes: Image file.
            num_masks: Number of masks of the size of the image to reserve memory for.
            name: Name of the image in messages.
            kept_bytes: Memory in bytes that the request already needs, as part of the new lease.
            extra_bytes_per_pixel: Memory to reserve for later work with the image, in bytes per pixel.

        Returns:
            The image, with its EXIF orientation applied.

        Raises:
            InputError: The file is not an image, or has too many pixels.
            ApiError: The masks have too many pixels (413).
            MemoryBudgetError: There is not enough memory.
            DeadlineExceededError: The deadline of the request has passed.
        """
        unread_image = await to_thread.run_sync(
            open_image_header, io.BytesIO(image_bytes), name, self.limits.max_pixels
        )
        pixels = unread_image.width * unread_image.height
        if num_masks * pixels > max(ALWAYS_ALLOWED_MASK_PIXELS, 10 * self.limits.max_pixels):
            raise ApiError(
                413,
                f"{num_masks} masks of {unread_image.width} x {unread_image.height} pixels for {name} are too large; "
                "split them across several requests",
            )
        lease = request.state.lease
        deadline = self.get_deadline(request)
        monotonic_deadline = time.monotonic() + deadline - asyncio.get_running_loop().time()

        decoded_bytes = kept_bytes + (DECODED_BYTES_PER_PIXEL + num_masks + extra_bytes_per_pixel) * pixels
        decoding_bytes = kept_bytes + len(image_bytes) + (DECODING_BYTES_PER_PIXEL + num_masks) * pixels
        needed_bytes = max(decoding_bytes, decoded_bytes)

        def decode_with_lease() -> Image.Image:
            lease.resize(needed_bytes, monotonic_deadline - time.monotonic())
            if lease.has_ended:
                raise MemoryBudgetError("the request was cancelled")
            image = decode_image(unread_image, name)
            lease.resize(decoded_bytes)
            return image

        # Large images wait only for other large images.
        pool = self._small_image_pool if self.budget.is_small_request(needed_bytes) else self._large_image_pool
        return await self._run_in_pool(pool, deadline, decode_with_lease)

    async def process_masks(self, request: Request, function: Callable[[], Result]) -> Result:
        """Run a function that encodes or decodes masks in the thread for masks.

        Args:
            request: HTTP request.
            function: Function.

        Returns:
            The result of the function.

        Raises:
            DeadlineExceededError: The deadline of the request has passed.
        """
        return await self._run_in_pool(self._mask_pool, self.get_deadline(request), function)

    async def _run_in_pool(self, pool: Executor, deadline: float, function: Callable[[], Result]) -> Result:
        """Run a function in a thread of a pool; raise DeadlineExceededError after the deadline."""
        try:
            async with asyncio.timeout_at(deadline):
                return await asyncio.get_running_loop().run_in_executor(pool, function)
        except TimeoutError:
            raise DeadlineExceededError(format_timeout_message(self.limits.timeout)) from None

    def check_request(self, caption_request: CaptionRequest) -> None:
        """Check a request against the limits, before its image is decoded.

        Args:
            caption_request: Body of the request.

        Raises:
            ApiError: The request is contradictory or not supported by the model (422), or too large (413).
        """
        if bool(caption_request.prompts) == bool(caption_request.everything):
            problem = "both prompts and everything" if caption_request.prompts else "neither prompts nor everything"
            raise ApiError(422, f"the request has {problem}; send either prompts or everything=true")
        self.check_prompt_counts(
            [len(prompt.points) if isinstance(prompt.points, list) else 0 for prompt in caption_request.prompts]
        )
        for name in ("temperature", "top_p"):
            if getattr(caption_request, name) is not None and not caption_request.do_sample:
                raise ApiError(422, f"{name} can only be used with do_sample=true", param=name)
        if caption_request.everything and not self.scheduler.supports_everything:
            raise ApiError(422, EVERYTHING_UNSUPPORTED_MESSAGE)

    def check_prompt_counts(self, point_counts: Sequence[int]) -> None:
        """Check the number of prompts and points of a request against the limits.

        Args:
            point_counts: Number of points of each prompt.

        Raises:
            ApiError: There are too many prompts or points (413).
        """
        if len(point_counts) > self.limits.max_prompts:
            raise ApiError(
                413, f"the request has {len(point_counts):,} prompts; at most {self.limits.max_prompts:,} are allowed"
            )
        if point_counts and max(point_counts) > self.limits.max_points:
            raise ApiError(
                413, f"a prompt has {max(point_counts):,} points; at most {self.limits.max_points:,} are allowed"
            )
        if sum(point_counts) > self.limits.max_points_per_request:
            raise ApiError(
                413,
                f"the prompts have {sum(point_counts):,} points; at most {self.limits.max_points_per_request:,} are "
                "allowed per request",
            )

    def check_find_request(self, find_request: FindRequest) -> CaptionRequest:
        """Check a request to find a text, before its image is decoded.

        Args:
            find_request: Body of the request.

        Returns:
            The request to caption the same regions.

        Raises:
            ApiError: The text or the request is invalid or not supported by the model (422), or too large (413).
        """
        try:
            check_text(check_can_find(self.scheduler.captioner, self.model_name), find_request.text)
        except ValueError as error:
            raise ApiError(422, str(error), param="text") from error
        caption_request = CaptionRequest(
            prompts=find_request.prompts,
            everything=find_request.everything or not find_request.prompts,
            return_masks=find_request.return_masks,
        )
        self.check_request(caption_request)
        return caption_request

    async def make_inference_request(
        self,
        request: Request,
        caption_request: CaptionRequest,
        image: Image.Image,
        prompts: Sequence[Prompt] | None = None,
        location_format: str = "prompts.{}",
    ) -> InferenceRequest:
        """Convert a request of a route to one of the scheduler.

        Args:
            request: HTTP request.
            caption_request: Body of the request, checked by `check_request`.
            image: Decoded image.
            prompts: Checked prompts in image pixels that replace those in `caption_request`.
            location_format: Name of a prompt in errors; `{}` is its index.

        Returns:
            The request of the scheduler.

        Raises:
            ApiError: A generation option is invalid or not supported (422).
            DeadlineExceededError: The deadline has passed while masks were decoded.
            InputError: A prompt does not fit the image.
        """
        captioner = self.scheduler.captioner
        references = list_region_references(caption_request.question or "")
        num_regions = len(caption_request.prompts)
        if references and caption_request.everything:
            raise ApiError(
                422,
                "region references such as <region 1> refer to prompts; send prompts instead of everything",
                param="question",
            )
        if references and max(references) > num_regions:
            raise ApiError(
                422,
                f"the question refers to <region {max(references)}>, but there is only "
                f"{format_count(num_regions, 'region')}; change the question",
                param="question" if location_format == "prompts.{}" else "messages",
            )
        try:
            check_task(caption_request.task, get_tasks(captioner))
        except ValueError as error:
            raise ApiError(422, str(error), param="task") from error
        try:
            if caption_request.question is not None or caption_request.length is not None:
                check_question_task(caption_request.task)
            generation = resolve_generation_options(
                captioner,
                num_beams=caption_request.num_beams,
                max_new_tokens=caption_request.max_new_tokens,
                num_captions=caption_request.num_captions,
                do_sample=caption_request.do_sample,
                temperature=caption_request.temperature,
                top_p=caption_request.top_p,
                seed=caption_request.seed,
                question=caption_request.question,
                length=caption_request.length,
            )
            zoom = resolve_zoom(captioner, self.zoom if caption_request.zoom is None else caption_request.zoom)
        except ValueError as error:
            raise ApiError(422, str(error)) from error
        generation |= _limit_default_options(captioner, generation)
        everything = max_regions = None
        if caption_request.everything:
            everything_fields = (
                caption_request.everything
                if isinstance(caption_request.everything, EverythingParameters)
                else EverythingParameters()
            )
            max_regions = everything_fields.max_regions
            search_options = resolve_everything_options(
                captioner, everything_fields.model_dump(exclude={"max_regions"})
            )
            everything = replace(
                search_options,
                points_per_side=min(search_options.points_per_side, MAX_POINTS_PER_SIDE),
                crop_n_layers=min(search_options.crop_n_layers, MAX_CROP_LAYERS),
            )
        elif prompts is None:
            if count_mask_prompts(caption_request):
                read_checked_prompts = partial(
                    _read_checked_prompts, caption_request.prompts, image.size, location_format
                )
                prompts = await self.process_masks(request, read_checked_prompts)
            else:
                prompts = await to_thread.run_sync(
                    _read_checked_prompts, caption_request.prompts, image.size, location_format
                )
        return InferenceRequest(
            image,
            prompts or (),
            everything,
            caption_request.task,
            generation,
            return_masks=caption_request.return_masks,
            timeout=self.limits.timeout,
            client_id=getattr(request.state, "client", None) or (request.client.host if request.client else ""),
            max_regions=max_regions,
            zoom=zoom,
        )

    async def iter_events(
        self, request: Request, inference_request: InferenceRequest
    ) -> AsyncGenerator[RequestEvent | None, None]:
        """Yield the events of a request, and None after `POLL_INTERVAL` seconds without one.

        The request is cancelled when the client disconnects or the deadline passes. Queued events count toward the
        memory of the request, so that a slow client cannot accumulate masks.

        Args:
            request: HTTP request.
            inference_request: Request to submit to the scheduler.

        Raises:
            SchedulerError: The request cannot be completed within its time and memory.
        """
        event_queue: asyncio.Queue[RequestEvent] = asyncio.Queue()
        loop, deadline, lease = asyncio.get_running_loop(), self.get_deadline(request), request.state.lease

        def queue_event(event: RequestEvent) -> None:
            try:
                lease.add(_estimate_event_bytes(event))
            except MemoryBudgetError as error:
                event = InsufficientMemoryError(str(error))
            event_queue.put_nowait(event)

        def forward_event(event: RequestEvent) -> None:
            loop.call_soon_threadsafe(queue_event, event)

        entry = await to_thread.run_sync(self.scheduler.submit, inference_request, forward_event)
        try:
            next_poll = loop.time()
            while True:
                now = loop.time()
                if now > deadline:
                    raise DeadlineExceededError(format_timeout_message(inference_request.timeout))
                if now > next_poll:
                    next_poll = now + POLL_INTERVAL
                    if await request.is_disconnected():
                        return
                try:
                    event = await asyncio.wait_for(event_queue.get(), min(POLL_INTERVAL, deadline - now))
                except TimeoutError:
                    yield None
                    continue
                if isinstance(event, SchedulerError):
                    raise event
                lease.add(-_estimate_event_bytes(event))
                yield event
                if isinstance(event, RequestDone):
                    return
        finally:
            entry.cancel()

    async def collect_captions(self, request: Request, inference_request: InferenceRequest) -> list[Caption]:
        """Collect the captions of a request.

        Args:
            request: HTTP request, which is watched for a disconnect.
            inference_request: Request to submit.

        Returns:
            The captions in order; incomplete if the client disconnects.

        Raises:
            SchedulerError: The request cannot be completed within its time and memory.
        """
        captions, _ = await self._collect_results(request, inference_request)
        return captions

    async def collect_matches(self, request: Request, inference_request: InferenceRequest) -> tuple[list[Caption], int]:
        """Collect the regions that match the text of a request.

        Args:
            request: HTTP request, which is watched for a disconnect.
            inference_request: Request to submit, with a text.

        Returns:
            The best `top` matches, best first, and the number of regions searched; incomplete if the client
            disconnects.

        Raises:
            SchedulerError: The request cannot be completed within its time and memory.
        """
        matches, num_regions = await self._collect_results(request, inference_request)
        return sorted(matches, key=lambda match: -(match.proposal_score or 0))[: inference_request.top], num_regions

    async def _collect_results(
        self, request: Request, inference_request: InferenceRequest
    ) -> tuple[list[Caption], int]:
        """Return the captions of a request in order, and the number of regions that were processed."""
        captions, num_regions = [], 0
        async for event in self.iter_events(request, inference_request):
            if isinstance(event, Caption):
                captions.append(event)
                request.state.lease.add(_estimate_event_bytes(event))
            elif isinstance(event, RequestDone):
                num_regions = event.num_regions
        return captions, num_regions


def get_media_type(request: Request) -> str:
    """Return the media type of a request in lowercase, without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def describe_media_type(media_type: str) -> str:
    """Return the description of a media type for error messages."""
    return f"the content type {media_type[:100]!r}" if media_type else "a request without a content type"


def count_mask_prompts(caption_request: CaptionRequest) -> int:
    """Count the prompts with a mask."""
    return sum(prompt.mask is not None for prompt in caption_request.prompts)


def decode_base64(text: str, name: str = "image", param: str = "image") -> bytes:
    """Decode base64 text or a data: URL.

    Accepts the standard and the URL-safe alphabet, missing padding, line breaks, percent-encoding, and "data:" in any
    case.

    Args:
        text: Base64 text or URL.
        name: Field name in error messages.
        param: `param` of errors.

    Returns:
        The decoded bytes.

    Raises:
        ApiError: The text is another URL or not base64 (422).
    """
    header, comma, _ = text[:MAX_DATA_URL_HEADER].partition(",")
    scheme = URL_SCHEME.match(header)
    if scheme and scheme[1].lower() != "data":
        raise ApiError(422, f"{name}: image URLs are not fetched; send the file in base64", param=param)
    if scheme:
        if not comma or not header.rstrip().lower().endswith(";base64"):
            raise ApiError(422, f"{name}: the data: URL is not base64; send data:image/png;base64,...", param=param)
        text = text[len(header) + 1 :]
    for escape, character in PERCENT_ENCODED.items():
        text = text.replace(escape, character).replace(escape.lower(), character)
    try:
        encoded = text.encode("ascii").translate(URLSAFE_TO_STANDARD, b" \t\r\n\f\v").rstrip(b"=")
        return base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
    except ValueError:  # including binascii.Error and UnicodeEncodeError
        raise ApiError(422, f"{name}: the text is not base64; send the file in base64", param=param) from None


def caption_to_dict(caption: Caption, image: Image.Image) -> dict[str, Any]:
    """Convert a caption to the fields of `RegionResult`."""
    record_fields = caption_to_record("", image, caption)
    return {name: record_fields[name] for name in RegionResult.model_fields if name in record_fields}


def match_to_dict(match: Caption, image: Image.Image) -> dict[str, Any]:
    """Convert a match of a text to the fields of `MatchResult`."""
    record_fields = caption_to_record("", image, match)
    return {name: record_fields[name] for name in MatchResult.model_fields if name in record_fields}


def _estimate_event_bytes(event: RequestEvent) -> int:
    """Estimate the memory of an event in bytes."""
    mask = event.mask if isinstance(event, Caption) else None
    return EVENT_BYTES + (0 if mask is None else len(mask["counts"]))


def _limit_default_options(captioner: Captioner, generation: Mapping[str, Any]) -> dict[str, int]:
    """Return the limits of the server for options whose defaults in the captioner exceed them."""
    options = {**getattr(captioner, "generation", DEFAULT_GENERATION), **generation}
    limits = {"num_beams": MAX_BEAMS, "max_new_tokens": MAX_NEW_TOKENS, "num_captions": MAX_BEAMS}
    return {name: limit for name, limit in limits.items() if options.get(name, 1) > limit}


def _read_checked_prompts(
    prompt_inputs: list[RegionPrompt], size: tuple[int, int], location_format: str
) -> list[Prompt]:
    return [
        parse_prompt(prompt.model_dump(exclude_none=True), location_format.format(index), *size)
        for index, prompt in enumerate(prompt_inputs)
    ]
