"""Schemas of requests and responses, shown on the OpenAPI page.

Coordinates are pixels of the image with its EXIF orientation applied; the top left corner is 0, 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, WithJsonSchema

from sca.serve.limits import MAX_BEAMS, MAX_CROP_LAYERS, MAX_NEW_TOKENS, MAX_POINTS_PER_SIDE, MAX_SEED, MIN_SEED

if TYPE_CHECKING:
    from fastapi import FastAPI

_NUMBER = {"type": "number"}
_BOX = {"type": "array", "items": _NUMBER, "minItems": 4, "maxItems": 4, "description": "x1, y1, x2, y2"}
_NON_NEGATIVE_INTEGER = {"type": "integer", "minimum": 0}
_SIZE = {
    "type": "array",
    "items": _NON_NEGATIVE_INTEGER,
    "minItems": 2,
    "maxItems": 2,
    "description": "height, width: the image's",
}
_COUNTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": _NON_NEGATIVE_INTEGER}]}
_RLE = {"type": "object", "properties": {"size": _SIZE, "counts": _COUNTS}, "required": ["size", "counts"]}
_POINT = {
    "type": "array",
    "items": _NUMBER,
    "minItems": 2,
    "maxItems": 3,
    "description": "x, y, and 1 inside, 0 outside",
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

    app.openapi = build_openapi  # type: ignore[method-assign]
    return schema


class StrictModel(BaseModel):
    """Base model that rejects unknown fields."""

    model_config = ConfigDict(extra="forbid")


class PromptIn(StrictModel):
    """Prompt of one region: a box, points, a mask, or any combination, in image pixels."""

    box: Annotated[Any, WithJsonSchema({"anyOf": [_BOX, {"type": "null"}]})] = None
    points: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "array", "items": _POINT}, {"type": "null"}]})] = None
    mask: Annotated[Any, WithJsonSchema({"anyOf": [_RLE, {"type": "null"}]})] = None


class EverythingIn(StrictModel):
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
    caption_from: Literal["box-and-point", "box", "point"] | None = None
    max_regions: Annotated[int | None, Field(ge=1, description="Maximum regions, best first.")] = None


class CaptionRequest(StrictModel):
    """Regions of one image and options of generation; omitted options default to the values of the model."""

    prompts: list[PromptIn] = []
    everything: StrictBool | EverythingIn = False
    task: Literal["caption", "recognition"] = "caption"
    num_beams: Annotated[int | None, Field(ge=1, le=MAX_BEAMS)] = None
    num_captions: Annotated[int | None, Field(ge=1, le=MAX_BEAMS, description="Captions per region, best first.")] = (
        None
    )
    max_new_tokens: Annotated[int | None, Field(ge=1, le=MAX_NEW_TOKENS)] = None
    do_sample: StrictBool = False
    temperature: Annotated[
        float | None, Field(ge=0.01, le=100, description="Sampling temperature; requires `do_sample`.")
    ] = None
    top_p: Annotated[
        float | None, Field(ge=0, le=1, description="Probability mass for nucleus sampling; requires `do_sample`.")
    ] = None
    seed: Annotated[int | None, Field(ge=MIN_SEED, le=MAX_SEED, description="Random seed for sampling.")] = None
    masks: Annotated[StrictBool, Field(description="whether masks are to be in the answer")] = True
    stream: Annotated[StrictBool, Field(description="server-sent events: a region as soon as it is there")] = False


class JsonCaptionRequest(CaptionRequest):
    """Caption request with the image, for JSON bodies."""

    image: Annotated[str, Field(description="the file in base64, or a data: URL")]


class RleOut(BaseModel):
    """Mask as COCO RLE in image pixels."""

    size: Annotated[list[int], Field(description="height, width")]
    counts: str


class AlternativeOut(BaseModel):
    """Alternative caption of a region, and its score in 0..1."""

    caption: str
    score: float | None


class RegionOut(BaseModel):
    """Captioned region, with the fields of `sca caption`; null if not available."""

    region_id: Annotated[int, Field(description="index of the prompt in the request")]
    prompt: dict[str, Any]
    box: list[float] | None
    mask: RleOut | None
    caption: str
    score: Annotated[float | None, Field(description="exp of the mean log-probability of a token")]
    predicted_iou: Annotated[float | None, Field(description="predicted for the mask")]
    alternatives: list[AlternativeOut] = []


class CaptionResponse(BaseModel):
    """Captions of one image; width and height are those of the image in pixels."""

    model: str
    width: int
    height: int
    regions: list[RegionOut]


class ErrorOut(BaseModel):
    """Error object in the format of the OpenAI API."""

    message: Annotated[str, Field(description="what is wrong and what to do, in one line")]
    type: Literal["invalid_request_error", "server_error"]
    param: Annotated[str | None, Field(description="the field of the request, if it is one")]
    code: Annotated[str, Field(description="what programs compare")]


class ErrorResponse(BaseModel):
    """Response body of an error."""

    error: ErrorOut


class HealthResponse(BaseModel):
    """State of the server; `waiting` is the number of regions queued or in progress."""

    status: Literal["ok", "draining", "down"]
    model: str
    device: str
    waiting: int
