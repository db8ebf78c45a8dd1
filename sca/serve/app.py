"""HTTP application: `POST /v1/captions`, an OpenAI-compatible chat route, `/health` and `/metrics`."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from anyio import to_thread
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from fastapi_offline import FastAPIOffline
from PIL import Image
from pydantic import BaseModel, ValidationError
from sca_registry.contracts import Caption
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from sca.allocator import release_memory
from sca.inference.region_search import SearchProgress
from sca.inference.zoom_options import DEFAULT_ZOOM, ZoomValue
from sca.io.errors import InputError
from sca.serve.access_control import HostCheckMiddleware, KeyCheckMiddleware
from sca.serve.chat_completions import add_chat_routes
from sca.serve.errors import ApiError, make_error_response, to_api_error
from sca.serve.inference_requests import CaptioningStarted, InferenceRequest, RequestDone, RequestEvent, SchedulerError
from sca.serve.label_studio import add_label_studio_routes
from sca.serve.limits import ServerLimits
from sca.serve.limits_middleware import RequestLimitMiddleware
from sca.serve.memory_budget import MemoryBudgetError
from sca.serve.root_path import RootPathMiddleware
from sca.serve.scheduler import SHORT_REQUEST_REGIONS, RequestScheduler
from sca.serve.schema import (
    CaptionRequest,
    CaptionResponse,
    FindRequest,
    FindResponse,
    HealthResponse,
    JsonCaptionRequest,
    JsonFindRequest,
    add_body_schema,
)
from sca.serve.service import (
    ERROR_RESPONSES,
    EVENT_STREAM_MEDIA_TYPE,
    JSON_MEDIA_TYPE,
    CaptionService,
    caption_to_dict,
    count_mask_prompts,
    decode_base64,
    describe_media_type,
    get_media_type,
    match_to_dict,
)
from sca.serve.task_images import TaskImageReader

JsonRequest = TypeVar("JsonRequest", JsonCaptionRequest, JsonFindRequest)
FormRequest = TypeVar("FormRequest", CaptionRequest, FindRequest)
STREAM_DESCRIPTION = (
    "Server-sent events: `search_progress` during the search of `everything`, `captioning_started` with the size of "
    "the image and the number of regions, `region` for each captioned region, and finally `done` or `error`."
)
TRIM_INTERVAL = 10.0  # seconds between releases of freed memory to the system
KEEPALIVE_INTERVAL = 10.0  # seconds without an event before a stream sends a keepalive comment


def create_app(
    scheduler: RequestScheduler,
    model_name: str,
    limits: ServerLimits | None = None,
    allowed_origins: Sequence[str] = (),
    allowed_hosts: Sequence[str] | None = None,
    api_keys: Sequence[str] = (),
    root_path: str = "",
    zoom: ZoomValue = DEFAULT_ZOOM,
    task_images: TaskImageReader | None = None,
) -> FastAPI:
    """Create the application. It closes the scheduler at shutdown.

    Args:
        scheduler: Scheduler with the model.
        model_name: Name of the model for clients.
        limits: Limits on requests; None for the defaults.
        allowed_origins: Web origins allowed to call the server (CORS), "*" for all.
        allowed_hosts: Host headers to accept in addition to IP addresses, localhost and the host name of this machine;
            None accepts all.
        api_keys: API keys; empty to require none.
        root_path: URL path of the application behind a proxy, such as "/captions".
        zoom: Default of the field `zoom` of requests.
        task_images: Reader of the images of Label Studio tasks; None for an application without these routes.

    Returns:
        The ASGI application; `app.state` contains `scheduler` and `budget`.
    """
    limits = limits or ServerLimits()
    service = CaptionService(scheduler, model_name, limits, zoom)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        trim_task = asyncio.create_task(_trim_memory())
        yield
        trim_task.cancel()
        await to_thread.run_sync(service.close)

    app = FastAPIOffline(  # the page at /docs loads no external files
        title="Segment and caption anything",
        description="Masks and captions for regions of images, in pixels of the image as its viewer sees it.",
        lifespan=lifespan,
        redoc_url=None,
    )
    app.state.scheduler, app.state.budget = scheduler, service.budget
    if api_keys:
        app.add_middleware(KeyCheckMiddleware, keys=api_keys)
    if allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=allowed_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    if allowed_hosts is not None:
        app.add_middleware(HostCheckMiddleware, hosts=allowed_hosts)
    app.add_middleware(RequestLimitMiddleware, limits=limits, budget=service.budget)
    app.add_middleware(service.metrics.wrap_app)
    if root_path:
        app.add_middleware(RootPathMiddleware, root_path=root_path)  # added last: outermost
    _add_error_handlers(app)
    _add_caption_route(app, service)
    _add_find_route(app, service)
    _add_info_routes(app, service)
    add_chat_routes(app, service)
    if task_images is not None:
        add_label_studio_routes(app, service, task_images)
    return app


async def _trim_memory() -> None:
    """Periodically release memory freed by requests, including those cancelled while their image was decoded."""
    while True:
        await asyncio.sleep(TRIM_INTERVAL)
        await to_thread.run_sync(release_memory)


def _describe_request_content(app: FastAPI, json_model: type[BaseModel]) -> dict[str, Any]:
    """Return the OpenAPI description of a body with an image, as JSON or as a form."""
    return {
        "application/json": {"schema": add_body_schema(app, json_model)},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["image"],
                "properties": {
                    "image": {"type": "string", "format": "binary", "description": "Image file."},
                    "request": {
                        "type": "string",
                        "description": f"JSON with the other fields of `{json_model.__name__}`.",
                    },
                },
            },
        },
    }


def _add_caption_route(app: FastAPI, service: CaptionService) -> None:
    request_content = _describe_request_content(app, JsonCaptionRequest)
    stream_content = {"schema": {"type": "string", "description": STREAM_DESCRIPTION}}

    @app.post(
        "/v1/captions",
        response_model=CaptionResponse,
        responses={**ERROR_RESPONSES, 200: {"content": {EVENT_STREAM_MEDIA_TYPE: stream_content}}},
        openapi_extra={"requestBody": {"required": True, "content": request_content}},
        summary="Caption regions of an image",
    )
    async def create_captions(request: Request) -> Response:
        """Caption regions of one image: those of `prompts`, or all regions found by `everything`.

        Coordinates are pixels of the image with its EXIF orientation applied; the top left corner is 0, 0. The image
        is sent as base64 in JSON or as a file in multipart/form-data. With `stream`, or the header
        `Accept: text/event-stream`, the response is a stream of server-sent events.
        """
        caption_request, image_bytes = await _parse_request(service, request, JsonCaptionRequest, CaptionRequest)
        service.check_request(caption_request)
        image = await service.decode_request_image(request, image_bytes, count_mask_prompts(caption_request))
        del image_bytes
        inference_request = await service.make_inference_request(request, caption_request, image)
        if caption_request.stream or EVENT_STREAM_MEDIA_TYPE in request.headers.get("accept", ""):
            return await _stream_response(service, request, inference_request)
        results = await service.collect_captions(request, inference_request)
        header = {"model": service.model_name, "width": image.width, "height": image.height}
        return _make_json_response(header, results, partial(caption_to_dict, image=image))


def _add_find_route(app: FastAPI, service: CaptionService) -> None:
    request_content = _describe_request_content(app, JsonFindRequest)

    @app.post(
        "/v1/find",
        response_model=FindResponse,
        responses=ERROR_RESPONSES,
        openapi_extra={"requestBody": {"required": True, "content": request_content}},
        summary="Find regions of an image by text",
    )
    async def find_matches(request: Request) -> Response:
        """Find the regions of one image that match a text, among those of `prompts` or of `everything`.

        The image is sent as in `/v1/captions`.
        """
        find_request, image_bytes = await _parse_request(service, request, JsonFindRequest, FindRequest)
        caption_request = service.check_find_request(find_request)
        image = await service.decode_request_image(request, image_bytes, count_mask_prompts(caption_request))
        del image_bytes
        inference_request = await service.make_inference_request(request, caption_request, image)
        inference_request = replace(
            inference_request,
            text=find_request.text,
            top=find_request.top,
            threshold=find_request.threshold,
            zoom=None,
        )
        matches, num_regions = await service.collect_matches(request, inference_request)
        header = {"model": service.model_name, "width": image.width, "height": image.height, "num_regions": num_regions}
        return _make_json_response(header, matches, partial(match_to_dict, image=image))


def _make_json_response(
    header: dict[str, Any], captions: Sequence[Caption], to_dict: Callable[[Caption], dict[str, Any]]
) -> Response:
    """Return a JSON response, in chunks if it is long."""
    if len(captions) <= SHORT_REQUEST_REGIONS:
        return JSONResponse({**header, "regions": list(map(to_dict, captions))})
    return StreamingResponse(_iter_json_chunks(header, captions, to_dict), media_type="application/json")


def _iter_json_chunks(
    header: dict[str, Any], captions: Sequence[Caption], to_dict: Callable[[Caption], dict[str, Any]]
) -> Iterator[str]:
    """Yield a long JSON response region by region, so that encoding it does not block the event loop."""
    yield f'{json.dumps(header)[:-1]}, "regions": ['
    for index, caption in enumerate(captions):
        yield f"{', ' if index else ''}{json.dumps(to_dict(caption))}"
    yield "]}"


def _add_info_routes(app: FastAPI, service: CaptionService) -> None:
    @app.get("/", include_in_schema=False)
    async def redirect_to_docs(request: Request) -> Response:
        root_path = request.scope.get("root_path", "")
        return RedirectResponse(f"{root_path}/docs" if root_path else "docs")

    @app.head("/health", include_in_schema=False)
    @app.get(
        "/health",
        response_model=HealthResponse,
        responses={503: {"model": HealthResponse, "description": "The server accepts no requests."}},
        summary="Get the state of the server",
    )
    async def get_health() -> Response:
        """Return the state of the server; the status is 503 unless it accepts requests."""
        state = service.scheduler.state
        response = HealthResponse(
            status=state,
            model=service.model_name,
            device=str(getattr(service.scheduler.captioner, "device", "cpu")),
            queued_regions=service.scheduler.num_queued_regions,
        )
        return JSONResponse(response.model_dump(), 200 if state == "ok" else 503)

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}},
        summary="Get the Prometheus metrics",
    )
    async def get_metrics() -> Response:
        """Return metrics in the Prometheus text format."""
        return service.metrics.render_page()


async def _stream_response(service: CaptionService, request: Request, inference_request: InferenceRequest) -> Response:
    events = service.iter_events(request, inference_request)
    first_event = await anext(events, None)  # raises initial errors before the status is sent
    header = {
        "model": service.model_name,
        "width": inference_request.image.width,
        "height": inference_request.image.height,
    }

    async def encode_events() -> AsyncIterator[bytes]:
        event, last_sent = first_event, time.monotonic()
        try:
            while True:
                if event is not None:
                    yield _format_event(event, header, inference_request.image)
                    last_sent = time.monotonic()
                elif time.monotonic() - last_sent > KEEPALIVE_INTERVAL:
                    yield KEEPALIVE_COMMENT
                    last_sent = time.monotonic()
                if isinstance(event, RequestDone):
                    return
                event = await anext(events)
        except StopAsyncIteration:
            return
        except SchedulerError as error:
            yield format_sse_event(event="error", data_str=json.dumps(to_api_error(error).content))
        finally:
            await events.aclose()

    return StreamingResponse(encode_events(), media_type=EVENT_STREAM_MEDIA_TYPE, headers={"Cache-Control": "no-store"})


def _format_event(event: RequestEvent, header: dict[str, Any], image: Image.Image) -> bytes:
    match event:
        case CaptioningStarted():
            event_type, data = "captioning_started", {**header, **event._asdict()}
        case SearchProgress():
            event_type, data = "search_progress", event._asdict()
        case RequestDone():
            event_type, data = "done", event._asdict()
        case Caption():
            event_type, data = "region", caption_to_dict(event, image)
        case _:  # the routes request no candidate masks, and errors are raised
            raise TypeError(type(event).__name__)
    return format_sse_event(event=event_type, data_str=json.dumps(data))


async def _parse_request(
    service: CaptionService, request: Request, json_model: type[JsonRequest], form_model: type[FormRequest]
) -> tuple[JsonRequest | FormRequest, bytes]:
    """Read a JSON or multipart body; return the request and the bytes of the image file."""
    media_type = get_media_type(request)
    if media_type == JSON_MEDIA_TYPE:
        json_request = await service.parse_body(request, json_model)
        image_bytes = await to_thread.run_sync(decode_base64, json_request.image)
        json_request.image = ""  # free the memory
        return json_request, image_bytes
    if media_type == "multipart/form-data":
        async with request.form(max_files=1, max_fields=4) as form:
            image_file, request_json = form.get("image"), form.get("request", "{}")
            if not isinstance(image_file, UploadFile):
                raise ApiError(
                    422, "the field 'image' is missing or not a file; send the image as a file", param="image"
                )
            if not isinstance(request_json, str):
                raise ApiError(422, "the field 'request' is a file; send it as JSON text")
            return service.parse_json(request_json, form_model), await image_file.read()
    raise ApiError(
        415, f"{describe_media_type(media_type)} is not supported; send {JSON_MEDIA_TYPE} or multipart/form-data"
    )


def _add_error_handlers(app: FastAPI) -> None:
    """Convert every error to a status and an error object; unexpected errors are logged and return 500."""

    async def handle_error(_: Request, error: Exception) -> Response:
        if isinstance(error, ClientDisconnect):
            return Response(status_code=499)  # client closed the connection
        return make_error_response(to_api_error(error))

    error_types = (ApiError, MemoryBudgetError, SchedulerError, InputError, MemoryError, ValidationError)
    for error_type in (*error_types, ClientDisconnect, RequestValidationError):
        app.add_exception_handler(error_type, handle_error)

    @app.exception_handler(HTTPException)
    async def handle_http_error(request: Request, error: HTTPException) -> Response:
        message = str(error.detail)
        if error.status_code in (404, 405):
            message = f"no route {request.method} {request.url.path[:200]}; /docs lists the routes"
        return make_error_response(ApiError(error.status_code, message), error.headers)

    @app.exception_handler(Exception)
    async def handle_unexpected_error(_: Request, __: Exception) -> Response:
        return make_error_response(ApiError(500, "internal server error; see the server log"))
