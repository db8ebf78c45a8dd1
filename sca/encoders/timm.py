"""Image backbones of timm (github.com/huggingface/pytorch-image-models) by name: DINO, MAE, EVA, Swin and others."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from sca_registry.contracts import ImageFormat
from sca_registry.errors import suggest_name
from torch import Tensor, nn

from sca.io.hub import fetch_model_folder, fetch_weight_file, find_local_file, list_usage_terms
from sca.io.json import read_json
from sca.io.weight_files import translate_load_errors
from sca.nn.feature_shape import probe_feature_shape

logger: logging.Logger = logging.getLogger(__name__)

RESTRICTED_LICENSES = (
    "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0",
    "dinov3-license",
    "apple-amlr",
    "fair-noncommercial-research-license",
)


class TimmEncoder(nn.Module):
    """Image encoder that returns the features of one layer of a timm backbone.

    It maps normalized images (B, 3, S, S) to features (B, C, S/stride, S/stride).

    Args:
        model: Name in timm, whose tag (after the dot) selects the weights, mean and std; None reads it from the folder
            of the weights.
        weights: Hub id, folder in timm's format, or file; None for timm's weights of the model.
        revision: Revision of the Hub id.
        pretrained: Load the weights; False initializes randomly.
        image_size: S in pixels; None for the backbone's own. Position embeddings are resized.
        feature_layer: Index of the block or stage, negative from the end. The output of the last block of a plain ViT
            is normalized.
        resize_mode: "pad" or "stretch", see `ImageFormat`.
        config: Arguments of the backbone to override.

    Raises:
        ValueError: The model or layer does not exist, or the options are incomplete or contradictory.
    """

    default_segmenter = "box"
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
        import timm  # optional dependency

        pretrained_config = None
        if model:
            pretrained_config = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
            if pretrained_config is None:
                hint = suggest_name(model, timm.list_models())
                raise ValueError(f"timm has no model {model!r}.{hint} List all models with timm.list_models().")
            weights = weights or pretrained_config.hf_hub_id
        if not isinstance(pretrained, bool):
            raise ValueError(
                f"pretrained is {pretrained!r}; expected true or false. To choose a pretrained tag, append it to the "
                "model name: model=NAME.TAG"
            )
        if "num_classes" in (config or {}):
            raise ValueError("num_classes cannot be set, because the classifier is removed; omit it")
        if weights is None and (pretrained or not model):
            raise ValueError("no weights; set weights=FOLDER or weights=HUB_ID, or model=NAME with pretrained=false")
        source = (model or "") if weights is None else weights
        backbone_options = dict(config or {})
        if (
            pretrained
            and pretrained_config
            and pretrained_config.license in RESTRICTED_LICENSES
            and not list_usage_terms(source)
        ):
            logger.warning("sca: the license of %s is %s", weights, pretrained_config.license)
        file = fetch_weight_file(source, revision) if pretrained else None
        if not model and find_local_file(source) is not None:
            raise ValueError(f"the model of {weights} is unknown; set model=NAME")
        folder_config = _read_folder_config(
            file.parent if file else fetch_model_folder(source, revision, include_weights=False) if not model else None
        )
        if model:
            name = model
            backbone_options["pretrained_cfg_overlay"] = (
                {"file": str(file), "custom_load": False, **folder_config.preprocessing} if file else None
            )
        else:
            name = f"local-dir:{fetch_model_folder(source, revision, include_weights=pretrained)}"
            pretrained_config = (
                timm.get_pretrained_cfg(folder_config.architecture)
                if timm.is_model(folder_config.architecture)
                else None
            )
        if image_size and pretrained_config and pretrained_config.fixed_input_size:
            backbone_options["img_size"] = image_size
        with translate_load_errors(source if pretrained else model or source):
            # create it with its classifier: otherwise timm does not load the weights strictly
            backbone: Any = timm.create_model(name, pretrained=pretrained, **backbone_options)
            backbone.reset_classifier(0)
        self.source = weights  # even if the weights are not loaded
        self.checkpoint: str | None = weights if pretrained else None
        self.revision = revision
        self.backbone: IntermediateLayer = IntermediateLayer(backbone, feature_layer)
        preprocessing = backbone.pretrained_cfg
        input_size: int = (
            image_size
            or backbone_options.get("img_size")
            or (not model and folder_config.image_size)
            or preprocessing["input_size"][-1]
        )
        self.image_format: ImageFormat = make_image_format(input_size, preprocessing, resize_mode)
        self.channels, self.stride = probe_feature_shape(self.backbone, self.image_format.size, self.backbone.stride)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images: (B, 3, S, S) -> (B, C, S/stride, S/stride)."""
        return self.backbone(pixel_values)


class IntermediateLayer(nn.Module):
    """Layer of a timm backbone: (B, 3, S, S) -> (B, C, h, w). Later layers are removed if the backbone supports it.

    Args:
        backbone: Backbone without a classifier.
        layer: Index of the layer, negative from the end.

    Raises:
        ValueError: The layer does not exist, or the backbone cannot return intermediate features.
    """

    network: Any  # module with `forward_intermediates`
    layer_index: int

    def __init__(self, backbone: Any, layer: int):
        super().__init__()
        name = type(backbone).__name__
        if not hasattr(backbone, "forward_intermediates"):
            raise ValueError(f"{name} does not return intermediate features; choose another backbone")
        self.layer_index, is_last = resolve_layer(layer, len(backbone.feature_info), name)
        # only the last block of a plain ViT, whose blocks all have the same stride
        self.normalize: bool = is_last and len({info["reduction"] for info in backbone.feature_info}) == 1
        self.stride: int = backbone.feature_info[self.layer_index]["reduction"]
        self.network = backbone.eval()
        if hasattr(backbone, "prune_intermediate_layers"):
            (self.layer_index,) = backbone.prune_intermediate_layers(
                [self.layer_index], prune_norm=not self.normalize, prune_head=True
            )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the features of the layer, (B, C, h, w)."""
        options = {"indices": [self.layer_index], "norm": self.normalize, "stop_early": True, "output_fmt": "NCHW"}
        return self.network.forward_intermediates(pixel_values, intermediates_only=True, **options)[0]


class _FolderConfig(NamedTuple):
    """Configuration stored with weights."""

    architecture: str = ""
    preprocessing: Mapping[str, Any] = {}  # mean, std, interpolation, num_classes
    # size that the model was built with; timm before 1.0.31 may store a different input_size
    image_size: int | None = None


def _read_folder_config(folder: Path | None) -> _FolderConfig:
    if folder is None or not (folder / "config.json").is_file():
        return _FolderConfig()
    with translate_load_errors(folder / "config.json"):
        config = read_json(folder / "config.json")
        preprocessing = {**config, **(config.get("pretrained_cfg") or {})}
        if "num_classes" in config:  # pretrained_cfg may have the value of the model that was fine-tuned
            preprocessing["num_classes"] = config["num_classes"]
        fields = {
            key: preprocessing[key] for key in ("mean", "std", "interpolation", "num_classes") if key in preprocessing
        }
        image_size = (config.get("model_args") or {}).get("img_size")
        return _FolderConfig(
            str(config.get("architecture", "")), fields, image_size[-1] if isinstance(image_size, list) else image_size
        )


def make_image_format(size: int, preprocessing: Mapping[str, Any], resize_mode: str) -> ImageFormat:
    """Return the image format of pretrained weights.

    Args:
        size: Side of the model input in pixels.
        preprocessing: `mean`, `std` and `interpolation` of the weights.
        resize_mode: "pad" or "stretch".

    Returns:
        The image format.
    """
    return ImageFormat(
        size,
        tuple(preprocessing["mean"]),
        tuple(preprocessing["std"]),
        resample="bicubic" if preprocessing["interpolation"] == "bicubic" else "bilinear",
        resize_mode=cast("Literal['pad', 'stretch']", resize_mode),
    )


def resolve_layer(layer: int, num_layers: int, name: str) -> tuple[int, bool]:
    """Resolve the index of a layer.

    Args:
        layer: Index, negative from the end.
        num_layers: Number of layers.
        name: Name of the network for the error message.

    Returns:
        The index from 0, and whether it is the last one.

    Raises:
        ValueError: The layer does not exist.
    """
    if not -num_layers <= layer < num_layers:
        raise ValueError(
            f"layer {layer} is out of range; {name} has {num_layers} layers, from {-num_layers} to {num_layers - 1}"
        )
    return layer % num_layers, layer % num_layers == num_layers - 1
