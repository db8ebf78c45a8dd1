"""What the routes share."""

from __future__ import annotations

import asyncio
import base64
import io
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from anyio import to_thread
from fastapi import Request
from PIL import Image
from pydantic import BaseModel
from sca_registry.contracts import Caption, Captioner, Prompt
from sca_registry.spec import GENERATION

from sca.inference.automatic import settle_search
from sca.inference.generation import settle_generation
from sca.io.images import decode_image, inspect_image
from sca.io.prompts import read_prompt
from sca.output.jsonl import record
from sca.serve.memory import BudgetError, ByteBudget
from sca.serve.metrics import Metrics
from sca.serve.problems import ApiError
from sca.serve.scheduler import RequestScheduler
from sca.serve.schema import (
    MAX_BEAMS,
    MAX_CROPS,
    MAX_GRID,
    MAX_NEW_TOKENS,
    Asked,
    EverythingIn,
    Limits,
    Problem,
    PromptIn,
    RegionOut,
)
from sca.serve.tickets import Done, Event, LateError, NoRoomError, Question, SchedulerError

Parsed = TypeVar("Parsed", bound=BaseModel)
POLL = 0.5  # seconds between two looks at whether a client is still there
SMALL = 64 * 2**20  # pixels of masks that a request may always have
JSON = "application/json"
EVENT_STREAM = "text/event-stream"
DECODING, DECODED = 13, 4  # bytes of a pixel while an image is decoded, with transparency and a turn, and afterwards
MAX_HEAD = 1000  # characters of a data: URL before its comma
SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*):")
STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")  # from the one for URLs
PERCENT_ENCODED = {"%2B": "+", "%2F": "/", "%3D": "=", "%0A": "", "%0D": "", "%20": ""}
WORDS = 1000  # bytes of a caption or another event without its mask, about

_PROBLEMS = {
    400: "not what a request looks like",
    401: "no valid API key, where one is needed",
    403: "a host that is not served",
    408: "the request came too slowly",
    413: "too large",
    415: "neither JSON nor multipart/form-data",
    422: "something that cannot be done, and why",
    503: "too many wait, there is no memory, or the server ends; Retry-After says when to come again",
    504: "no answer in time",
}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": description} for status, description in _PROBLEMS.items()
}


class Service:
    """What the routes share: the scheduler, what the model is called, the limits, and the counters."""

    def __init__(self, scheduler: RequestScheduler, name: str, limits: Limits):
        self.scheduler, self.name, self.limits = scheduler, name, limits
        self.metrics = Metrics(scheduler)
        self.budget = ByteBudget(limits.memory)
        self._small = ThreadPoolExecutor(2, thread_name_prefix="sca-decode")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="sca-decode-large")
        # A thread of those two may wait for memory, so whoever holds memory must never need one of them.
        self._masks = ThreadPoolExecutor(1, thread_name_prefix="sca-masks")

    def close(self) -> None:
        self.scheduler.close()
        for pool in (self._small, self._large, self._masks):
            pool.shutdown(wait=False, cancel_futures=True)

    def deadline(self, request: Request) -> float:
        """When a request that is there must be answered, by the clock of the loop; it starts with the first call."""
        if not hasattr(request.state, "deadline"):
            request.state.deadline = asyncio.get_running_loop().time() + self.limits.timeout
        return request.state.deadline

    async def parse(self, request: Request, model: type[Parsed]) -> Parsed:
        """The JSON body of a request as `model`."""
        if content_type(request) != JSON:
            raise ApiError(415, f"{content_type(request) or 'no content type'}: send {JSON}")
        content = bytearray()
        async for piece in request.stream():
            content += piece
        self.deadline(request)
        return await to_thread.run_sync(self.parsed, content, model)

    def parsed(self, content: bytes | bytearray | str, model: type[Parsed]) -> Parsed:
        """ApiError for more values than are allowed, which take much more memory than their text."""
        separators = ",[{" if isinstance(content, str) else (b",", b"[", b"{")
        if sum(content.count(each) for each in separators) > self.limits.max_json_values:
            raise ApiError(413, f"the request has more than the {self.limits.max_json_values:,} values that are allowed")
        return model.model_validate_json(content)

    async def image(self, request: Request, content: bytes, masks: int = 0) -> Image.Image:
        """Decode the image of a request, once there is memory for it and for so many masks of its size.

        InputError for what is no picture, or has too many pixels.
        """
        opened = await to_thread.run_sync(inspect_image, io.BytesIO(content), "the image", self.limits.max_pixels)
        pixels = opened.width * opened.height
        if masks * pixels > max(SMALL, 10 * self.limits.max_pixels):
            raise ApiError(413, f"{masks} masks of {opened.width} x {opened.height} are too many: ask in pieces")
        lease = request.state.lease
        deadline = self.deadline(request)
        late = time.monotonic() + deadline - asyncio.get_running_loop().time()

        needed = len(content) + (DECODING + masks) * pixels

        def decode() -> Image.Image:
            lease.set(needed, late - time.monotonic())
            if lease.ended:
                raise BudgetError("the request has ended")
            image = decode_image(opened, "the image")
            lease.set((DECODED + masks) * pixels)
            return image

        pool = self._small if self.budget.is_small(needed) else self._large  # what is large waits for what is large
        return await self._in_thread(pool, deadline, decode)

    async def _in_thread(self, pool: Executor, deadline: float, work: Callable[[], Any]) -> Any:
        """What `work` returns, from a thread of a pool. LateError after the deadline."""
        try:
            async with asyncio.timeout_at(deadline):
                return await asyncio.get_running_loop().run_in_executor(pool, work)
        except TimeoutError:
            raise LateError(f"no answer in {self.limits.timeout:g} s: ask for less, or later") from None

    def check(self, asked: Asked) -> None:
        """ApiError for what is asked of no image, or of any image too much."""
        if bool(asked.prompts) == bool(asked.everything):
            what = "both prompts and everything" if asked.prompts else "neither prompts nor everything"
            raise ApiError(422, f"{what}: give prompts, or everything=true to have the regions found")
        if len(asked.prompts) > self.limits.max_prompts:
            raise ApiError(413, f"{len(asked.prompts):,} prompts, and {self.limits.max_prompts:,} are allowed")
        points = [len(prompt.points) for prompt in asked.prompts if isinstance(prompt.points, list)]
        if points and max(points) > self.limits.max_points:
            raise ApiError(413, f"a prompt of {max(points):,} points, and {self.limits.max_points:,} are allowed")
        if sum(points) > self.limits.max_points_per_request:
            raise ApiError(413, f"{sum(points):,} points, and {self.limits.max_points_per_request:,} are allowed in all prompts")
        for name in ("temperature", "top_p"):
            if getattr(asked, name) is not None and not asked.do_sample:
                raise ApiError(422, f"{name} can only be used with sample=true", param=name)
        if asked.everything and not self.scheduler.finds:
            raise ApiError(422, "this model finds no regions by itself: give prompts")

    async def question(
        self,
        request: Request,
        asked: Asked,
        image: Image.Image,
        prompts: Sequence[Prompt] | None = None,
        where: str = "prompts.{}",
    ) -> Question:
        """Make the question for the scheduler.

        Args:
            request: The request, which has a deadline.
            asked: What the client sent.
            image: The image.
            prompts: Checked prompts that replace those in `asked`.
            where: Name of a prompt in errors, with its position for `{}`.

        Raises:
            ApiError: If there is no time for the masks, or an option of generation cannot be used.
            InputError: If a prompt does not fit the image.
        """
        captioner = self.scheduler.captioner
        try:
            generation = settle_generation(
                captioner,
                num_beams=asked.num_beams,
                max_new_tokens=asked.max_new_tokens,
                num_captions=asked.num_captions,
                do_sample=asked.do_sample,
                temperature=asked.temperature,
                top_p=asked.top_p,
                seed=asked.seed,
            )
        except ValueError as error:
            raise ApiError(422, str(error)) from error
        generation |= _limit_defaults(captioner, generation)
        everything = max_regions = None
        if asked.everything:
            given = asked.everything if isinstance(asked.everything, EverythingIn) else EverythingIn()
            max_regions = given.max_regions
            search = settle_search(captioner, given.model_dump(exclude={"max_regions"}))
            everything = replace(search, points=min(search.points_per_side, MAX_GRID), crops=min(search.crop_n_layers, MAX_CROPS))
        elif prompts is None:
            if count_masks(asked):
                work = partial(_prompts, asked.prompts, image.size, where)
                prompts = await self._in_thread(self._masks, self.deadline(request), work)
            else:
                prompts = await to_thread.run_sync(_prompts, asked.prompts, image.size, where)
        return Question(
            image,
            prompts or (),
            everything,
            asked.task,
            generation,
            masks=asked.masks,
            seconds=self.limits.timeout,
            client=getattr(request.state, "client", None) or (request.client.host if request.client else ""),
            max_regions=max_regions,
        )

    async def events(self, request: Request, question: Question) -> AsyncIterator[Event | None]:
        """Yield the events of a question, and None every `POLL` seconds without one.

        Whoever leaves, or has no more time, is not computed for. An event is part of the request's memory until it is
        yielded, so that a client that reads slowly cannot pile up masks.

        Raises:
            SchedulerError: If the question cannot be answered, in time and within the memory.
        """
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop, deadline, lease = asyncio.get_running_loop(), self.deadline(request), request.state.lease

        def queue_event(event: Event) -> None:
            try:
                lease.add(_size(event))
            except BudgetError as error:
                event = NoRoomError(str(error))
            events.put_nowait(event)

        ticket = await to_thread.run_sync(
            self.scheduler.ask, question, lambda event: loop.call_soon_threadsafe(queue_event, event)
        )
        try:
            look = loop.time()
            while True:
                now = loop.time()
                if now > deadline:
                    raise LateError(f"no answer in {question.seconds:g} s: ask for less, or later")
                if now > look:
                    look = now + POLL
                    if await request.is_disconnected():
                        return
                try:
                    event = await asyncio.wait_for(events.get(), min(POLL, deadline - now))
                except TimeoutError:
                    yield None
                    continue
                if isinstance(event, SchedulerError):
                    raise event
                lease.add(-_size(event))
                yield event
                if isinstance(event, Done):
                    return
        finally:
            ticket.cancel()

    async def captions(self, request: Request, question: Question) -> list[Caption]:
        """All of them at once, in order; none if the client has left."""
        found = []
        async for event in self.events(request, question):
            if isinstance(event, Caption):
                found.append(event)
                request.state.lease.add(_size(event))
        return found


def content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def count_masks(asked: Asked) -> int:
    return sum(prompt.mask is not None for prompt in asked.prompts)


def decode_base64(text: str, name: str = "image", param: str = "image") -> bytes:
    """Decode base64 text or a data: URL as clients write them: in either alphabet, with or without padding, line
    breaks and percent-encoding, and with "data:" in any case.

    Args:
        text: The text or URL.
        name: Field that contains it, for the messages of errors.
        param: Field of the request that contains it, for the `param` of errors.

    Raises:
        ApiError: If the text is another URL or not base64.
    """
    head, comma, _ = text[:MAX_HEAD].partition(",")
    scheme = SCHEME.match(head)
    if scheme and scheme[1].lower() != "data":
        raise ApiError(422, f"{name}: pictures are not fetched from elsewhere; send the file in base64", param=param)
    if scheme:
        if not comma or not head.rstrip().lower().endswith(";base64"):
            raise ApiError(422, f"{name}: a data: URL in base64, like data:image/png;base64,...", param=param)
        text = text[len(head) + 1 :]
    for code, sign in PERCENT_ENCODED.items():
        text = text.replace(code, sign).replace(code.lower(), sign)
    try:
        content = text.encode("ascii").translate(STANDARD_ALPHABET, b" \t\r\n\f\v").rstrip(b"=")
        return base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)
    except ValueError:  # binascii.Error and UnicodeEncodeError are kinds of it
        raise ApiError(422, f"{name}: not base64", param=param) from None


def plain(caption: Caption, image: Image.Image) -> dict[str, Any]:
    told = record("", image, caption)
    return {name: told[name] for name in RegionOut.model_fields if name in told}


def _size(event: Event) -> int:
    """Estimate the bytes of an event."""
    mask = event.mask if isinstance(event, Caption) else None
    return WORDS + (0 if mask is None else len(mask["counts"]))


def _limit_defaults(captioner: Captioner, generation: Mapping[str, Any]) -> dict[str, int]:
    """Return the server's limits for the settings whose defaults in the captioner exceed them."""
    settled = {**getattr(captioner, "generation", GENERATION), **generation}
    limits = {"beams": MAX_BEAMS, "max_new_tokens": MAX_NEW_TOKENS, "captions": MAX_BEAMS}
    return {name: limit for name, limit in limits.items() if settled.get(name, 1) > limit}


def _prompts(asked: list[PromptIn], size: tuple[int, int], where: str) -> list[Any]:
    return [
        read_prompt(prompt.model_dump(exclude_none=True), where.format(place), *size)
        for place, prompt in enumerate(asked)
    ]
