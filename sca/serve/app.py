"""The HTTP application: `POST /v1/captions`, an OpenAI-compatible chat route, `/health` and `/metrics`."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from anyio import to_thread
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from fastapi_offline import FastAPIOffline
from PIL import Image
from pydantic import ValidationError
from sca_registry.contracts import Caption
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from sca.inference.automatic import Searched
from sca.io.errors import InputError
from sca.serve.access import HostCheck, KeyCheck
from sca.serve.body import RequestLimits
from sca.serve.chat import add_chat
from sca.serve.memory import BudgetError, release_memory
from sca.serve.problems import ApiError, error_response, to_api_error
from sca.serve.root_path import RootPath
from sca.serve.scheduler import SHORT, RequestScheduler
from sca.serve.schema import Answer, Asked, AskedOfImage, Health, Limits, add_schema
from sca.serve.service import EVENT_STREAM, JSON, PROBLEMS, Service, content_type, count_masks, decode_base64, plain
from sca.serve.tickets import Done, Event, Found, Question, SchedulerError

TRIM = 10.0  # seconds between two times that freed memory goes back to the system
QUIET = 10.0  # seconds without an event after which a stream says that it lives


def application(
    scheduler: RequestScheduler,
    name: str,
    limits: Limits | None = None,
    origins: Sequence[str] = (),
    hosts: Sequence[str] | None = None,
    keys: Sequence[str] = (),
    root_path: str = "",
) -> FastAPI:
    """Build the application that answers with a scheduler's model; it closes the scheduler at its end.

    Args:
        scheduler: The model, and who waits for it.
        name: What clients call the model.
        limits: What clients may ask for.
        origins: Origins whose pages may send requests from a browser, "*" for all.
        hosts: Names accepted in the Host header, besides this machine's own and any IP address; None for all.
        keys: API keys, one of which every request has to send; none if there are none.
        root_path: Path below which a proxy shows the application, such as "/captions".
    """
    limits = limits or Limits()
    service = Service(scheduler, name, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        trimming = asyncio.create_task(_trim_memory())
        yield
        trimming.cancel()
        await to_thread.run_sync(service.close)

    app = FastAPIOffline(  # whose page at /docs loads nothing from elsewhere
        title="Segment and caption anything",
        description="Masks and captions for regions of images, in pixels of the image as its viewer sees it.",
        lifespan=lifespan,
        redoc_url=None,
    )
    app.state.scheduler, app.state.budget = scheduler, service.budget
    if keys:
        app.add_middleware(KeyCheck, keys=keys)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    if hosts is not None:
        app.add_middleware(HostCheck, hosts=hosts)
    app.add_middleware(RequestLimits, limits=limits, budget=service.budget)
    app.add_middleware(service.metrics.middleware)
    if root_path:
        app.add_middleware(RootPath, root_path=root_path)  # the last is the outermost
    _handle_problems(app)
    _add_captions(app, service)
    _add_facts(app, service)
    add_chat(app, service)
    return app


async def _trim_memory() -> None:
    """Gives back what requests have freed, also those that went while their image was being decoded."""
    while True:
        await asyncio.sleep(TRIM)
        await to_thread.run_sync(release_memory)


def _add_captions(app: FastAPI, service: Service) -> None:
    ways = {
        "application/json": {"schema": add_schema(app, AskedOfImage)},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["image"],
                "properties": {
                    "image": {"type": "string", "format": "binary"},
                    "request": {"type": "string", "description": "JSON: the fields of the other way, without `image`"},
                },
            },
        },
    }
    stream = {"description": "events `found`, `searched`, `region`, `done`, `error`", "schema": {"type": "string"}}

    @app.post(
        "/v1/captions",
        response_model=Answer,
        responses={**PROBLEMS, 200: {"content": {EVENT_STREAM: stream}}},
        openapi_extra={"requestBody": {"required": True, "content": ways}},
        summary="Captions and masks of regions, at once or as they are there",
    )
    async def captions(request: Request) -> Response:
        asked, content = await _read(service, request)
        service.check(asked)
        image = await service.image(request, content, count_masks(asked))
        del content
        question = await service.question(request, asked, image)
        if asked.stream or EVENT_STREAM in request.headers.get("accept", ""):
            return await _stream(service, request, question)
        found = await service.captions(request, question)
        head = {"model": service.name, "width": image.width, "height": image.height}
        if len(found) <= SHORT:
            return JSONResponse({**head, "regions": [plain(each, image) for each in found]})
        return StreamingResponse(_pieces(head, found, image), media_type="application/json")


def _pieces(head: dict[str, Any], found: Sequence[Caption], image: Image.Image) -> Iterator[str]:
    """A long answer a region at a time: in one piece it would keep others waiting."""
    yield f'{json.dumps(head)[:-1]}, "regions": ['
    for number, each in enumerate(found):
        yield f"{', ' if number else ''}{json.dumps(plain(each, image))}"
    yield "]}"


def _add_facts(app: FastAPI, service: Service) -> None:
    @app.get("/", include_in_schema=False)
    async def start(request: Request) -> Response:
        root_path = request.scope.get("root_path", "")
        return RedirectResponse(f"{root_path}/docs" if root_path else "docs")

    @app.head("/health", include_in_schema=False)
    @app.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health() -> Response:
        state = service.scheduler.state
        told = Health(
            status=state,
            model=service.name,
            device=str(getattr(service.scheduler.captioner, "device", "cpu")),
            waiting=service.scheduler.queued,
        )
        return JSONResponse(told.model_dump(), 200 if state == "ok" else 503)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        return service.metrics.page()


async def _stream(service: Service, request: Request, question: Question) -> Response:
    events = service.events(request, question)
    first = await anext(events, None)  # what is wrong from the start has a status of its own
    head = {"model": service.name, "width": question.image.width, "height": question.image.height}

    async def lines() -> AsyncIterator[bytes]:
        event, last = first, time.monotonic()
        try:
            while True:
                if event is not None:
                    yield _event(event, head, question.image)
                    last = time.monotonic()
                elif time.monotonic() - last > QUIET:
                    yield KEEPALIVE_COMMENT
                    last = time.monotonic()
                if isinstance(event, Done):
                    return
                event = await anext(events)
        except StopAsyncIteration:
            return
        except SchedulerError as error:
            yield format_sse_event(event="error", data_str=json.dumps(to_api_error(error).content))
        finally:
            await events.aclose()

    return StreamingResponse(lines(), media_type=EVENT_STREAM, headers={"Cache-Control": "no-store"})


def _event(event: Event, head: dict[str, Any], image: Image.Image) -> bytes:
    match event:
        case Found():
            name, data = "found", {**head, **event._asdict()}
        case Searched():
            name, data = "searched", event._asdict()
        case Done():
            name, data = "done", event._asdict()
        case _:
            name, data = "region", plain(event, image)
    return format_sse_event(event=name, data_str=json.dumps(data))


async def _read(service: Service, request: Request) -> tuple[Asked, bytes]:
    """What is asked, and the image's file."""
    kind = content_type(request)
    if kind == JSON:
        asked = await service.parse(request, AskedOfImage)
        content = await to_thread.run_sync(decode_base64, asked.image)
        asked.image = ""  # it is large
        return asked, content
    if kind == "multipart/form-data":
        async with request.form(max_files=1, max_fields=4) as form:
            image, rest = form.get("image"), form.get("request", "{}")
            if not isinstance(image, UploadFile):
                raise ApiError(422, "no file in the field 'image'")
            if not isinstance(rest, str):
                raise ApiError(422, "the field 'request' is JSON text, not a file")
            return service.parsed(rest, Asked), await image.read()
    raise ApiError(415, f"{kind or 'no content type'}: send {JSON} or multipart/form-data")


def _handle_problems(app: FastAPI) -> None:
    """Every problem is a status and an error object; a defect is one in the log and 500 here."""

    async def answer(_: Request, error: Exception) -> Response:
        if isinstance(error, ClientDisconnect):
            return Response(status_code=499)  # to nobody
        return error_response(to_api_error(error))

    kinds = (ApiError, BudgetError, SchedulerError, InputError, MemoryError, ValidationError)
    for kind in (*kinds, ClientDisconnect, RequestValidationError):
        app.add_exception_handler(kind, answer)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = str(error.detail)
        if error.status_code in (404, 405):
            message = f"there is no {request.method} {request.url.path[:200]}; the page at /docs lists the routes"
        return error_response(ApiError(error.status_code, message), error.headers)

    @app.exception_handler(Exception)
    async def defect(_: Request, __: Exception) -> Response:
        return error_response(ApiError(500, "the server failed; its log says how"))
