"""Load the models of SAM 2's family from transformers: SAM 2 and 2.1, EdgeTAM, and the tracker of SAM 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from transformers import (
    AutoConfig,
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
from sca.io.hub import fetch_pretrained_config, load_pretrained

Sam2FamilyModel = Sam2Model | EdgeTamModel | Sam3TrackerModel

MODEL_CLASSES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "sam2": (Sam2Config, Sam2Model),
    "edgetam": (EdgeTamConfig, EdgeTamModel),
    "sam3_tracker": (Sam3TrackerConfig, Sam3TrackerModel),
}
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
)
NUM_LEVELS = 3  # feature maps at the strides of the grid, its half and its quarter


def load_sam2_model(weights: str, revision: str | None = None) -> Sam2FamilyModel:
    """Load a pretrained model of SAM 2's family.

    Args:
        weights: Hub id or folder in transformers' format, of the image model or of the video model.
        revision: Revision of the Hub id.

    Returns:
        The model with its weights, in float32.

    Raises:
        InputError: The weights belong to a different model or do not fit their configuration.
    """
    model_type = _read_model_type(weights, revision)
    _, model_class = MODEL_CLASSES[model_type]
    model = load_pretrained(model_class, weights, revision, VIDEO_PREFIXES, dtype="float32")
    _check_feature_levels(model.config, weights)
    return cast("Sam2FamilyModel", model)  # see `MODEL_CLASSES`


def build_sam2_model(
    weights: str | None = None, revision: str | None = None, config: Mapping[str, Any] | None = None
) -> Sam2FamilyModel:
    """Build a model of SAM 2's family with random weights.

    Args:
        weights: Hub id or folder whose configuration is used if `config` is None.
        revision: Revision of the Hub id.
        config: Fields that differ from the defaults of the configuration; `model_type` selects the model.

    Returns:
        The model, in float32.

    Raises:
        ValueError: Neither `weights` nor `config` is set, or the model type is not supported.
    """
    if config is not None:
        fields = dict(config)
        model_type = str(fields.pop("model_type", "sam2"))
        config_class, model_class = _get_model_classes(model_type, "config")
        model_config = config_class(**fields)
    elif weights is not None:
        config_class, model_class = _get_model_classes(_read_model_type(weights, revision), weights)
        model_config = fetch_pretrained_config(config_class, weights, revision)
    else:
        raise ValueError("weights and config are missing; set weights=facebook/sam2.1-hiera-tiny, or a folder")
    model = model_class(model_config)
    _check_feature_levels(model.config, weights or "config")
    return cast("Sam2FamilyModel", model)  # see `MODEL_CLASSES`


def get_high_res_shapes(hidden_size: int) -> tuple[tuple[int, int], ...]:
    """Return channels and scale factor of the high-resolution features, by the factor: half and a quarter stride."""
    return ((hidden_size // 4, 2), (hidden_size // 8, 4))


def _read_model_type(weights: str, revision: str | None) -> str:
    config = fetch_pretrained_config(AutoConfig, weights, revision)
    model_type = VIDEO_MODEL_TYPES.get(config.model_type, config.model_type)
    _get_model_classes(model_type, weights)
    return model_type


def _get_model_classes(model_type: str, source: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    if model_type not in MODEL_CLASSES:
        raise InputError(
            f"{source} has the model type {model_type!r}, which is not of SAM 2's family: {', '.join(MODEL_CLASSES)}"
        )
    return MODEL_CLASSES[model_type]


def _check_feature_levels(config: PreTrainedConfig, source: str) -> None:
    """Check that the encoder has the three feature maps of the mask decoder; SAM 3 has a fourth, which is not used."""
    num_levels = getattr(config.vision_config, "num_feature_levels", NUM_LEVELS)
    if num_levels != NUM_LEVELS:
        raise InputError(f"{source} has {num_levels} feature levels; the mask decoder of SAM 2 takes {NUM_LEVELS}")
