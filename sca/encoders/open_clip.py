"""Image towers of open_clip (github.com/mlfoundations/open_clip) by name: CLIP, EVA-CLIP, SigLIP and others."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sca_registry.contracts import ImageFormat
from sca_registry.errors import format_choices, suggest_name
from torch import Tensor, nn

from sca.encoders.timm import IntermediateLayer, make_image_format, resolve_layer
from sca.io.hub import OPEN_CLIP_PREFIX, fetch_model_folder, fetch_weight_file, find_local_file
from sca.io.json import read_json
from sca.io.weight_files import translate_load_errors
from sca.nn.feature_shape import probe_feature_shape

MINIMAL_TEXT_CONFIG = {"width": 1, "heads": 1, "layers": 1, "vocab_size": 1, "context_length": 1}
CONFIG_FILE = f"{OPEN_CLIP_PREFIX}config.json"


class OpenClipEncoder(nn.Module):
    """Image encoder that returns the features of one layer of an open_clip image tower.

    It maps normalized images (B, 3, S, S) to features (B, C, S/stride, S/stride).

    Args:
        model: Name in open_clip; None reads it from the folder of the weights.
        weights: Hub id or folder in open_clip's format.
        revision: Revision of the Hub id.
        pretrained: True loads `weights`, False initializes randomly. A tag of the model in open_clip, or a file, is
            loaded instead of `weights`.
        image_size: S in pixels; None for the tower's own. Position embeddings are resized.
        feature_layer: Index of the block, negative from the end. The output of the last block of a plain ViT is
            normalized.
        resize_mode: "pad" or "stretch", see `ImageFormat`.
        config: Fields of the tower's `vision_cfg` to override.

    Raises:
        ValueError: The model, tag or layer does not exist, or the options are incomplete or contradictory.
    """

    default_segmenter = "box"
    file_prefix: str = OPEN_CLIP_PREFIX  # prefix of the file names
    channels: int
    stride: int

    def __init__(
        self,
        model: str | None = None,
        weights: str | None = None,
        revision: str | None = None,
        pretrained: bool | str = True,
        image_size: int | None = None,
        feature_layer: int = -1,
        resize_mode: str = "pad",
        config: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        if isinstance(pretrained, str) and weights:
            raise ValueError(f"weights={weights} and pretrained={pretrained} are mutually exclusive; omit one of them")
        pretrained_config = resolve_pretrained_config(model, pretrained, weights)
        if isinstance(pretrained, str):
            weights, self.file_prefix = _resolve_weights(model, pretrained, pretrained_config)
        if weights is None and (pretrained or not model):
            raise ValueError("no weights; set pretrained to a tag or a file, or weights to a folder or a Hub id")
        source = (model or "") if weights is None else weights
        file = fetch_weight_file(source, revision, self.file_prefix) if pretrained else None
        folder = (
            file.parent
            if file
            else None
            if model
            else fetch_model_folder(source, revision, False, prefix=self.file_prefix)
        )
        preprocessing = {**pretrained_config, **_read_preprocessing(folder)}
        with translate_load_errors(source if pretrained else model or source):
            tower = _build_image_tower(
                model or f"local-dir:{folder}", file, image_size, config, bool(pretrained_config.get("quick_gelu"))
            )
        self.source = weights  # even if the weights are not loaded
        self.checkpoint: str | None = weights if pretrained else None
        self.revision = revision
        self.visual: IntermediateLayer | TowerLayer = (
            IntermediateLayer(tower.trunk, feature_layer)
            if hasattr(tower, "trunk")
            else TowerLayer(tower, feature_layer)
        )
        input_size = image_size or max(tower.image_size) if isinstance(tower.image_size, tuple) else tower.image_size
        self.image_format: ImageFormat = make_image_format(input_size, preprocessing, resize_mode)
        self.channels, self.stride = probe_feature_shape(self.visual, self.image_format.size, self.visual.stride)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images: (B, 3, S, S) -> (B, C, S/stride, S/stride)."""
        return self.visual(pixel_values)


class TowerLayer(nn.Module):
    """Layer of open_clip's own ViT or ResNet: (B, 3, S, S) -> (B, C, h, w). Later layers are removed.

    Args:
        tower: Image tower.
        layer: Index of the layer, negative from the end.

    Raises:
        ValueError: The layer does not exist.
    """

    tower: Any  # module with `forward_intermediates`
    stride: int | None
    layer_index: int
    is_last: bool

    def __init__(self, tower: Any, layer: int):
        super().__init__()
        is_vit = hasattr(tower, "transformer")
        num_layers = tower.transformer.layers if is_vit else 5
        self.layer_index, self.is_last = resolve_layer(layer, num_layers, type(tower).__name__)
        self.tower = tower.eval()
        self.stride = tower.patch_size[0] if is_vit else None
        if is_vit and tower.attn_pool is not None:
            self.is_last = False  # the final norm applies to pooled features
        if is_vit:
            tower.prune_intermediate_layers([self.layer_index], prune_norm=not self.is_last)
        else:
            tower.attnpool = None

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the features of the layer, (B, C, h, w)."""
        options = {"indices": [self.layer_index], "stop_early": True, "normalize_intermediates": self.is_last}
        return self.tower.forward_intermediates(pixel_values, intermediates_only=True, **options)[
            "image_intermediates"
        ][0]


def resolve_pretrained_config(model: str | None, pretrained: bool | str, weights: str | None) -> dict[str, Any]:
    """Return open_clip's config of pretrained weights by tag or Hub id: location, mean, std, interpolation, GELU.

    Args:
        model: Name in open_clip; None returns the defaults.
        pretrained: Tag of the weights, or whether they are loaded.
        weights: Hub id.

    Returns:
        The config of the tag or of the Hub id, or else that of other weights of the model.

    Raises:
        ValueError: open_clip has no such model.
    """
    environment_before = dict(os.environ)
    import open_clip  # optional dependency
    from open_clip.transform import PreprocessCfg

    # importing open_clip disables the parallelism of tokenizers for the whole process
    for variable in os.environ.keys() - environment_before:
        del os.environ[variable]
    preprocessing = PreprocessCfg()
    defaults = {"mean": preprocessing.mean, "std": preprocessing.std, "interpolation": preprocessing.interpolation}
    if model is None:
        return defaults
    if open_clip.get_model_config(model) is None:
        hint = suggest_name(model, open_clip.list_models())
        raise ValueError(f"open_clip has no model {model!r}.{hint} List all models with open_clip.list_models().")
    configs_by_tag = {
        tag: open_clip.get_pretrained_cfg(model, tag) for tag in open_clip.list_pretrained_tags_by_model(model)
    }
    if isinstance(pretrained, str) and pretrained in configs_by_tag:
        return configs_by_tag[pretrained]
    matches = [each for each in configs_by_tag.values() if weights and each["hf_hub"].rstrip("/") == weights]
    if matches:
        return matches[0]
    # weights of a model share their preprocessing, but not always QuickGELU
    family_config = next(iter(configs_by_tag.values()), defaults)
    return {**family_config, "quick_gelu": False}


def _resolve_weights(model: str | None, pretrained: str, pretrained_config: Mapping[str, Any]) -> tuple[str, str]:
    """Return the Hub id of a tag, or a file, and the prefix of the file names."""
    import open_clip

    if find_local_file(pretrained) is not None:
        return pretrained, OPEN_CLIP_PREFIX
    tags = open_clip.list_pretrained_tags_by_model(model) if model else []
    if pretrained not in tags:
        problem = f"pretrained={pretrained} is neither a file nor a tag of the open_clip model {model!r}"
        raise ValueError(f"{problem}.{suggest_name(pretrained, tags)}{format_choices(tags)}")
    name, _, file = pretrained_config["hf_hub"].rpartition("/")
    return name, "" if file else OPEN_CLIP_PREFIX


def _read_preprocessing(folder: Path | None) -> dict[str, Any]:
    """Return the mean, std and interpolation that are stored with the weights, if any."""
    if folder is None or not (folder / CONFIG_FILE).is_file():
        return {}
    with translate_load_errors(folder / CONFIG_FILE):
        preprocessing = read_json(folder / CONFIG_FILE).get("preprocess_cfg", {})
        for field in ("mean", "std"):
            if field in preprocessing and (
                len(preprocessing[field]) != 3
                or not all(isinstance(each, float | int) for each in preprocessing[field])
            ):
                raise ValueError(f"{field} of preprocess_cfg is {preprocessing[field]!r}; it must be three numbers")
        return preprocessing


def _build_image_tower(
    name: str, file: Path | None, image_size: int | None, config: Mapping[str, Any] | None, quick_gelu: bool
) -> Any:
    """Return the image tower of a model with pretrained or random weights; the text tower is discarded."""
    import open_clip

    vision_options = {"vision_cfg": {**open_clip.get_model_config(name)["vision_cfg"], **config}} if config else {}
    if image_size and config:
        vision_options["vision_cfg"]["image_size"] = image_size
    with silence_open_clip():
        model = open_clip.create_model(
            name,
            pretrained=str(file) if file and not name.startswith("local-dir:") else None,
            load_weights=file is not None,
            device=torch.get_default_device(),
            force_image_size=image_size,
            force_quick_gelu=quick_gelu,
            pretrained_text=False,
            **vision_options,
            **({} if file else {"text_cfg": MINIMAL_TEXT_CONFIG}),
        )
    return model.visual


@contextmanager
def silence_open_clip() -> Iterator[None]:
    """Suppress open_clip's log messages, and the root handler that they would install."""
    handler, level = logging.NullHandler(), logging.root.level
    logging.root.addHandler(handler)
    logging.root.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.root.removeHandler(handler)
        logging.root.setLevel(level)
