"""Captioner that sends regions to an OpenAI-compatible server."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

from PIL import Image
from sca_registry.contracts import TASKS, TokenUsage
from sca_registry.errors import RegistryError
from sca_registry.spec import check_generation

from sca.captioners.chat_client import ChatClient, ChatCompletion, get_response_cache_folder
from sca.captioners.region_captioner import RegionCaptioner, RegionView, ScoredText, check_region_question
from sca.captioners.region_formats import (
    COORDINATE_FORMATS,
    QUESTIONS,
    REGION_PLACEHOLDER,
    CoordinateFormat,
    add_alpha,
    check_region_placeholder,
    crop_region,
    draw_box,
    draw_outline,
    get_box,
    get_questions,
    insert_coordinates,
    limit_size,
    remove_coordinates,
    resize_for_coordinates,
    resolve_context,
    scale_region,
)
from sca.inference.engine import EncodedImages
from sca.io.coordinates import Box
from sca.io.errors import InputError
from sca.io.validation import check_choice, check_range, check_type

GENERATION = {"max_new_tokens": 64, "num_beams": 1}
MAX_COMPLETION_TOKENS = "max_completion_tokens"  # the field that replaces `max_tokens` for some models of OpenAI
MIN_SIDE, MAX_SIDE = 16, 16_384  # pixels of the longer side of an image that is sent
RESERVED_FIELDS = ("model", "messages", "stream", "n")  # of a request
SERVER_COORDINATES = "sca"  # format of the chat route of `sca serve`
SERVER_QUESTIONS = (REGION_PLACEHOLDER, REGION_PLACEHOLDER)  # its requests have a field for the task


class ChatCaptioner(RegionCaptioner):
    """Captioner that prompts a vision-language model on a server for each region.

    The server is OpenAI-compatible, such as vLLM, SGLang, Ollama, llama.cpp or `sca serve`. The key is read from the
    environment: `OPENAI_API_KEY`, or the file named by `OPENAI_API_KEY_FILE`. Responses are cached in the folder
    `responses` of the cache by the server, the model, the image and all options, unless they are sampled without a
    seed. The captions have no score. With `region_format=coordinates`, coordinates are removed from them.

    Args:
        encoder: Encoder whose segmenter predicts the masks, see `RegionCaptioner`.
        url: Base URL, such as "http://localhost:8000/v1". Defaults to the environment variable `OPENAI_BASE_URL`.
            Only the arguments of a process can set it, not a file such as a sweep.
        model: Name of the model on the server; None for its only one.
        region_format: How the region is shown. "crop" is the crop of the box with `context`. "box" and "outline" are
            the full image with the box or the outline of the mask drawn in red. "coordinates" is the full image, with
            the box as text in the format `coordinate_format`. "alpha" is a PNG with the mask as alpha channel, as for
            Describe Anything (arXiv 2504.16072).
        context: Sides of a crop as multiples of those of the box, 1.5 by default. Requires `region_format="crop"`.
        coordinate_format: Format of coordinates: the model type of the model in transformers, such as "qwen3_vl", or
            "sca" for the chat route of `sca serve`. `COORDINATE_FORMATS` lists the model types.
        question: Question for both tasks instead of the built-in ones. "{region}" is replaced by the coordinates, which
            otherwise follow the question.
        max_side: Longer side in pixels to which larger images are scaled down.
        max_concurrency: Maximum number of concurrent requests.
        timeout: Maximum seconds per attempt.
        max_retries: Maximum retries after failures that may be temporary.
        cache: Use the cache.
        extra_body: Further fields of the request, such as `{reasoning_effort = "none"}`. `max_completion_tokens`
            replaces the field `max_tokens`.
        device: Device of the encoder.

    Raises:
        InputError: There is no URL, or it is invalid, or options contradict each other.
        RegistryError: An option is unknown or out of range.
    """

    has_scores = False
    generation: Mapping[str, Any] = GENERATION
    generation_options: tuple[str, ...] = ("max_new_tokens", "do_sample", "temperature", "top_p", "seed", "question")

    def __init__(
        self,
        encoder: str | Mapping[str, Any] | None = None,
        url: str | None = None,
        model: str | None = None,
        region_format: str = "crop",
        context: float | None = None,
        coordinate_format: str | None = None,
        question: str | None = None,
        max_side: int = 1024,
        max_concurrency: int = 8,
        timeout: float = 60.0,
        max_retries: int = 5,
        cache: bool = True,
        extra_body: Mapping[str, Any] | None = None,
        device: str = "cpu",
    ):
        check_choice("region_format", region_format, QUESTIONS)
        self.context: float = resolve_context(context, region_format)
        check_range("max_side", max_side, int, MIN_SIDE, MAX_SIDE)
        self.extra_body: dict[str, Any] = check_extra_body(extra_body)
        if (region_format == "coordinates") != (coordinate_format is not None):
            raise InputError(
                f"coordinate_format={coordinate_format} does not fit region_format={region_format}; set both, such as "
                "region_format=coordinates coordinate_format=qwen3_vl"
            )
        if coordinate_format is not None:
            check_choice("coordinate_format", coordinate_format, SERVER_FORMATS)
        self.coordinate_format = coordinate_format
        self.region_format = region_format
        if question is not None:
            self.check_question(question)
        self.client: ChatClient = ChatClient(
            url, timeout, max_retries, max_concurrency, get_response_cache_folder() if cache else None
        )
        super().__init__(encoder, device)
        self.max_side = max_side
        is_sca_server = coordinate_format == SERVER_COORDINATES
        questions = SERVER_QUESTIONS if is_sca_server else get_questions(coordinate_format, region_format)
        self.task_questions: tuple[str, str] = (question, question) if question else questions
        self._requested_model = model
        self._encoder_name = encoder

    @cached_property
    def model_name(self) -> str:
        """Name of the model on the server."""
        return self._requested_model or self.client.find_model()

    @property
    def metadata(self) -> dict[str, Any]:
        """Server and options that identify the captioner in evaluation results."""
        return {
            "captioner": "openai",
            "encoder": self._encoder_name,
            "url": self.client.url,
            "model": self.model_name,
            "region_format": self.region_format,
            **({"context": self.context} if self.region_format == "crop" else {}),
            "coordinate_format": self.coordinate_format,
            "questions": list(self.task_questions),
            "max_side": self.max_side,
            "extra_body": self.extra_body,
        }

    @property
    def usage(self) -> dict[str, int]:
        """Completed requests, cached completions, empty texts, and tokens as counted by the server."""
        return dict(self.client.usage)

    def check_question(self, question: str) -> None:
        """Check a question.

        Args:
            question: Question.

        Raises:
            ValueError: The question is empty, refers to several regions, or contains "{region}" although the region is
                not shown by coordinates.
        """
        check_region_question(question)
        check_region_placeholder(question, self.region_format)

    def caption_regions(
        self, regions: Sequence[RegionView], task: str, encoded: EncodedImages, **generation: Any
    ) -> list[ScoredText]:
        """Request one text per region, several at a time; see `RegionCaptioner`."""
        for name in generation:
            check_choice("the generation option", name, self.generation_options)
        check_generation("generation", generation)
        is_sampled = generation.get("do_sample", False)
        if not is_sampled and (unused := [name for name in ("temperature", "top_p") if name in generation]):
            raise ValueError(f"{unused[0]} has no effect without sampling; add do_sample=True")
        question = generation.get("question") or self.task_questions[TASKS.index(task)]
        fields = self._make_fields(task, generation)
        make_bodies = [partial(self._make_body, view, question, fields) for view in regions]
        is_random = bool(fields.get("temperature", 0)) and fields.get("seed") is None
        texts = map(_make_text, self.client.request_completions(make_bodies, use_cache=not is_random))
        if self.coordinate_format not in COORDINATE_FORMATS:
            return list(texts)
        return [text._replace(text=remove_coordinates(text.text, self.coordinate_format)) for text in texts]

    def _make_fields(self, task: str, generation: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a request that are the same for all regions."""
        fields: dict[str, Any] = {"model": self.model_name, "temperature": 0}
        if generation.get("do_sample"):
            fields |= {name: generation[name] for name in ("top_p", "seed") if name in generation}
            fields["temperature"] = generation.get("temperature", 1.0)
        if MAX_COMPLETION_TOKENS not in self.extra_body:
            fields["max_tokens"] = generation.get("max_new_tokens", self.generation["max_new_tokens"])
        elif "max_new_tokens" in generation:
            raise ValueError(f"max_new_tokens and extra_body.{MAX_COMPLETION_TOKENS} are both set; omit one of them")
        if self.coordinate_format == SERVER_COORDINATES:
            fields["task"] = task
        return fields | self.extra_body

    def _make_body(self, view: RegionView, question: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the JSON body of the request for a region."""
        image, coordinates = self._render_region(view)
        content = [
            {"type": "image_url", "image_url": {"url": _encode_image(image)}},
            {"type": "text", "text": insert_coordinates(question, coordinates)},
        ]
        return {**fields, "messages": [{"role": "user", "content": content}]}

    def _render_region(self, view: RegionView) -> tuple[Image.Image, str]:
        """Return the image to send for a region, and its coordinates in that image, or ""."""
        if self.region_format == "crop":
            return limit_size(crop_region(view, self.context), self.max_side), ""
        view = scale_region(view, self.max_side)
        if self.coordinate_format is not None:
            return resize_for_coordinates(view, SERVER_FORMATS[self.coordinate_format])
        if self.region_format == "box":
            return draw_box(view.image, get_box(view)), ""
        return (draw_outline(view) if self.region_format == "outline" else add_alpha(view)), ""


def check_extra_body(extra_body: Any) -> dict[str, Any]:
    """Check the further fields of a request.

    Args:
        extra_body: Fields; None for no fields.

    Returns:
        The fields.

    Raises:
        RegistryError: They are not a table, or contain a field that the client sets.
    """
    if extra_body is None:
        return {}
    check_type("extra_body", extra_body, Mapping)
    for name in RESERVED_FIELDS:
        if name in extra_body:
            raise RegistryError(f"extra_body.{name} is set by the client; remove it")
    return dict(extra_body)


def _make_text(completion: ChatCompletion) -> ScoredText:
    """Return the text of a completion in one line, with its tokens if the server counts them."""
    usage = None
    if completion.prompt_tokens is not None and completion.completion_tokens is not None:
        usage = TokenUsage(completion.prompt_tokens, (completion.completion_tokens,), (completion.is_truncated,))
    return ScoredText(" ".join(completion.text.split()), math.nan, usage)


def _format_server_box(box: Box, image_size: tuple[int, int]) -> str:
    """Return the box as the chat route of `sca serve` reads it."""
    return f"box={','.join(f'{value:g}' for value in box)}"


def _encode_image(image: Image.Image) -> str:
    """Return an image as a data URL in PNG."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


SERVER_FORMATS = {**COORDINATE_FORMATS, SERVER_COORDINATES: CoordinateFormat(_format_server_box)}
