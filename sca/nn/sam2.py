"""Load the models of SAM 2's family from transformers: SAM 2 and 2.1, EdgeTAM, and the tracker of SAM 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from transformers import (
    EdgeTamConfig,
    EdgeTamModel,
    PreTrainedConfig,
    PreTrainedModel,
    Sam2Config,
    Sam2Model,
    Sam3TrackerConfig,
    Sam3TrackerModel,
)

from sca.io.errors import InputError
from sca.io.hub import check_model_type, fetch_pretrained_config, load_pretrained

Sam2FamilyModel = Sam2Model | EdgeTamModel | Sam3TrackerModel

MODEL_CLASSES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "sam2": (Sam2Config, Sam2Model),
    "edgetam": (EdgeTamConfig, EdgeTamModel),
    "sam3_tracker": (Sam3TrackerConfig, Sam3TrackerModel),
}
DEFAULT_MODEL_TYPE = "sam2"
VIDEO_MODEL_TYPES = {  # published checkpoints are those of video models, which contain the image model
    "sam2_video": "sam2",
    "edgetam_video": "edgetam",
    "sam3_tracker_video": "sam3_tracker",
    "sam3_video": "sam3_tracker",
}
VIDEO_PREFIXES = (  # weights that only the video models have
    "memory_",
    "mask_downsample",
    "object_pointer_proj",
    "temporal_positional_encoding_projection_layer",
    "no_memory_positional_encoding",
    "no_object_pointer",
    "occlusion_spatial_embedding_parameter",
    "spatial_perceiver",
    "detector_model.",
    "vision_encoder.neck.fpn_layers.3.",  # the fourth level of SAM 3, which the tracker does not use
)
# transformers 5.23 saves the weights of the tracker in SAM 3's video model with a doubled prefix, which only that model
# loads. Published checkpoints have it once.
DOUBLED_PREFIX = {r"^tracker_model\.tracker_model\.(.+)": r"tracker_model.\1"}
NUM_LEVELS = 3  # feature maps at the strides of the grid, its half and its quarter


def load_sam2_model(weights: str, revision: str | None = None, model_type: str | None = None) -> Sam2FamilyModel:
    """Load a pretrained model of SAM 2's family.

    Args:
        weights: Hub id or folder in transformers' format, of the image model or of the video model.
        revision: Revision of the Hub id.
        model_type: Model that the weights must be of, a key of `MODEL_CLASSES`; None for any.

    Returns:
        The model with its weights, in float32.

    Raises:
        InputError: The weights belong to a different model or do not fit their configuration.
    """
    model_type = _read_model_type(weights, revision, model_type)
    _, model_class = MODEL_CLASSES[model_type]
    options = {"key_mapping": DOUBLED_PREFIX} if model_type == "sam3_tracker" else {}
    model = load_pretrained(model_class, weights, revision, VIDEO_PREFIXES, dtype="float32", **options)
    _check_feature_levels(model.config, weights)
    return cast("Sam2FamilyModel", model)  # see `MODEL_CLASSES`


def build_sam2_model(
    weights: str | None = None,
    revision: str | None = None,
    model_type: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Sam2FamilyModel:
    """Build a model of SAM 2's family with random weights.

    Args:
        weights: Hub id or folder whose configuration is used if `config` is None.
        revision: Revision of the Hub id.
        model_type: Model, a key of `MODEL_CLASSES`; None for that of the weights, or for SAM 2.
        config: Fields that differ from the defaults of the configuration.

    Returns:
        The model, in float32.

    Raises:
        ValueError: Neither `weights` nor `config` is set, or the model type is not supported.
    """
    if config is not None:
        _check_model_type(model_type)
        config_class, model_class = MODEL_CLASSES[model_type or DEFAULT_MODEL_TYPE]
        model_config = config_class(**config)
    elif weights is not None:
        config_class, model_class = MODEL_CLASSES[_read_model_type(weights, revision, model_type)]
        model_config = fetch_pretrained_config(config_class, weights, revision)
    else:
        raise ValueError(
            "neither weights nor config is set; set weights to a Hub id, such as weights=facebook/sam2.1-hiera-tiny, "
            "or to a folder"
        )
    model = model_class(model_config)
    _check_feature_levels(model.config, weights or "config")
    return cast("Sam2FamilyModel", model)  # see `MODEL_CLASSES`


def get_high_res_shapes(hidden_size: int) -> tuple[tuple[int, int], ...]:
    """Return channels and scale factor of the high-resolution features, by the factor: half and a quarter stride."""
    return ((hidden_size // 4, 2), (hidden_size // 8, 4))


def _read_model_type(weights: str, revision: str | None, model_type: str | None) -> str:
    """Return the type of the image model; InputError if it is not the requested one, or not of the family."""
    _check_model_type(model_type)
    image_types = [model_type] if model_type else list(MODEL_CLASSES)
    video_types = [name for name, image_type in VIDEO_MODEL_TYPES.items() if image_type in image_types]
    actual_type = check_model_type(weights, revision, [*image_types, *video_types], image_types)
    return VIDEO_MODEL_TYPES.get(actual_type, actual_type)


def _check_model_type(model_type: str | None) -> None:
    if model_type not in (None, *MODEL_CLASSES):
        raise ValueError(f"model_type is {model_type!r}; choose from {', '.join(MODEL_CLASSES)}")


def _check_feature_levels(config: PreTrainedConfig, source: str) -> None:
    """Check that the encoder has the three feature maps of the mask decoder; SAM 3 has a fourth, which is not used."""
    num_levels = getattr(config.vision_config, "num_feature_levels", NUM_LEVELS)
    if num_levels != NUM_LEVELS:
        raise InputError(f"{source} has {num_levels} feature levels; the mask decoder of SAM 2 takes {NUM_LEVELS}")
