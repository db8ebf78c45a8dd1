"""Routes compatible with the chat completions of the OpenAI API: caption one region of an image.

See https://platform.openai.com/docs/api-reference/chat. The region is read from the fields `box`, `points` and `mask`
(`extra_body` in the OpenAI client), else from the text of the user messages (see `sca.serve.region_parser`). Without
either, it is the entire image. The other text of the last turn is a question about the region, if the model answers
questions. Unsupported fields are rejected by name.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from anyio import to_thread
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.sse import format_sse_event
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt
from sca_registry.contracts import Caption, Prompt

from sca.inference.generation_options import CAPTION_OPTIONS
from sca.serve.chat_messages import (
    ChatMessage,
    check_message_parts,
    find_image_url,
    find_question,
    find_text_region,
    split_turns,
)
from sca.serve.errors import ApiError
from sca.serve.limits import MAX_BEAMS, MAX_NEW_TOKENS, MAX_SEED, MAX_TASK_LENGTH, MAX_TEXT_LENGTH, MIN_SEED
from sca.serve.schema import CaptionRequest, ErrorResponse, RegionPrompt, add_body_schema
from sca.serve.service import (
    ERROR_RESPONSES,
    EVENT_STREAM_MEDIA_TYPE,
    CaptionService,
    caption_to_dict,
    count_mask_prompts,
    decode_base64,
)

MAX_STOP_SEQUENCES, MAX_STOP_LENGTH = 4, 256  # stop sequences, and characters per stop sequence
IGNORED_FIELDS = {  # fields that do not affect the response
    *("metadata", "user", "safety_identifier", "service_tier", "parallel_tool_calls", "prediction"),
    *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
}
# values of unsupported fields that have no effect, and are therefore accepted
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
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
MODEL_NOT_FOUND_RESPONSE: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorResponse, "description": "Unknown model."}
}
StopSequence = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class StreamOptions(BaseModel):
    """Options of a streamed response."""

    include_usage: Annotated[
        StrictBool | None, Field(description="Send a last chunk with the token usage of the request.")
    ] = False


class ChatRequest(RegionPrompt):
    """Request of the chat route.

    The region is set by `box`, `points` and `mask`, in image pixels, or in the text of the user messages. Fields of
    the OpenAI API that do not affect the response are ignored.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow")

    model: Annotated[str, Field(description="Name of the model; empty for the model of the server.")] = ""
    messages: Annotated[
        list[ChatMessage],
        Field(min_length=1, max_length=1000, description="Conversation; the last image and its region are captioned."),
    ]
    task: Annotated[
        str,
        Field(
            max_length=MAX_TASK_LENGTH,
            description="Generate a caption (`caption`) or a class name (`recognition`), or another task of the model.",
        ),
    ] = "caption"
    n: Annotated[StrictInt | None, Field(ge=1, le=MAX_BEAMS, description="Number of captions, best first.")] = None
    max_tokens: Annotated[
        int | None, Field(ge=1, description="Maximum number of tokens per caption; see `max_completion_tokens`.")
    ] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1, description="Maximum number of tokens per caption.")] = (
        None
    )
    temperature: Annotated[
        float | None,
        Field(ge=0, le=2, description="Sampling temperature; 0 or null chooses the likeliest tokens."),
    ] = None
    top_p: Annotated[
        float | None,
        Field(
            ge=0,
            le=1,
            description="Nucleus sampling; a value below 1 without temperature implies temperature 1.",
        ),
    ] = None
    seed: Annotated[StrictInt | None, Field(ge=MIN_SEED, le=MAX_SEED, description="Random seed for sampling.")] = None
    stop: Annotated[
        StopSequence | Annotated[list[StopSequence], Field(max_length=MAX_STOP_SEQUENCES)] | None,
        Field(description="Stop sequence, or several; a caption ends before the first one that it contains."),
    ] = None
    stream: Annotated[StrictBool | None, Field(description="Send the response as server-sent events.")] = False
    stream_options: Annotated[
        StreamOptions | None, Field(description="Options of a streamed response; requires `stream`.")
    ] = None

    def check_supported(self, generation_options: Collection[str]) -> None:
        """Reject unsupported fields.

        Args:
            generation_options: Generation options that the captioner supports.

        Raises:
            ApiError: A field is not supported; the message contains its name.
        """
        for name, value in (self.model_extra or {}).items():
            if (
                value is not None
                and name not in IGNORED_FIELDS
                and not _is_neutral(value, NEUTRAL_VALUES.get(name, ()))
            ):
                raise ApiError(
                    422,
                    f"the field {name[:40]!r} is not supported; remove it",
                    "unsupported_parameter",
                    name[:40],
                )
        generation_fields = self._collect_generation_options()
        for name, option in (("n", "num_captions"), ("top_p", "top_p"), ("temperature", "temperature")):
            if option in generation_fields and option not in generation_options:
                raise ApiError(
                    422,
                    f"the field {name!r} is not supported by this model; remove it",
                    "unsupported_parameter",
                    name,
                )
        if self.stream_options is not None and not self.stream:
            raise ApiError(422, "stream_options can only be used with stream=true", param="stream_options")

    def to_caption_request(self, supports_questions: bool = False) -> tuple[str, CaptionRequest]:
        """Convert the messages to a caption request.

        Args:
            supports_questions: Whether the model supports questions. If true, the text of the last turn is a question
                about the region.

        Returns:
            The URL of the image, and the request with one prompt; an empty prompt means the entire image.

        Raises:
            ApiError: The messages contain no image, several images, or unsupported content.
            InputError: The region in the text cannot be read.
        """
        turns = split_turns(self.messages)
        check_message_parts(turns)
        url = find_image_url(turns)
        prompt = RegionPrompt(box=self.box, points=self.points, mask=self.mask)
        has_text_region = not prompt.model_dump(exclude_none=True)
        if has_text_region:
            prompt = find_text_region(turns, url)
        question = find_question(turns, has_text_region) if supports_questions else None
        if question and len(question) > MAX_TEXT_LENGTH:
            raise ApiError(
                422,
                f"the question has {len(question):,} characters; shorten it to {MAX_TEXT_LENGTH:,}",
                param="messages",
            )
        options = {**self._collect_generation_options(), "question": question}
        return url, CaptionRequest(**options, task=self.task, prompts=[prompt])

    def _collect_generation_options(self) -> dict[str, Any]:
        max_tokens = self.max_completion_tokens or self.max_tokens
        options: dict[str, Any] = {
            "num_captions": self.n if self.num_choices > 1 else None,
            "max_new_tokens": min(max_tokens, MAX_NEW_TOKENS) if max_tokens else None,
            "seed": self.seed,
        }
        temperature, top_p = self.temperature, self.top_p
        if temperature is None and top_p is not None and top_p < 1:
            temperature = 1.0
        if temperature:
            options |= {"do_sample": True, "temperature": max(temperature, 0.01), "top_p": top_p}
        return {name: value for name, value in options.items() if value is not None}

    @property
    def num_choices(self) -> int:
        """Number of choices."""
        return self.n or 1

    @property
    def stop_sequences(self) -> list[str]:
        """Stop sequences."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatChoice(NamedTuple):
    """Text of a choice, and whether it ended by itself ("stop") or at the token limit ("length")."""

    text: str
    finish_reason: Literal["stop", "length"]


def add_chat_routes(app: FastAPI, service: CaptionService) -> None:
    """Add the routes `/v1/models` and `/v1/chat/completions`."""
    model_info = {"id": service.model_name, "object": "model", "created": 0, "owned_by": "sca"}

    def check_model_name(name: str) -> None:
        if name != service.model_name:
            message = f"unknown model {name[:100]!r}; this server provides {service.model_name!r}"
            raise ApiError(404, message, "model_not_found", "model")

    @app.get("/v1/models", summary="List the models")
    async def list_models() -> dict[str, Any]:
        """List the model of the server."""
        return {"object": "list", "data": [model_info]}

    @app.get("/v1/models/{name:path}", summary="Retrieve a model by its name", responses=MODEL_NOT_FOUND_RESPONSE)
    async def retrieve_model(name: str) -> dict[str, Any]:
        """Return the model of the server if it has this name."""
        check_model_name(name)
        return model_info

    request_body = {"required": True, "content": {"application/json": {"schema": add_body_schema(app, ChatRequest)}}}

    @app.post(
        "/v1/chat/completions",
        responses=ERROR_RESPONSES | MODEL_NOT_FOUND_RESPONSE,
        openapi_extra={"requestBody": request_body},
        summary="Create a chat completion: caption one region of an image",
    )
    async def create_chat_completion(request: Request) -> Response:
        """Caption one region of an image, for clients of the OpenAI API.

        The image is a `data:` URL in a message. The region is set by the fields `box`, `points` and `mask` in image
        pixels, or in the text of the user messages, such as `box=10,20,30,40` or `point=10,20`; the default is the
        entire image. The response contains the region with its mask in the additional field `region`.
        """
        chat_request = await service.parse_body(request, ChatRequest)
        if chat_request.model:
            check_model_name(chat_request.model)
        options = getattr(service.scheduler.captioner, "generation_options", CAPTION_OPTIONS)
        chat_request.check_supported(options)
        url, caption_request = await to_thread.run_sync(chat_request.to_caption_request, "question" in options)
        service.check_request(caption_request)
        image_bytes = await to_thread.run_sync(decode_base64, url, "image_url", "messages")
        image = await service.decode_request_image(request, image_bytes, count_mask_prompts(caption_request))
        del url, image_bytes
        full_image_prompts = (
            None
            if caption_request.prompts[0].model_dump(exclude_none=True)
            else [Prompt(box=(0.0, 0.0, float(image.width), float(image.height)))]
        )
        inference_request = await service.make_inference_request(
            request, caption_request, image, full_image_prompts, "the region"
        )
        captions = await service.collect_captions(request, inference_request)
        if not captions:
            return Response(status_code=499)  # client closed the connection
        (caption,) = captions
        choices, usage = (
            make_choices(caption, chat_request.num_choices, chat_request.stop_sequences),
            count_usage(caption, chat_request.num_choices),
        )
        header = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.model_name}
        if chat_request.stream:
            has_usage = chat_request.stream_options is not None and chat_request.stream_options.include_usage
            return StreamingResponse(
                _iter_chunks(header, choices, usage if has_usage else None), media_type=EVENT_STREAM_MEDIA_TYPE
            )
        response = {
            **header,
            "object": "chat.completion",
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": choice.text},
                    "logprobs": None,
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": usage,
            "region": caption_to_dict(caption, image),
        }
        return JSONResponse(response)


def make_choices(caption: Caption, num_choices: int, stop_sequences: Sequence[str]) -> list[ChatChoice]:
    """Convert a caption and its alternatives to choices, best first.

    Args:
        caption: Caption of the region, with its alternatives.
        num_choices: Maximum number of choices.
        stop_sequences: Stop sequences; a text ends before the first one that it contains.

    Returns:
        At most `num_choices` choices.
    """
    texts = [caption.text, *(text for text, _ in caption.alternatives)]
    truncated_flags = caption.usage.is_truncated if caption.usage else (False,) * len(texts)
    choices = []
    for text, is_truncated in list(zip(texts, truncated_flags, strict=True))[:num_choices]:
        stop_offsets = [offset for stop in stop_sequences if (offset := text.find(stop)) >= 0]
        if stop_offsets:
            choices.append(ChatChoice(text[: min(stop_offsets)], "stop"))
        else:
            choices.append(ChatChoice(text, "length" if is_truncated else "stop"))
    return choices


def count_usage(caption: Caption, num_choices: int) -> dict[str, int]:
    """Count the prompt and completion tokens of a region; all are 0 without a language model.

    Args:
        caption: Caption of the region.
        num_choices: Number of choices to count.

    Returns:
        `prompt_tokens`, `completion_tokens` and `total_tokens`.
    """
    prompt_tokens = caption.usage.prompt_tokens if caption.usage else 0
    completion_tokens = sum(caption.usage.completion_tokens[:num_choices]) if caption.usage else 0
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _is_neutral(value: Any, neutral_values: Sequence[Any]) -> bool:
    """Return whether a value is a neutral value; true and 1 are different."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral_values)


def _iter_chunks(
    header: dict[str, Any], choices: Sequence[ChatChoice], usage: dict[str, int] | None
) -> Iterator[bytes]:
    """Yield the events of a streamed response; `usage` is sent in an additional last chunk, None omits it."""
    header = {**header, "object": "chat.completion.chunk"}
    empty_usage = {} if usage is None else {"usage": None}
    for index, (text, finish_reason) in enumerate(choices):
        for delta, chunk_finish_reason in (({"role": "assistant", "content": text}, None), ({}, finish_reason)):
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": chunk_finish_reason}
            yield format_sse_event(data_str=json.dumps({**header, "choices": [choice], **empty_usage}))
    if usage is not None:
        yield format_sse_event(data_str=json.dumps({**header, "choices": [], "usage": usage}))
    yield format_sse_event(data_str="[DONE]")
