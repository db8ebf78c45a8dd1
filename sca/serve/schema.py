"""What a client sends and gets, as it stands on the OpenAPI page. Coordinates are pixels of the image as its viewer
sees it: EXIF rotation applied, the corner at 0, 0.
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
    """The schema of a body that a route reads by itself; the parts it refers to are put on the application's page."""
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
    model_config = ConfigDict(extra="forbid")


class PromptIn(StrictModel):
    """One region: any of the three, together."""

    box: Annotated[Any, WithJsonSchema({"anyOf": [_BOX, {"type": "null"}]})] = None
    points: Annotated[Any, WithJsonSchema({"anyOf": [{"type": "array", "items": _POINT}, {"type": "null"}]})] = None
    mask: Annotated[Any, WithJsonSchema({"anyOf": [_RLE, {"type": "null"}]})] = None


class EverythingIn(StrictModel):
    """Settings of everything mode; fields that are omitted take the model's values."""

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
    """The regions of one image, and how they are to be captioned."""

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
    image: Annotated[str, Field(description="the file in base64, or a data: URL")]


class RleOut(BaseModel):
    """A mask in COCO's run-length code."""

    size: Annotated[list[int], Field(description="height, width")]
    counts: str


class AlternativeOut(BaseModel):
    caption: str
    score: float | None


class RegionOut(BaseModel):
    """A region as `sca caption` writes it; what is not known is null."""

    region_id: Annotated[int, Field(description="index of the prompt in the request")]
    prompt: dict[str, Any]
    box: list[float] | None
    mask: RleOut | None
    caption: str
    score: Annotated[float | None, Field(description="exp of the mean log-probability of a token")]
    predicted_iou: Annotated[float | None, Field(description="predicted for the mask")]
    alternatives: list[AlternativeOut] = []


class CaptionResponse(BaseModel):
    model: str
    width: int
    height: int
    regions: list[RegionOut]


class ErrorOut(BaseModel):
    """What was wrong, as the OpenAI API says it."""

    message: Annotated[str, Field(description="what is wrong and what to do, in one line")]
    type: Literal["invalid_request_error", "server_error"]
    param: Annotated[str | None, Field(description="the field of the request, if it is one")]
    code: Annotated[str, Field(description="what programs compare")]


class ErrorResponse(BaseModel):
    error: ErrorOut


class HealthResponse(BaseModel):
    status: Literal["ok", "draining", "down"]
    model: str
    device: str
    waiting: int
