"""The chat route, for clients of the OpenAI API: one region of an image, captioned.

https://platform.openai.com/docs/api-reference/chat. The region comes from the fields `box`,
`points` and `mask` (pass them as `extra_body` in the OpenAI client) or from the text of the user messages (see
`sca.serve.text_region`); without either it is the whole image. A field that cannot be honored is refused by its name.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from anyio import to_thread
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.sse import format_sse_event
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt
from sca_registry.contracts import Caption, Prompt

from sca.serve.conversation import Message, check_parts, find_image, find_text_region, split_turns
from sca.serve.problems import ApiError
from sca.serve.schema import MAX_BEAMS, MAX_NEW_TOKENS, MAX_SEED, MIN_SEED, Asked, Problem, PromptIn, add_schema
from sca.serve.service import EVENT_STREAM, PROBLEMS, Service, count_masks, decode_base64, plain

MAX_STOPS, MAX_STOP_LENGTH = 4, 256  # texts that end a caption, and characters of each
WITHOUT_EFFECT = {  # fields that do not affect the response
    *("metadata", "user", "safety_identifier", "service_tier", "parallel_tool_calls", "prediction"),
    *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
}
NEUTRAL: dict[str, tuple[Any, ...]] = {  # values with which a field that cannot be honored asks for nothing
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"], []),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "store": (False,),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
}
NO_MODEL: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "no such model"}}
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class StreamOptions(BaseModel):
    include_usage: StrictBool | None = False


class Chat(PromptIn):
    """A request of the chat route; fields that do not affect the response are ignored."""

    model_config = ConfigDict(extra="allow")

    model: str = ""
    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    task: Literal["caption", "recognition"] = "caption"
    n: Annotated[StrictInt | None, Field(ge=1, le=MAX_BEAMS, description="captions")] = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2, description="0 or none: the likeliest words")] = None
    top_p: Annotated[
        float | None,
        Field(
            ge=0,
            le=1,
            description="Nucleus sampling; a value below 1 without temperature implies temperature 1.",
        ),
    ] = None
    seed: Annotated[StrictInt | None, Field(ge=MIN_SEED, le=MAX_SEED)] = None
    stop: Annotated[Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None, Field()] = None
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None

    def check(self, generation_options: Collection[str] | None = None) -> None:
        """Refuse what cannot be honored.

        Args:
            generation_options: Options of generation that the captioner takes; None if it does not say.

        Raises:
            ApiError: For a field that cannot be honored, by its name.
        """
        for name, value in (self.model_extra or {}).items():
            if value is not None and name not in WITHOUT_EFFECT and not _is_neutral(value, NEUTRAL.get(name, ())):
                raise ApiError(
                    422,
                    f"the field {name[:40]!r} is not supported; leave it out",
                    "unsupported_parameter",
                    name[:40],
                )
        generation = self._generation()
        for name, option in (("n", "captions"), ("top_p", "top_p"), ("temperature", "temperature")):
            if generation_options is not None and option in generation and option not in generation_options:
                raise ApiError(
                    422,
                    f"the field {name!r} is not supported by this model; leave it out",
                    "unsupported_parameter",
                    name,
                )
        if self.stream_options is not None and not self.stream:
            raise ApiError(422, "stream_options can only be used with stream=true", param="stream_options")

    def question(self) -> tuple[str, Asked]:
        """The URL of the image, and what is asked of it; an empty prompt is the whole image.

        Raises:
            ApiError: For what the messages contain and cannot be answered.
            InputError: If the region in the text cannot be read.
        """
        turns = split_turns(self.messages)
        check_parts(turns)
        url = find_image(turns)
        prompt = PromptIn(box=self.box, points=self.points, mask=self.mask)
        if not prompt.model_dump(exclude_none=True):
            prompt = find_text_region(turns, url)
        return url, Asked(**self._generation(), task=self.task, prompts=[prompt])

    def _generation(self) -> dict[str, Any]:
        tokens = self.max_completion_tokens or self.max_tokens
        fields: dict[str, Any] = {
            "captions": self.n if self.num_choices > 1 else None,
            "max_new_tokens": min(tokens, MAX_NEW_TOKENS) if tokens else None,
            "seed": self.seed,
        }
        temperature, top_p = self.temperature, self.top_p
        if temperature is None and top_p is not None and top_p < 1:
            temperature = 1.0
        if temperature:
            fields |= {"sample": True, "temperature": max(temperature, 0.01), "top_p": top_p}
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Choice(NamedTuple):
    text: str
    finish_reason: Literal["stop", "length"]


def add_chat(app: FastAPI, service: Service) -> None:
    """The routes `/v1/models` and `/v1/chat/completions`."""
    card = {"id": service.name, "object": "model", "created": 0, "owned_by": "sca"}

    def check_name(name: str) -> None:
        if name != service.name:
            message = f"no model {name[:100]!r} here: there is {service.name!r}"
            raise ApiError(404, message, "model_not_found", "model")

    @app.get("/v1/models", summary="The model that answers")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}", summary="The model that answers, by its name", responses=NO_MODEL)
    async def model(name: str) -> dict[str, Any]:
        check_name(name)
        return card

    body = {"required": True, "content": {"application/json": {"schema": add_schema(app, Chat)}}}

    @app.post(
        "/v1/chat/completions",
        responses=PROBLEMS | NO_MODEL,
        openapi_extra={"requestBody": body},
        summary="One region, as chat clients ask",
    )
    async def chat(request: Request) -> Response:
        asked = await service.parse(request, Chat)
        if asked.model:
            check_name(asked.model)
        asked.check(getattr(service.scheduler.captioner, "generation_options", None))
        url, region = await to_thread.run_sync(asked.question)
        service.check(region)
        content = await to_thread.run_sync(decode_base64, url, "image_url", "messages")
        image = await service.image(request, content, count_masks(region))
        del url, content
        whole = (
            None
            if region.prompts[0].model_dump(exclude_none=True)
            else [Prompt(box=(0.0, 0.0, *map(float, image.size)))]
        )
        question = await service.question(request, region, image, whole, "the region")
        captions = await service.captions(request, question)
        if not captions:
            return Response(status_code=499)  # to nobody: the client has left
        (caption,) = captions
        choices, usage = make_choices(caption, asked.num_choices, asked.stops), count_usage(caption, asked.num_choices)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
        if asked.stream:
            has_usage = asked.stream_options is not None and asked.stream_options.include_usage
            return StreamingResponse(_chunks(head, choices, usage if has_usage else None), media_type=EVENT_STREAM)
        told = {
            **head,
            "object": "chat.completion",
            "choices": [
                {
                    "index": number,
                    "message": {"role": "assistant", "content": choice.text},
                    "logprobs": None,
                    "finish_reason": choice.finish_reason,
                }
                for number, choice in enumerate(choices)
            ],
            "usage": usage,
            "region": plain(caption, image),
        }
        return JSONResponse(told)


def make_choices(caption: Caption, count: int, stops: Sequence[str]) -> list[Choice]:
    """Make the choices of an answer: the captions, best first, each up to the first of the texts that stop it.

    Args:
        caption: The caption of the region, with its others.
        count: Number of choices.
        stops: Texts before which a caption ends.
    """
    texts = [caption.text, *(text for text, _ in caption.alternatives)]
    cuts = caption.usage.is_truncated if caption.usage else (False,) * len(texts)
    choices = []
    for text, is_cut in list(zip(texts, cuts, strict=True))[:count]:
        places = [place for stop in stops if (place := text.find(stop)) >= 0]
        if places:
            choices.append(Choice(text[: min(places)], "stop"))
        else:
            choices.append(Choice(text, "length" if is_cut else "stop"))
    return choices


def count_usage(caption: Caption, count: int) -> dict[str, int]:
    """Count the tokens that the language model read for a region and wrote for its choices; 0 without one."""
    prompt = caption.usage.prompt_tokens if caption.usage else 0
    completion = sum(caption.usage.completion_tokens[:count]) if caption.usage else 0
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _is_neutral(value: Any, neutral: Sequence[Any]) -> bool:
    """Whether a value is one of those that ask for nothing; true and 1 are not the same."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral)


def _chunks(head: dict[str, Any], choices: Sequence[Choice], usage: dict[str, int] | None) -> Iterator[bytes]:
    """The events of a streamed answer. usage: sent in a chunk of its own at the end; None if it is not wanted."""
    head = {**head, "object": "chat.completion.chunk"}
    empty = {} if usage is None else {"usage": None}
    for number, (text, finish_reason) in enumerate(choices):
        for delta, end in (({"role": "assistant", "content": text}, None), ({}, finish_reason)):
            choice = {"index": number, "delta": delta, "logprobs": None, "finish_reason": end}
            yield format_sse_event(data_str=json.dumps({**head, "choices": [choice], **empty}))
    if usage is not None:
        yield format_sse_event(data_str=json.dumps({**head, "choices": [], "usage": usage}))
    yield format_sse_event(data_str="[DONE]")
