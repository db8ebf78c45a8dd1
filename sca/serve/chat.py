"""The chat route, for clients of the OpenAI API: the image and the region of the last message, captioned.

https://platform.openai.com/docs/api-reference/chat. A region is what `box`, `points` and `mask` say, which the client
of OpenAI's package gives as `extra_body`, or what stands in the message's text as `sca caption --region` writes it,
such as `box=10,20,200,180`; without, it is the whole image.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from anyio import to_thread
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.sse import format_sse_event
from pydantic import BaseModel, ConfigDict, Field, StrictBool
from sca_registry.contracts import Prompt

from sca.prompts import parse_region
from sca.serve.problems import ApiError
from sca.serve.schema import MAX_BEAMS, MAX_NEW_TOKENS, Asked, PromptIn, add_schema
from sca.serve.service import EVENT_STREAM, PROBLEMS, Service, count_masks, decoded, plain

MAX_TEXT = 2**14  # characters of a message that may contain a region
REGION = re.compile(r"(?:box|point)=[-+.,\d]*\d(?:;(?:box|point)=[-+.,\d]*\d)*")


class ImageUrl(BaseModel):
    url: Annotated[str, Field(description="a data: URL")]


class Piece(BaseModel):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Piece]


class Chat(PromptIn):
    """Fields of the API that say nothing of captions are left alone."""

    model_config = ConfigDict(extra="ignore")

    model: str = ""
    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    task: Literal["caption", "recognition"] = "caption"
    n: Annotated[int | None, Field(ge=1, le=MAX_BEAMS, description="captions")] = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2, description="0 or none: the likeliest words")] = None
    stream: StrictBool | None = False

    def asked(self) -> Asked:
        words = self.max_completion_tokens or self.max_tokens
        fields = {
            "captions": self.n,
            "task": self.task,
            "max_new_tokens": min(words, MAX_NEW_TOKENS) if words else None,
        }
        if self.temperature:
            fields |= {"sample": True, "temperature": max(self.temperature, 0.01)}
        region = PromptIn(box=self.box, points=self.points, mask=self.mask)
        if not region.model_dump(exclude_none=True):
            region = self._parse_text()
        return Asked(**{name: value for name, value in fields.items() if value is not None}, prompts=[region])

    def image(self) -> str:
        """The URL of the last image."""
        urls = [piece.image_url.url for piece in self._pieces() if piece.image_url]
        if not urls:
            raise ApiError(422, "no message has an image: send one as {'type': 'image_url', 'image_url': {'url': ...}}")
        return urls[-1]

    def _parse_text(self) -> PromptIn:
        """Parse the region in the text of the last message; without one, the prompt is empty.

        Raises:
            ApiError: If the text is too long to be searched.
            PromptError: If the region is not written correctly.
        """
        last = self.messages[-1].content
        text = last if isinstance(last, str) else " ".join(piece.text or "" for piece in last)
        if len(text) > MAX_TEXT:
            raise ApiError(
                413,
                f"the last message has {len(text):,} characters, and {MAX_TEXT:,} are allowed where its text may "
                "contain the region; give the region as box, points or mask",
            )
        found = REGION.search(text)
        if not found:
            return PromptIn()
        prompt = parse_region(found[0])
        return PromptIn(box=prompt.box, points=list(prompt.points) or None)

    def _pieces(self) -> list[Piece]:
        return [piece for message in self.messages if not isinstance(message.content, str) for piece in message.content]


def add_chat(app: FastAPI, service: Service) -> None:
    """The routes `/v1/models` and `/v1/chat/completions`."""

    @app.get("/v1/models", summary="The model that answers")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": service.name, "object": "model", "created": 0, "owned_by": "sca"}]}

    body = {"required": True, "content": {"application/json": {"schema": add_schema(app, Chat)}}}

    @app.post(
        "/v1/chat/completions",
        responses=PROBLEMS,
        openapi_extra={"requestBody": body},
        summary="One region, as chat clients ask",
    )
    async def chat(request: Request) -> Response:
        asked = await service.parse(request, Chat)
        if asked.model not in ("", service.name):
            raise ApiError(404, f"no model {asked.model!r} here: there is {service.name!r}")
        region = asked.asked()
        service.check(region)
        image = await service.image(request, await to_thread.run_sync(decoded, asked.image()), count_masks(region))
        whole = (
            None
            if region.prompts[0].model_dump(exclude_none=True)
            else [Prompt(box=(0.0, 0.0, *map(float, image.size)))]
        )
        question = await service.question(request, region, image, whole)
        captions = await service.captions(request, question)
        if not captions:
            return Response(status_code=499)  # to nobody: the client has left
        (caption,) = captions
        texts = [caption.text, *(text for text, _ in caption.others)]
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
        if asked.stream:
            return StreamingResponse(_chunks(head, texts), media_type=EVENT_STREAM)
        choices = [
            {"index": number, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            for number, text in enumerate(texts)
        ]
        told = {**head, "object": "chat.completion", "choices": choices, "region": plain(caption, image)}
        return JSONResponse(told)


async def _chunks(head: dict[str, Any], texts: list[str]) -> AsyncIterator[bytes]:
    for number, text in enumerate(texts):
        for delta, end in (({"role": "assistant", "content": text}, None), ({}, "stop")):
            choice = {"index": number, "delta": delta, "finish_reason": end}
            chunk = {**head, "object": "chat.completion.chunk", "choices": [choice]}
            yield format_sse_event(data_str=json.dumps(chunk))
    yield format_sse_event(data_str="[DONE]")
