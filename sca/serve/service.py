"""What the routes share."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from anyio import to_thread
from fastapi import Request
from PIL import Image
from sca_registry.contracts import Caption, Prompt

from sca.captioners.door import settings
from sca.images import read_image
from sca.output.jsonl import record
from sca.prompts import read_prompt
from sca.serve.engine import Done, Engine, EngineError, Event, LateError, Question
from sca.serve.metrics import Metrics
from sca.serve.problems import ApiError
from sca.serve.schema import Asked, EverythingIn, Limits, Problem, PromptIn, RegionOut

POLL = 0.5  # seconds between two looks at whether a client is still there
SMALL = 64 * 2**20  # pixels of masks that a request may always have
EVENT_STREAM = "text/event-stream"

_PROBLEMS = {
    400: "not what a request looks like",
    408: "the request came too slowly",
    413: "too large",
    415: "neither JSON nor multipart/form-data",
    422: "something that cannot be done, and why",
    503: "too many wait, or there is no memory; Retry-After says when to come again",
    504: "no answer in time",
}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": description} for status, description in _PROBLEMS.items()
}


class Service:
    """What the routes share: the engine, what the model is called, the limits, and the counters."""

    def __init__(self, engine: Engine, name: str, limits: Limits):
        self.engine, self.name, self.limits = engine, name, limits
        self.metrics = Metrics(engine)

    async def image(self, content: bytes) -> Image.Image:
        """ImageError for what is no picture, or has too many pixels."""
        return await to_thread.run_sync(read_image, io.BytesIO(content), "the image", self.limits.pixels)

    async def question(self, asked: Asked, image: Image.Image, prompts: Sequence[Prompt] | None = None) -> Question:
        """What the engine is asked; `prompts` instead of those in `asked`. ApiError and PromptError for what does not
        fit.
        """
        if bool(asked.prompts) == bool(asked.everything):
            what = "both prompts and everything" if asked.prompts else "neither prompts nor everything"
            raise ApiError(422, f"{what}: give prompts, or everything=true to have the regions found")
        if len(asked.prompts) > self.limits.prompts:
            raise ApiError(413, f"{len(asked.prompts):,} prompts, and {self.limits.prompts:,} are allowed")
        if asked.temperature is not None and not asked.sample:
            raise ApiError(422, "temperature can only be used with sample=true")
        with_masks = sum(prompt.mask is not None for prompt in asked.prompts)
        if with_masks * image.width * image.height > max(SMALL, 10 * self.limits.pixels):
            raise ApiError(413, f"{with_masks} masks of {image.width} x {image.height} are too many: ask in pieces")
        captioner = self.engine.captioner
        generation = settings(
            captioner,
            beams=asked.beams,
            words=asked.max_new_tokens,
            captions=asked.captions,
            sample=asked.sample,
            temperature=asked.temperature,
        )
        everything = None
        if asked.everything:
            if not self.engine.finds:
                raise ApiError(422, "this model finds no regions by itself: give prompts")
            given = asked.everything if isinstance(asked.everything, EverythingIn) else EverythingIn()
            everything = replace(captioner.everything, **given.model_dump(exclude_none=True))
        elif prompts is None:
            prompts = await to_thread.run_sync(_prompts, asked.prompts, image.size)
        return Question(
            image,
            prompts or (),
            everything,
            asked.task,
            generation,
            masks=asked.masks,
            seconds=self.limits.seconds,
        )

    async def events(self, request: Request, question: Question) -> AsyncIterator[Event | None]:
        """What the engine tells, and None every `POLL` seconds without news. An EngineError is raised.

        Whoever leaves, or has no more time, is not computed for.
        """
        told: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + question.seconds
        ticket = await to_thread.run_sync(
            self.engine.ask, question, lambda event: loop.call_soon_threadsafe(told.put_nowait, event)
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
                    event = await asyncio.wait_for(told.get(), min(POLL, deadline - now))
                except TimeoutError:
                    yield None
                    continue
                if isinstance(event, EngineError):
                    raise event
                yield event
                if isinstance(event, Done):
                    return
        finally:
            ticket.cancel()

    async def captions(self, request: Request, question: Question) -> list[Caption]:
        """All of them at once, in order; none if the client has left."""
        return [event async for event in self.events(request, question) if isinstance(event, Caption)]


def decoded(text: str) -> bytes:
    """The bytes in base64 text or a data: URL; ApiError if there are none."""
    if text.startswith(("http://", "https://")):
        raise ApiError(422, "image: pictures are not fetched from elsewhere; send the file in base64")
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            raise ApiError(422, "image: a data: URL in base64, like data:image/png;base64,...")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(422, "image: not base64") from None


def plain(caption: Caption, image: Image.Image) -> dict[str, Any]:
    told = record("", image, caption)
    return {name: told[name] for name in RegionOut.model_fields if name in told}


def _prompts(asked: list[PromptIn], size: tuple[int, int]) -> list[Any]:
    return [
        read_prompt(prompt.model_dump(exclude_none=True), f"prompts.{place}", *size)
        for place, prompt in enumerate(asked)
    ]
