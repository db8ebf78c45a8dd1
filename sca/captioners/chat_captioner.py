"""Captioner that sends regions to a server with the chat completions of the OpenAI API."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

from PIL import Image
from sca_registry.contracts import TASKS, TokenUsage, list_region_references

from sca.captioners.chat_client import ChatClient, get_response_cache_folder
from sca.captioners.region_captioner import RegionCaptioner, RegionView, ScoredText
from sca.captioners.region_formats import (
    COORDINATE_FORMATS,
    QUESTIONS,
    add_alpha,
    crop_region,
    draw_box,
    draw_outline,
    get_box,
    limit_size,
    resize_for_coordinates,
    scale_region,
)
from sca.inference.engine import EncodedImages
from sca.io.errors import InputError
from sca.io.validation import check_choice, check_range, check_type

GENERATION = {"max_new_tokens": 64, "num_beams": 1}
MAX_COMPLETION_TOKENS = "max_completion_tokens"  # the field that replaces `max_tokens` for some models of OpenAI
MIN_SIDE, MAX_SIDE = 16, 16_384  # pixels of the longer side of an image that is sent
MAX_CONCURRENCY = 1024
SERVER_COORDINATES, SERVER_QUESTIONS = "sca", ("{region}", "{region}")  # `sca serve` has a field for the task


class ChatCaptioner(RegionCaptioner):
    """Captioner that prompts a vision-language model on a server for each region.

    The server is any one with the chat completions of the OpenAI API, such as vLLM, SGLang, Ollama, llama.cpp or
    `sca serve`. The key is read from the environment: `OPENAI_API_KEY`, or the file named by `OPENAI_API_KEY_FILE`.
    Responses are cached in the folder `responses` of the cache, by the server, the model, the image and all options,
    unless they are sampled without a seed.

    Args:
        encoder: Encoder whose segmenter predicts the masks, see `RegionCaptioner`.
        url: Base URL, such as "http://localhost:8000/v1". Defaults to the environment variable `OPENAI_BASE_URL`.
            Only the arguments of a process can set it, not a file such as a sweep.
        model: Name of the model on the server; None for its only one.
        region_format: How the region is shown. "crop" is the crop of the box with `context`. "box" and "outline" are
            the full image with the box or the outline of the mask drawn in red. "coordinates" is the full image, with
            the box as text in the notation of `coordinates`. "alpha" is a PNG with the mask as alpha channel, as for
            Describe Anything (arXiv 2504.16072).
        context: Sides of a crop as multiples of those of the box.
        coordinates: Notation of boxes: "qwen2.5-vl", "qwen3-vl", "paligemma", "kosmos-2", "florence-2", or "sca" for
            the chat route of `sca serve`.
        question: Question for both tasks instead of the built-in ones. "{region}" is replaced by the coordinates.
        max_side: Longer side in pixels to which larger images are scaled down.
        max_concurrency: Maximum number of concurrent requests.
        timeout: Seconds for one response.
        max_retries: Further attempts after a failure that may be temporary.
        cache: Use the cache.
        extra_body: Further fields of the request, such as `{reasoning_effort = "none"}`. `max_completion_tokens`
            replaces the field `max_tokens`.
        device: Device of the encoder.

    Raises:
        InputError: There is no URL, or it is invalid.
        RegistryError: An option is invalid.
    """

    generation: Mapping[str, Any] = GENERATION
    generation_options: tuple[str, ...] = ("max_new_tokens", "do_sample", "temperature", "top_p", "seed", "question")

    def __init__(
        self,
        encoder: str | Mapping[str, Any] | None = None,
        url: str | None = None,
        model: str | None = None,
        region_format: str = "crop",
        context: float = 1.5,
        coordinates: str | None = None,
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
        check_range("context", context, float, 1.0, 100.0)
        check_range("max_side", max_side, int, MIN_SIDE, MAX_SIDE)
        check_range("max_concurrency", max_concurrency, int, 1, MAX_CONCURRENCY)
        if extra_body is not None:
            check_type("extra_body", extra_body, Mapping)
        if (region_format == "coordinates") != (coordinates is not None):
            raise InputError(
                f"coordinates={coordinates} and region_format={region_format} do not fit; set both, such as "
                "region_format=coordinates coordinates=qwen3-vl"
            )
        if coordinates is not None:
            check_choice("coordinates", coordinates, COORDINATE_FORMATS)
        self.client: ChatClient = ChatClient(url, timeout, max_retries, get_response_cache_folder() if cache else None)
        super().__init__(encoder, device)
        self.region_format = region_format
        self.context = context
        self.coordinates = coordinates
        self.max_side = max_side
        self.max_concurrency = max_concurrency
        self.extra_body: dict[str, Any] = dict(extra_body or {})
        questions = SERVER_QUESTIONS if coordinates == SERVER_COORDINATES else QUESTIONS[region_format]
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
            "coordinates": self.coordinates,
            "questions": list(self.task_questions),
            "max_side": self.max_side,
            "extra_body": self.extra_body,
        }

    @property
    def usage(self) -> dict[str, int]:
        """Requests and tokens of this captioner, see `ChatClient.usage`."""
        return self.client.usage

    def check_question(self, question: str) -> None:
        """Check a question.

        Args:
            question: Question.

        Raises:
            ValueError: The question is empty, or refers to several regions.
        """
        if not question.strip():
            raise ValueError("the question is empty; pass a text such as 'what color is it?'")
        if list_region_references(question):
            raise ValueError("this captioner does not support region references such as <region 1>; remove them")

    def caption_regions(
        self, regions: Sequence[RegionView], task: str, encoded: EncodedImages, **generation: Any
    ) -> list[ScoredText]:
        """Request one text per region, several at a time; see `RegionCaptioner`. The scores are NaN."""
        for name in generation:
            if name not in self.generation_options:
                check_choice("the generation option", name, self.generation_options)
        options = {**self.generation, **generation}
        question = options.pop("question", None)
        if question is None:
            question = self.task_questions[TASKS.index(task)]
        elif self.coordinates is not None and "{region}" not in question:
            question = f"{question} {{region}}"
        is_cached = not options.get("do_sample") or options.get("seed") is not None
        stop = threading.Event()

        def request_text(view: RegionView) -> ScoredText:
            completion = self.client.request_completion(
                self._build_body(view, task, question, options), is_cached, stop
            )
            usage = None
            if completion.prompt_tokens is not None and completion.completion_tokens is not None:
                usage = TokenUsage(
                    completion.prompt_tokens, (completion.completion_tokens,), (completion.is_truncated,)
                )
            return ScoredText(completion.text, float("nan"), usage)

        with ThreadPoolExecutor(self.max_concurrency) as executor:
            try:
                return list(executor.map(request_text, regions))
            except BaseException:  # including interrupts: the executor waits for its threads
                stop.set()
                raise

    def _build_body(self, view: RegionView, task: str, question: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the JSON body of the request for a region."""
        image, coordinates = self._show_region(view)
        text = question.replace("{region}", coordinates)
        sampling = {name: options[name] for name in ("temperature", "top_p", "seed") if options.get(name) is not None}
        if not options.get("do_sample"):
            sampling = {"temperature": 0}
        content = [
            {"type": "image_url", "image_url": {"url": _encode_image(image)}},
            {"type": "text", "text": text},
        ]
        has_own_limit = MAX_COMPLETION_TOKENS in self.extra_body
        return {
            "model": self.model_name,
            "messages": [{"role": "user", "content": content}],
            **({} if has_own_limit else {"max_tokens": options["max_new_tokens"]}),
            **sampling,
            **({"task": task} if self.coordinates == SERVER_COORDINATES else {}),
            **self.extra_body,
        }

    def _show_region(self, view: RegionView) -> tuple[Image.Image, str]:
        """Return the image to send for a region, and its coordinates in that image, or ""."""
        if self.region_format == "crop":
            return limit_size(crop_region(view, self.context), self.max_side), ""
        view = scale_region(view, self.max_side)
        if self.coordinates is not None:
            return resize_for_coordinates(view, COORDINATE_FORMATS[self.coordinates])
        if self.region_format == "box":
            return draw_box(view.image, get_box(view)), ""
        return (draw_outline(view) if self.region_format == "outline" else add_alpha(view)), ""


def _encode_image(image: Image.Image) -> str:
    """Return an image as a data URL in PNG."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
