"""The HTTP application: `POST /v1/captions`, an OpenAI-compatible chat route, `/health` and `/metrics`."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
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
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from sca.images import ImageError
from sca.prompts import PromptError
from sca.serve.body import BodyLimits
from sca.serve.chat import add_chat
from sca.serve.engine import Done, Engine, EngineError, Event, Found, Question, Searched
from sca.serve.problems import ApiError, told
from sca.serve.schema import Answer, Asked, AskedOfImage, Health, Limits
from sca.serve.service import EVENT_STREAM, PROBLEMS, Service, decoded, plain

QUIET = 10.0  # seconds without an event after which a stream says that it lives


def application(engine: Engine, name: str, limits: Limits | None = None, origins: Sequence[str] = ()) -> FastAPI:
    """The application that answers with an engine's model, which clients know by `name`. It closes the engine at its
    end. origins: whose pages may ask it from a browser, "*" for all.
    """
    limits = limits or Limits()
    service = Service(engine, name, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await to_thread.run_sync(engine.close)

    app = FastAPIOffline(  # whose page at /docs loads nothing from elsewhere
        title="Segment and caption anything",
        description="Masks and captions for regions of images, in pixels of the image as its viewer sees it.",
        lifespan=lifespan,
        redoc_url=None,
    )
    app.add_middleware(BodyLimits, size=limits.body, seconds=limits.seconds)
    app.add_middleware(service.metrics.middleware)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    _handle_problems(app)
    _add_captions(app, service)
    _add_facts(app, service)
    add_chat(app, service)
    return app


def _add_captions(app: FastAPI, service: Service) -> None:
    ways = {
        "application/json": {"schema": AskedOfImage.model_json_schema(ref_template="#/components/schemas/{model}")},
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
    inner = ways["application/json"]["schema"].pop("$defs", {})
    stream = {"description": "events `found`, `searched`, `region`, `done`, `error`", "schema": {"type": "string"}}

    @app.post(
        "/v1/captions",
        response_model=Answer,
        responses={**PROBLEMS, 200: {"content": {EVENT_STREAM: stream}}},
        openapi_extra={"requestBody": {"required": True, "content": ways}},
        summary="Captions and masks of regions, at once or as they are there",
    )
    async def captions(request: Request) -> Response:
        asked, content = await _read(request)
        image = await service.image(content)
        question = await service.question(asked, image)
        if asked.stream or EVENT_STREAM in request.headers.get("accept", ""):
            return await _stream(service, request, question)
        found = await service.captions(request, question)
        head = {"model": service.name, "width": image.width, "height": image.height}
        return JSONResponse({**head, "regions": [plain(each, image) for each in found]})

    _add_schemas(app, inner)


def _add_schemas(app: FastAPI, schemas: Mapping[str, Any]) -> None:
    """The parts of a request's schema are where the page looks for them."""
    usual = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            page = usual()
            parts = page.setdefault("components", {}).setdefault("schemas", {})
            for name, schema in schemas.items():
                parts.setdefault(name, schema)
        return app.openapi_schema

    app.openapi = openapi


def _add_facts(app: FastAPI, service: Service) -> None:
    @app.get("/", include_in_schema=False)
    async def start() -> Response:
        return RedirectResponse("docs")

    @app.head("/health", include_in_schema=False)
    @app.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health() -> Response:
        alive = service.engine.alive
        told = Health(
            status="ok" if alive else "down",
            model=service.name,
            device=str(getattr(service.engine.captioner, "device", "cpu")),
            waiting=service.engine.queued,
        )
        return JSONResponse(told.model_dump(), 200 if alive else 503)

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
        except EngineError as error:
            yield format_sse_event(event="error", data_str=json.dumps({"error": str(error)}))
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


async def _read(request: Request) -> tuple[Asked, bytes]:
    """What is asked, and the image's file."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        asked = AskedOfImage.model_validate_json(await request.body())
        return asked, decoded(asked.image)
    if kind == "multipart/form-data":
        async with request.form(max_files=1, max_fields=4) as form:
            image, rest = form.get("image"), form.get("request", "{}")
            if not isinstance(image, UploadFile):
                raise ApiError(422, "no file in the field 'image'")
            if not isinstance(rest, str):
                raise ApiError(422, "the field 'request' is JSON text, not a file")
            return Asked.model_validate_json(rest), await image.read()
    raise ApiError(415, f"{kind or 'no content type'}: send application/json or multipart/form-data")


def _handle_problems(app: FastAPI) -> None:
    """Every problem is a status and {"error": a line}; a defect is one in the log and 500 here."""

    async def answer(_: Request, error: Exception) -> Response:
        problem = told(error)
        return JSONResponse({"error": str(problem)}, problem.status, problem.headers)

    for kind in (ApiError, EngineError, ImageError, PromptError, RequestValidationError, ValidationError):
        app.add_exception_handler(kind, answer)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def defect(_: Request, __: Exception) -> Response:
        return JSONResponse({"error": "the server failed; its log says how"}, 500)
