"""Image backbones by the names of timm (github.com/huggingface/pytorch-image-models): DINO, MAE, EVA, Swin, ..."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sca_registry.contracts import ImageFormat
from sca_registry.errors import suggest_name
from torch import Tensor, nn

from sca.io.hub import fetch_model_folder, fetch_weight_file, find_local_file, list_usage_terms
from sca.io.json import read_json
from sca.io.weight_files import translate_load_errors
from sca.nn.feature_shape import probe_feature_shape

logger = logging.getLogger(__name__)

RESTRICTED_LICENSES = (
    "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0",
    "dinov3-license",
    "apple-amlr",
    "fair-noncommercial-research-license",
)


class TimmEncoder(nn.Module):
    """(B, 3, S, S) normalized pixels -> (B, C, S/stride, S/stride): what one layer of a backbone gives.

    model: its name in timm, whose tag (the part behind the dot) says which weights, mean and deviation; None for what
    the folder says. weights: a hub id, at a revision, or a folder in timm's format, or a file; None for those that timm
    names. image_size: S (default: the backbone's own); position embeddings are resized. layer: which block or stage,
    from 0 or from the end (-1: the last; that of a plain ViT is normalized). fit: "pad" or "stretch", see
    `ImageFormat`. config: arguments of the backbone that differ. pretrained: False for random weights.
    """

    default_segmenter = "box"

    def __init__(
        self,
        model: str | None = None,
        weights: str | None = None,
        revision: str | None = None,
        pretrained: bool | str = True,
        image_size: int | None = None,
        layer: int = -1,
        fit: str = "pad",
        config: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        import timm  # an extra

        pretrained_config = None
        if model:
            pretrained_config = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
            if pretrained_config is None:
                hint = suggest_name(model, timm.list_models())
                raise ValueError(f"timm has no model {model!r}.{hint} timm.list_models() gives them all")
            weights = weights or pretrained_config.hf_hub_id
        if not isinstance(pretrained, bool):
            raise ValueError(
                f"pretrained={pretrained!r}: give true or false; a tag belongs to the model, model=NAME.TAG"
            )
        if "num_classes" in (config or {}):
            raise ValueError("num_classes is the weights' business: leave it out, the classifier is not kept")
        if weights is None and (pretrained or not model):
            raise ValueError("there are no weights: give weights=FOLDER or a hub id, or another model")
        backbone_options = dict(config or {})
        if (
            pretrained
            and pretrained_config
            and pretrained_config.license in RESTRICTED_LICENSES
            and not list_usage_terms(weights)
        ):
            logger.warning("sca: %s: its license is %s", weights, pretrained_config.license)
        file = fetch_weight_file(weights, revision) if pretrained else None
        if not model and find_local_file(weights) is not None:
            raise ValueError(f"which model {weights} is of has to be said: model=NAME")
        folder_config = _read_folder_config(
            file.parent if file else fetch_model_folder(weights, revision, include_weights=False) if not model else None
        )
        if model:
            name = model
            backbone_options["pretrained_cfg_overlay"] = (
                {"file": str(file), "custom_load": False, **folder_config.preprocessing} if file else None
            )
        else:
            name = f"local-dir:{fetch_model_folder(weights, revision, include_weights=pretrained)}"
            pretrained_config = (
                timm.get_pretrained_cfg(folder_config.architecture)
                if timm.is_model(folder_config.architecture)
                else None
            )
        if image_size and pretrained_config and pretrained_config.fixed_input_size:
            backbone_options["img_size"] = image_size
        with translate_load_errors(weights if pretrained else model or weights):
            backbone = timm.create_model(
                name, pretrained=pretrained, **backbone_options
            )  # with its head: only so is it strict
            backbone.reset_classifier(0)
        self.source = weights  # also where they are not read
        self.checkpoint = weights if pretrained else None
        self.revision = revision
        self.backbone = IntermediateLayer(backbone, layer)
        preprocessing = backbone.pretrained_cfg
        image_size = (
            image_size
            or backbone_options.get("img_size")
            or (not model and folder_config.image_size)
            or preprocessing["input_size"][-1]
        )
        self.image_format = make_image_format(image_size, preprocessing, fit)
        self.channels, self.stride = probe_feature_shape(self.backbone, self.image_format.size, self.backbone.stride)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.backbone(pixel_values)


class IntermediateLayer(nn.Module):
    """(B, 3, S, S) -> (B, C, h, w) of one layer of a backbone of timm; what comes after that layer is left out.

    Raises ValueError if there is no such layer, or the backbone gives none.
    """

    def __init__(self, backbone: nn.Module, layer: int):
        super().__init__()
        name = type(backbone).__name__
        if not hasattr(backbone, "forward_intermediates"):
            raise ValueError(f"{name} gives nothing but its last output: choose another backbone")
        self.layer_index, is_last = resolve_layer(layer, len(backbone.feature_info), name)
        self.normalize = (
            is_last and len({info["reduction"] for info in backbone.feature_info}) == 1
        )  # only a plain ViT's
        self.stride = backbone.feature_info[self.layer_index]["reduction"]
        self.network = backbone.eval()
        if hasattr(backbone, "prune_intermediate_layers"):
            (self.layer_index,) = backbone.prune_intermediate_layers(
                [self.layer_index], prune_norm=not self.normalize, prune_head=True
            )

    def forward(self, pixel_values: Tensor) -> Tensor:
        options = {"indices": [self.layer_index], "norm": self.normalize, "stop_early": True, "output_fmt": "NCHW"}
        return self.network.forward_intermediates(pixel_values, intermediates_only=True, **options)[0]


class _FolderConfig(NamedTuple):
    """What the configuration beside some weights says."""

    architecture: str = ""
    preprocessing: Mapping[str, Any] = {}  # mean, std, interpolation, num_classes
    image_size: int | None = (
        None  # what the model was built with; timm before 1.0.31 may write another input_size beside it
    )


def _read_folder_config(folder: Path | None) -> _FolderConfig:
    if folder is None or not (folder / "config.json").is_file():
        return _FolderConfig()
    with translate_load_errors(folder / "config.json"):
        config = read_json(folder / "config.json")
        preprocessing = {**config, **(config.get("pretrained_cfg") or {})}
        if "num_classes" in config:  # of the weights; pretrained_cfg may have the one of the model they were tuned from
            preprocessing["num_classes"] = config["num_classes"]
        fields = {
            key: preprocessing[key] for key in ("mean", "std", "interpolation", "num_classes") if key in preprocessing
        }
        image_size = (config.get("model_args") or {}).get("img_size")
        return _FolderConfig(
            str(config.get("architecture", "")), fields, image_size[-1] if isinstance(image_size, list) else image_size
        )


def make_image_format(size: int, preprocessing: Mapping[str, Any], fit: str) -> ImageFormat:
    """Return the image format of weights.

    Args:
        size: The side of the image in pixels.
        preprocessing: `mean`, `std` and `interpolation` of the weights.
        fit: "pad" or "stretch".
    """
    resample = "bicubic" if preprocessing["interpolation"] == "bicubic" else "bilinear"
    return ImageFormat(size, tuple(preprocessing["mean"]), tuple(preprocessing["std"]), resample=resample, fit=fit)


def resolve_layer(layer: int, num_layers: int, name: str) -> tuple[int, bool]:
    """A layer counted from 0, and whether it is the last. Raises ValueError if there is no such layer."""
    if not -num_layers <= layer < num_layers:
        raise ValueError(f"no layer {layer}: {name} has {num_layers}, from 0, or from -1 backwards")
    return layer % num_layers, layer % num_layers == num_layers - 1
