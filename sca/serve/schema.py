"""Schemas of requests and responses, shown on the OpenAPI page.

Coordinates are pixels of the image with its EXIF orientation applied; the top left corner is 0, 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, WithJsonSchema

from sca.inference.find_options import DEFAULT_THRESHOLD
from sca.serve.limits import (
    MAX_BEAMS,
    MAX_CROP_LAYERS,
    MAX_MATCHES,
    MAX_NEW_TOKENS,
    MAX_POINTS_PER_SIDE,
    MAX_SEED,
    MAX_TASK_LENGTH,
    MAX_TEXT_LENGTH,
    MIN_SEED,
)

if TYPE_CHECKING:
    from fastapi import FastAPI

_NUMBER = {"type": "number"}
_BOX = {
    "type": "array",
    "items": _NUMBER,
    "minItems": 4,
    "maxItems": 4,
    "description": "Box as x1, y1, x2, y2 in pixels.",
}
_NON_NEGATIVE_INTEGER = {"type": "integer", "minimum": 0}
_SIZE = {
    "type": "array",
    "items": _NON_NEGATIVE_INTEGER,
    "minItems": 2,
    "maxItems": 2,
    "description": "Height and width of the image in pixels.",
}
_COUNTS = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": _NON_NEGATIVE_INTEGER}],
    "description": "Run lengths in column-major order: a compressed string or a list of integers.",
}
_RLE = {
    "type": "object",
    "properties": {"size": _SIZE, "counts": _COUNTS},
    "required": ["size", "counts"],
    "description": "Mask as COCO RLE.",
}
_POINT = {
    "type": "array",
    "items": _NUMBER,
    "minItems": 2,
    "maxItems": 3,
    "description": "Point as x, y in pixels and an optional label: 1 foreground (default), 0 background.",
}


def add_body_schema(app: FastAPI, model: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON schema of a body that a route parses itself, and add its definitions to the OpenAPI document.

    Args:
        app: Application; its method `openapi` is replaced.
        model: Model of the body.

    Returns:
        The JSON schema, which refers to the definitions.
    """
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions, default_openapi = schema.pop("$defs", {}), app.openapi

    def build_openapi() -> dict[str, Any]:
        document = default_openapi()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for name, definition in definitions.items():
            schemas.setdefault(name, definition)
        return document

    app.openapi = build_openapi  # type: ignore[method-assign]  # as FastAPI documents
    return schema


class StrictModel(BaseModel):
    """Base model that rejects unknown fields."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


class RegionPrompt(StrictModel):
    """Prompt of one region: a box, points, a mask, or any combination, in image pixels."""

    box: Annotated[
        Any, WithJsonSchema({"anyOf": [_BOX, {"type": "null"}], "description": "Box around the region."})
    ] = None
    points: Annotated[
        Any,
        WithJsonSchema(
            {
                "anyOf": [{"type": "array", "items": _POINT}, {"type": "null"}],
                "description": "Points on the region and on its background.",
            }
        ),
    ] = None
    mask: Annotated[Any, WithJsonSchema({"anyOf": [_RLE, {"type": "null"}], "description": "Mask of the region."})] = (
        None
    )


class EverythingParameters(StrictModel):
    """Options of everything mode; omitted fields default to the values of the model."""

    points_per_side: Annotated[
        int | None, Field(ge=1, le=MAX_POINTS_PER_SIDE, description="Points per side of the prompt grid.")
    ] = None
    pred_iou_thresh: Annotated[float | None, Field(ge=0, le=1, description="Minimum predicted IoU of a mask.")] = None
    stability_score_thresh: Annotated[
        float | None, Field(ge=0, le=1, description="Minimum stability score of a mask.")
    ] = None
    box_nms_thresh: Annotated[
        float | None, Field(ge=0, le=1, description="IoU threshold for non-maximum suppression of boxes.")
    ] = None
    mask_nms_thresh: Annotated[
        float | None,
        Field(ge=0, le=1, description="IoU threshold for non-maximum suppression of masks; 1 disables it."),
    ] = None
    min_area: Annotated[
        float | None, Field(ge=0, le=1, description="Minimum region area as a fraction of the image.")
    ] = None
    crop_n_layers: Annotated[
        int | None,
        Field(
            ge=0,
            le=MAX_CROP_LAYERS,
            description="Number of image crop layers to search in addition to the full image.",
        ),
    ] = None
    caption_from: Annotated[
        Literal["box-and-point", "box", "point"] | None,
        Field(description="Prompt used to caption the regions of everything mode."),
    ] = None
    max_regions: Annotated[int | None, Field(ge=1, description="Maximum number of regions, best first.")] = None


class CaptionRequest(StrictModel):
    """Regions of one image and options of generation; omitted options default to the values of the model."""

    prompts: Annotated[
        list[RegionPrompt], Field(description="One prompt per region. Mutually exclusive with `everything`.")
    ] = []
    everything: Annotated[
        StrictBool | EverythingParameters,
        Field(description="Find and caption all regions: true, or options of the search."),
    ] = False
    zoom: Annotated[
        Literal["auto", "off"] | Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)] | None,
        Field(
            description="Predict small regions from crops: `auto` (up to the measured size of the model), `off`, or "
            "the maximum area of these regions in cells of the feature grid. Defaults to the setting of the server."
        ),
    ] = None
    task: Annotated[
        str,
        Field(
            max_length=MAX_TASK_LENGTH,
            description="Generate captions (`caption`) or class names (`recognition`), or another task of the model.",
        ),
    ] = "caption"
    question: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=MAX_TEXT_LENGTH,
            description="Question to answer about each region instead of captioning it. `<region 1>` refers to the "
            "first prompt, `<region 2>` to the second; such a question has one answer. Requires a model that supports "
            "questions.",
        ),
    ] = None
    length: Annotated[
        Literal["short", "phrase", "full"] | None,
        Field(description="Length of the captions. Requires a model that is trained with lengths."),
    ] = None
    num_beams: Annotated[int | None, Field(ge=1, le=MAX_BEAMS, description="Number of beams for beam search.")] = None
    num_captions: Annotated[int | None, Field(ge=1, le=MAX_BEAMS, description="Captions per region, best first.")] = (
        None
    )
    max_new_tokens: Annotated[
        int | None, Field(ge=1, le=MAX_NEW_TOKENS, description="Maximum number of tokens per caption.")
    ] = None
    do_sample: Annotated[StrictBool, Field(description="Sample tokens instead of choosing the likeliest ones.")] = False
    temperature: Annotated[
        float | None, Field(ge=0.01, le=100, description="Sampling temperature; requires `do_sample`.")
    ] = None
    top_p: Annotated[
        float | None, Field(ge=0, le=1, description="Probability mass for nucleus sampling; requires `do_sample`.")
    ] = None
    seed: Annotated[int | None, Field(ge=MIN_SEED, le=MAX_SEED, description="Random seed for sampling.")] = None
    return_masks: Annotated[StrictBool, Field(description="Return the mask of each region.")] = True
    stream: Annotated[
        StrictBool, Field(description="Send each region as a server-sent event as soon as it is captioned.")
    ] = False


class JsonCaptionRequest(CaptionRequest):
    """Caption request with the image, for JSON bodies."""

    image: Annotated[str, Field(description="Image file as base64 or as a data: URL in base64.")]


class FindRequest(StrictModel):
    """Text to find, and the regions of one image to search."""

    text: Annotated[str, Field(max_length=MAX_TEXT_LENGTH, description="Word or phrase to find.")]
    prompts: Annotated[
        list[RegionPrompt], Field(description="One prompt per region. Mutually exclusive with `everything`.")
    ] = []
    everything: Annotated[
        StrictBool | EverythingParameters,
        Field(description="Search all regions: true, or options of the search. The default without `prompts`."),
    ] = False
    top: Annotated[int, Field(ge=1, le=MAX_MATCHES, description="Maximum number of regions, best first.")] = 10
    threshold: Annotated[
        float,
        Field(
            allow_inf_nan=False,
            description="Minimum score: 1 if the text is certain, 0 if it is as likely without an image.",
        ),
    ] = DEFAULT_THRESHOLD
    return_masks: Annotated[StrictBool, Field(description="Return the mask of each region.")] = True


class JsonFindRequest(FindRequest):
    """Find request with the image, for JSON bodies."""

    image: Annotated[str, Field(description="Image file as base64 or as a data: URL in base64.")]


class RleMask(BaseModel):
    """Mask as COCO RLE in image pixels."""

    size: Annotated[list[int], Field(description="Height and width of the image in pixels.")]
    counts: Annotated[str, Field(description="Compressed run lengths in column-major order.")]


class AlternativeCaption(BaseModel):
    """Alternative caption of a region."""

    caption: Annotated[str, Field(description="Text of the caption.")]
    score: Annotated[float | None, Field(description="Score in [0, 1]: exponential of the mean token log-probability.")]


class RegionResult(BaseModel):
    """Captioned region, with the fields of `sca caption`; null if not available."""

    region_id: Annotated[int, Field(description="Index of the region: in `prompts`, or by predicted IoU.")]
    prompt: Annotated[dict[str, Any], Field(description="Prompt of the region.")]
    box: Annotated[list[float] | None, Field(description="Box as x1, y1, x2, y2 in pixels.")]
    mask: Annotated[RleMask | None, Field(description="Mask of the region.")]
    caption: Annotated[str, Field(description="Caption, or class name for the task `recognition`.")]
    score: Annotated[
        float | None,
        Field(description="Score of the caption in [0, 1]: exponential of the mean token log-probability."),
    ]
    predicted_iou: Annotated[float | None, Field(description="Predicted IoU of the mask; can exceed 1.")]
    confidence: Annotated[
        float | None, Field(description="Probability that the caption is correct, if the model is calibrated.")
    ] = None
    ood_score: Annotated[
        float | None,
        Field(description="Distance of the image to the training images; above 1, the image is unlike them."),
    ] = None
    question: Annotated[
        str | None, Field(description="Question, or request for a length, that `caption` responds to.")
    ] = None
    alternatives: Annotated[
        list[AlternativeCaption], Field(description="Further captions, best first, if `num_captions` is above 1.")
    ] = []


class MatchResult(RegionResult):
    """Region that matches a text, with its greedy caption."""

    name: Annotated[str, Field(description="Text of the request.")]
    proposal_score: Annotated[
        float, Field(description="Score of the text: 1 if it is certain, 0 if it is as likely without an image.")
    ]


class FindResponse(BaseModel):
    """Regions of one image that match a text."""

    model: Annotated[str, Field(description="Name of the model.")]
    width: Annotated[int, Field(description="Width of the image in pixels.")]
    height: Annotated[int, Field(description="Height of the image in pixels.")]
    num_regions: Annotated[int, Field(description="Number of regions searched.")]
    regions: Annotated[list[MatchResult], Field(description="Matches, best first.")]


class CaptionResponse(BaseModel):
    """Captions of the regions of one image."""

    model: Annotated[str, Field(description="Name of the model.")]
    width: Annotated[int, Field(description="Width of the image in pixels.")]
    height: Annotated[int, Field(description="Height of the image in pixels.")]
    regions: Annotated[
        list[RegionResult],
        Field(description="Regions in the order of `prompts`, or those of `everything` by predicted IoU."),
    ]


class ErrorObject(BaseModel):
    """Error object in the format of the OpenAI API."""

    message: Annotated[str, Field(description="Problem and fix in one line.")]
    type: Annotated[
        Literal["invalid_request_error", "server_error"], Field(description="Whether the request or the server failed.")
    ]
    param: Annotated[str | None, Field(description="Invalid field of the request, if any.")]
    code: Annotated[str, Field(description="Machine-readable error code.")]


class ErrorResponse(BaseModel):
    """Response body of an error."""

    error: ErrorObject


class HealthResponse(BaseModel):
    """State of the server."""

    status: Annotated[
        Literal["ok", "draining", "down"],
        Field(description="`ok`: accepts requests; `draining`: shutting down; `down`: stopped or crashed."),
    ]
    model: Annotated[str, Field(description="Name of the model.")]
    device: Annotated[str, Field(description="Device of the model, such as `cpu` or `cuda:0`.")]
    queued_regions: Annotated[int, Field(description="Regions queued or in progress.")]
