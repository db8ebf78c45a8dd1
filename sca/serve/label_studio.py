"""Routes of Label Studio's machine learning backends: predictions for tasks, also while a person annotates.

Protocol: https://labelstud.io/guide/ml and `label_studio/ml/api_connector.py` in
https://github.com/HumanSignal/label-studio. The address and the access token of Label Studio in a request are ignored:
images are downloaded as `TaskImageReader` allows.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from anyio import to_thread
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from sca_registry.contracts import Caption, Prompt
from starlette.requests import ClientDisconnect

from sca.io.annotations import label_studio
from sca.io.annotations.annotation import Annotation, SkipCounter
from sca.io.errors import InputError
from sca.io.prompts import parse_prompt
from sca.output.captioned_image import ImageSize
from sca.output.jsonl import caption_to_record, replace_non_finite
from sca.output.label_studio import make_results
from sca.output.labeling_interface import LabelingInterface, parse_labeling_interface
from sca.serve.errors import ApiError
from sca.serve.schema import CaptionRequest, RegionPrompt, add_body_schema
from sca.serve.service import ERROR_RESPONSES, CaptionService
from sca.serve.task_images import TaskImageReader

MAX_TASKS = 1000  # tasks per request
SHAPES_WITHOUT_MASKS = ("rectangle", "keypoint")

log: logging.Logger = logging.getLogger(__name__)


class PredictionContext(BaseModel):
    """Shapes that a person has just drawn with a smart tool."""

    result: Annotated[list[dict[str, Any]], Field(description="Results of the shapes, which form one region.")] = []


class PredictionParameters(BaseModel):
    """Parameters of a prediction request."""

    context: Annotated[PredictionContext | None, Field(description="Shapes of a smart tool.")] = None


class PredictionRequest(BaseModel):
    """Request of Label Studio for predictions; other fields are ignored."""

    tasks: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_TASKS, description="Tasks.")]
    label_config: Annotated[str, Field(description="Labeling configuration of the project.")]
    params: Annotated[PredictionParameters | None, Field(description="Parameters.")] = None


def add_label_studio_routes(app: FastAPI, service: CaptionService, images: TaskImageReader) -> None:
    """Add the routes `/setup`, `/predict` and `/webhook`; `/health` exists already."""
    request_body = {
        "required": True,
        "content": {"application/json": {"schema": add_body_schema(app, PredictionRequest)}},
    }

    @app.post("/setup", summary="Connect Label Studio")
    async def set_up() -> dict[str, Any]:
        """Return the version of the model, by which Label Studio groups predictions."""
        return {"model_version": service.model_name}

    @app.post("/webhook", status_code=201, summary="Receive an event of Label Studio")
    async def receive_event() -> dict[str, Any]:
        """Do nothing: the server is not trained on annotations."""
        return {}

    @app.post(
        "/predict",
        responses=ERROR_RESPONSES,
        openapi_extra={"requestBody": request_body},
        summary="Predict regions of Label Studio tasks",
    )
    async def predict(request: Request) -> Response:
        """Caption regions of the images of tasks.

        The region is the one drawn with a smart tool, in `params.context`. Without it, the regions are those of the
        annotation or draft of the task, and without these, all regions that everything mode finds.
        """
        prediction_request = await service.parse_body(request, PredictionRequest)
        interface = await to_thread.run_sync(parse_labeling_interface, prediction_request.label_config)
        context = prediction_request.params and prediction_request.params.context
        predictor = TaskPredictor(service, images, request, interface)
        predictions = [
            await predictor.predict(task, f"task {task.get('id', number)!s:.40}", context.result if context else [])
            for number, task in enumerate(prediction_request.tasks)
        ]
        return JSONResponse({"results": predictions, "model_version": service.model_name})


class TaskPredictor:
    """Predictor of the tasks of one request.

    Args:
        service: Service with the model.
        images: Reader of the images.
        request: HTTP request.
        interface: Labeling interface of the project.
    """

    def __init__(
        self, service: CaptionService, images: TaskImageReader, request: Request, interface: LabelingInterface
    ):
        self.service = service
        self.images = images
        self.request = request
        self.interface = interface

    async def predict(
        self, task: Mapping[str, Any], location: str, context_results: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Predict the regions of a task.

        Args:
            task: Task of Label Studio.
            location: Task, for messages.
            context_results: Results of a smart tool, which form one region; empty without one.

        Returns:
            The prediction.

        Raises:
            ApiError: The image cannot be read, or the request is not supported (422), or too large (413).
            InputError: A shape is invalid, or has no control.
        """
        skip = SkipCounter()
        results = [each for each in context_results or _list_results(task, location, skip) if self._is_shape(each)]
        if context_results and not results:
            raise InputError(f"{location}: the context has no shape on the image {self.interface.image!r}; draw one")
        service, request = self.service, self.request
        seconds = service.get_deadline(request) - asyncio.get_running_loop().time()
        image_bytes = await self.images.read(self._find_image(task, location), location, seconds, request.state.lease)
        num_masks = sum(label_studio.get_shape_type(each) not in SHAPES_WITHOUT_MASKS for each in results)
        image = await service.decode_request_image(request, image_bytes, num_masks)
        read_prompts = _read_context_prompt if context_results else _read_prompts
        prompts, labels = await to_thread.run_sync(read_prompts, results, image.size, location, skip)
        if summary := skip.summarize():
            log.warning("sca: %s", summary)
        caption_request = CaptionRequest(prompts=[RegionPrompt()] * len(prompts), everything=not prompts)
        service.check_request(caption_request)
        inference_request = await service.make_inference_request(request, caption_request, image, prompts or None)
        captions = await service.collect_captions(request, inference_request)
        if len(captions) < len(prompts):
            raise ClientDisconnect
        return await to_thread.run_sync(self._make_prediction, captions, image.size, labels)

    def _is_shape(self, result: Mapping[str, Any]) -> bool:
        return result.get("to_name") == self.interface.image and bool(label_studio.get_shape_type(result))

    def _find_image(self, task: Mapping[str, Any], location: str) -> str:
        data = task.get("data")
        source = data.get(self.interface.data_key) if isinstance(data, Mapping) else None
        if not isinstance(source, str) or not source.strip():
            raise ApiError(
                422, f"{location}: data has no image {self.interface.data_key!r}; add its URL", param="tasks"
            )
        return source.strip()

    def _make_prediction(
        self, captions: Sequence[Caption], size: tuple[int, int], labels: Sequence[str | None]
    ) -> dict[str, Any]:
        records = [caption_to_record("", ImageSize(*size), caption) for caption in captions]
        results = []
        for record, label in zip(records, labels or [None] * len(records), strict=True):
            results += make_results(record, uuid.uuid4().hex[:10], self.interface, label)
        scores = [record["score"] for record in records if record["score"] is not None]
        score = replace_non_finite(sum(scores) / len(scores)) if scores else None
        return {"model_version": self.service.model_name, "score": score, "result": results}


def _list_results(task: Mapping[str, Any], location: str, skip: SkipCounter) -> list[Mapping[str, Any]]:
    """Return the results of the annotation or draft of a task; predictions are not prompts."""
    annotation = label_studio.choose_annotation({**task, "predictions": []}, location, skip)
    results = annotation.get("result")
    return [each for each in results if isinstance(each, Mapping)] if isinstance(results, list) else []


def _read_prompts(
    results: Sequence[Mapping[str, Any]], size: tuple[int, int], location: str, skip: SkipCounter
) -> tuple[list[Prompt], list[str | None]]:
    """Return a prompt and a label per region."""
    annotations = label_studio.read_regions(results, size, location, skip)
    prompts = [parse_prompt(_make_prompt_fields(each), each.location, *size) for each in annotations]
    return prompts, [each.label for each in annotations]


def _make_prompt_fields(annotation: Annotation) -> dict[str, Any]:
    if annotation.mask:
        return {"mask": annotation.mask}
    return {"box": annotation.box} if annotation.box else {"points": [[*(annotation.point or ()), 1]]}


def _read_context_prompt(
    results: Sequence[Mapping[str, Any]], size: tuple[int, int], location: str, skip: SkipCounter
) -> tuple[list[Prompt], list[str | None]]:
    """Return the prompt of the shapes of a smart tool, and their label."""
    points: list[list[float]] = []
    shapes = []
    for result in results:
        if label_studio.get_shape_type(result) == "keypoint":
            _, _, point = label_studio.read_shape(result, size, location, skip)
            points += [[*point, int(bool(result.get("is_positive", True)))]] if point else []
        else:
            shapes.append({**result, "id": "context"})  # results with equal ids are one region
    annotations = label_studio.read_regions(shapes, size, location, skip)
    fields = _make_prompt_fields(annotations[0]) if annotations else {}
    fields |= {"points": points} if points else {}
    if not fields:
        raise InputError(f"{location}: the context has no shape that can be read; draw a box, a brush or keypoints")
    labels = label_studio.read_regions([{**results[0], "id": "context"}], size, location, skip)
    return [parse_prompt(fields, location, *size)], [labels[0].label if labels else None]
