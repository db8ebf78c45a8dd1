"""Routes of Label Studio's machine learning backends: predictions for tasks, also while a person annotates.

Protocol: https://labelstud.io/guide/ml and `label_studio/ml/api_connector.py` in
https://github.com/HumanSignal/label-studio. The address and the access token of Label Studio in a request are ignored:
images are downloaded as `TaskImageReader` allows.
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Annotated, Any, NamedTuple

from anyio import to_thread
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from sca_registry.contracts import Caption, Prompt
from starlette.requests import ClientDisconnect

from sca.io.annotations import label_studio
from sca.io.annotations.annotation import Annotation, SkipCounter
from sca.io.errors import InputError
from sca.io.prompts import parse_prompt
from sca.io.text import format_count
from sca.output.captioned_image import ImageSize
from sca.output.jsonl import caption_to_record, replace_non_finite
from sca.output.label_studio import make_results
from sca.output.labeling_interface import LabelingInterface, parse_labeling_interface
from sca.serve.errors import ApiError, to_api_error
from sca.serve.inference_requests import DeadlineExceededError, SchedulerError
from sca.serve.schema import CaptionRequest, RegionPrompt, add_body_schema
from sca.serve.service import ERROR_RESPONSES, JSON_MEDIA_TYPE, CaptionService
from sca.serve.task_images import TaskImageReader

MAX_TASKS = 1000  # tasks per request
NO_PREDICTION = b"[]"  # in the results, for a task that failed
TASK_ERROR_STATUSES = (413, 422)  # of errors that concern one task; others fail the request
MASK_CODEC_BYTES_PER_PIXEL = 6  # peak memory while a brush or bitmask is decoded, or a mask is encoded as a brush

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
        predictor = TaskPredictor(service, images, request, interface, context.result if context else [])
        predictions = await predictor.predict(prediction_request.tasks)
        model_version = json.dumps(service.model_name).encode()
        chunks = (b'{"results":[', *predictions, b'],"model_version":', model_version, b"}")
        return StreamingResponse(iter(chunks), media_type=JSON_MEDIA_TYPE)


class _TaskShapes(NamedTuple):
    """Shapes of a task.

    Attributes:
        task: Task.
        location: Task, for messages.
        results: Results with the shapes; empty for everything mode.
        skip: Counter of skipped contents.
    """

    task: Mapping[str, Any]
    location: str
    results: list[Mapping[str, Any]]
    skip: SkipCounter


class TaskPredictor:
    """Predictor of the tasks of one request.

    The memory lease of the request covers its body, the predictions of its previous tasks, and its current task.

    Args:
        service: Service with the model.
        images: Reader of the images.
        request: HTTP request, whose body was read.
        interface: Labeling interface of the project.
        context_results: Results of a smart tool, which form one region of each task; empty without one.
    """

    def __init__(
        self,
        service: CaptionService,
        images: TaskImageReader,
        request: Request,
        interface: LabelingInterface,
        context_results: Sequence[Mapping[str, Any]],
    ):
        self.service = service
        self.images = images
        self.request = request
        self.interface = interface
        self.context_results = context_results

    async def predict(self, tasks: Sequence[Mapping[str, Any]]) -> list[bytes]:
        """Predict the regions of tasks.

        A task that fails is logged, and has an empty list instead of a prediction. Label Studio then stores the
        predictions of the other tasks only; see https://github.com/HumanSignal/label-studio/pull/5982.

        Args:
            tasks: Tasks of Label Studio.

        Returns:
            The predictions as JSON, with commas between them.

        Raises:
            ApiError: All tasks fail, such as because of an image that cannot be read (422) or is too large (413).
            ClientDisconnect: The client has disconnected.
            DeadlineExceededError: The deadline of the request has passed.
            InputError: All tasks fail because their shapes are invalid, or have no control.
            MemoryBudgetError: There is not enough memory.
        """
        tasks_with_shapes = [self._list_shapes(task, number) for number, task in enumerate(tasks)]
        self._check_counts([each.results for each in tasks_with_shapes])
        predictions: list[bytes] = []
        failures: list[Exception] = []
        for number, task_shapes in enumerate(tasks_with_shapes):
            if await self.request.is_disconnected():
                raise ClientDisconnect
            kept_bytes = self.request.state.lease.leased_bytes
            try:
                predictions += [b",", *await self._predict_task(task_shapes)]
            except DeadlineExceededError:
                raise DeadlineExceededError(
                    f"{number} of {format_count(len(tasks), 'task')} completed within {self.service.limits.timeout:g} "
                    "s; send fewer tasks per request, or increase --timeout"
                ) from None
            except (ApiError, InputError, SchedulerError) as error:
                if to_api_error(error).status not in TASK_ERROR_STATUSES:
                    raise
                self.request.state.lease.resize(kept_bytes)
                predictions += [b",", NO_PREDICTION]
                failures.append(error)
                log.warning("sca: %s has no prediction: %s", task_shapes.location, error)
        if len(failures) == len(tasks):
            raise failures[0]
        return predictions[1:]

    def _list_shapes(self, task: Mapping[str, Any], number: int) -> _TaskShapes:
        skip, location = SkipCounter(), f"task {task.get('id', number)!r:.40}"
        results = self.context_results or _list_results(task, location, skip)
        shapes = [each for each in results if self._is_shape(each)]
        if self.context_results and not shapes:
            raise InputError(f"{location}: the context has no shape on the image {self.interface.image!r}; draw one")
        return _TaskShapes(task, location, shapes, skip)

    def _check_counts(self, results_per_task: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Check the number of shapes and keypoints, before an image is downloaded or a mask is decoded."""
        num_points_per_task = [
            [int(label_studio.get_shape_type(each) == "keypoint") for each in results] for results in results_per_task
        ]
        point_counts = (
            [sum(each) for each in num_points_per_task] if self.context_results else chain(*num_points_per_task)
        )
        self.service.check_prompt_counts(list(point_counts))

    async def _predict_task(self, task_shapes: _TaskShapes) -> list[bytes]:
        """Return the prediction of a task as chunks of JSON, which stay in the memory lease."""
        service, request, lease = self.service, self.request, self.request.state.lease
        task, location, results, skip = task_shapes
        kept_bytes = lease.leased_bytes
        seconds = service.get_deadline(request) - asyncio.get_running_loop().time()
        image_bytes = await self.images.read(self._find_image(task, location), location, seconds, lease)
        num_masks = sum(map(label_studio.has_mask, results))
        image = await service.decode_request_image(
            request, image_bytes, num_masks, f"the image of {location}", kept_bytes, MASK_CODEC_BYTES_PER_PIXEL
        )
        del image_bytes
        prompts, labels = await self._decode_prompts(task_shapes, image.size)
        if summary := skip.summarize():
            log.warning("sca: %s", summary)
        caption_request = CaptionRequest(prompts=[RegionPrompt()] * len(prompts), everything=not results)
        service.check_request(caption_request)
        inference_request = await service.make_inference_request(request, caption_request, image, prompts or None)
        captions = await service.collect_captions(request, inference_request)
        if len(captions) < len(prompts):
            raise ClientDisconnect
        chunks = await self._make_prediction(captions, image.size, labels)
        lease.resize(kept_bytes + sum(map(len, chunks)))
        return chunks

    async def _decode_prompts(
        self, task_shapes: _TaskShapes, size: tuple[int, int]
    ) -> tuple[list[Prompt], list[Sequence[str]]]:
        """Return a prompt and its labels per region. Invalid regions are skipped, if others are valid."""
        if not task_shapes.results:
            return [], []
        read = _read_context_prompt if self.context_results else _read_prompts
        prompts, labels = await self.service.process_masks(
            self.request, partial(read, task_shapes.results, size, task_shapes.location, task_shapes.skip)
        )
        if not prompts:
            raise InputError(
                f"{task_shapes.location}: no shape can be used ({task_shapes.skip.summarize()}); correct or delete it"
            )
        return prompts, labels

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

    async def _make_prediction(
        self, captions: Sequence[Caption], size: tuple[int, int], labels: Sequence[Sequence[str]]
    ) -> list[bytes]:
        """Return a prediction as chunks of JSON. Each region is encoded in a turn of its own."""
        chunks = list[bytes]()

        def encode_region(caption: Caption, region_labels: Sequence[str]) -> bytes:
            record = caption_to_record("", ImageSize(*size), caption)
            results = make_results(record, uuid.uuid4().hex[:10], self.interface, region_labels)
            return ",".join(json.dumps(each, allow_nan=False, separators=(",", ":")) for each in results).encode()

        for caption, region_labels in zip(captions, labels or [()] * len(captions), strict=True):
            chunk = await self.service.process_masks(self.request, partial(encode_region, caption, region_labels))
            self.request.state.lease.add(len(chunk))
            chunks += [b",", chunk] if chunks else [chunk]
        scores = [score for each in captions if (score := replace_non_finite(each.score)) is not None]
        score = sum(scores) / len(scores) if scores else None
        header = json.dumps({"model_version": self.service.model_name, "score": score})[:-1]
        return [f'{header}, "result":['.encode(), *chunks, b"]}"]


def _list_results(task: Mapping[str, Any], location: str, skip: SkipCounter) -> list[Mapping[str, Any]]:
    """Return the results of the annotation or draft of a task; predictions are not prompts."""
    annotation = label_studio.choose_annotation({**task, "predictions": []}, location, skip)
    results = annotation.get("result")
    return [each for each in results if isinstance(each, Mapping)] if isinstance(results, list) else []


def _read_prompts(
    results: Sequence[Mapping[str, Any]], size: tuple[int, int], location: str, skip: SkipCounter
) -> tuple[list[Prompt], list[Sequence[str]]]:
    """Return a prompt and its labels per region; count regions that are invalid."""

    def count_invalid(error: ValueError) -> None:
        skip("invalid region", str(error))

    prompts, labels = list[Prompt](), list[Sequence[str]]()
    for annotation in label_studio.read_regions(results, size, location, skip, count_invalid):
        try:
            prompts.append(parse_prompt(_make_prompt_fields(annotation), annotation.location, *size))
        except InputError as error:
            count_invalid(error)
        else:
            labels.append(annotation.separate_labels)
    return prompts, labels


def _make_prompt_fields(annotation: Annotation) -> dict[str, Any]:
    if annotation.mask:
        return {"mask": annotation.mask}
    return {"box": annotation.box} if annotation.box else {"points": [[*(annotation.point or ()), 1]]}


def _read_context_prompt(
    results: Sequence[Mapping[str, Any]], size: tuple[int, int], location: str, skip: SkipCounter
) -> tuple[list[Prompt], list[Sequence[str]]]:
    """Return the prompt of the shapes of a smart tool, and the labels of the first shape."""
    if any(map(label_studio.is_image_rotated, results)):
        raise InputError(f"{location}: the image is rotated in Label Studio; reset the rotation")
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
    return [parse_prompt(fields, location, *size)], [label_studio.read_labels(results[0])]
