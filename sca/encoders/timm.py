"""Image backbones by the names of timm (github.com/huggingface/pytorch-image-models): DINO, MAE, EVA, Swin, ..."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sca_registry.contracts import ImageFormat
from sca_registry.messages import suggestion
from torch import Tensor, nn

from sca.io.hub import fetch, local_file, terms_of, weight_file
from sca.io.json import read_json
from sca.io.weight_files import reading
from sca.nn.probe import feature_shape

logger = logging.getLogger(__name__)

UNFREE = ("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "dinov3-license", "apple-amlr", "fair-noncommercial-research-license")


class TimmEncoder(nn.Module):
    """(B, 3, S, S) normalised pixels -> (B, C, S/stride, S/stride): what one layer of a backbone gives.

    model: its name in timm, whose tag (the part behind the dot) says which weights, mean and deviation; None for what
    the folder says. weights: a hub id, at a revision, or a folder in timm's format, or a file; None for those that timm
    names. size: S (default: the backbone's own); position embeddings are resized. layer: which block or stage, from 0
    or from the end (-1: the last; that of a plain ViT is normalised). fit: "pad" or "stretch", see `ImageFormat`.
    config: arguments of the backbone that differ. pretrained: False for random weights.
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

        known = None
        if model:
            known = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
            if known is None:
                near = suggestion(model, timm.list_models())
                raise ValueError(f"timm has no model {model!r}.{near} timm.list_models() gives them all")
            weights = weights or known.hf_hub_id
        if not isinstance(pretrained, bool):
            raise ValueError(
                f"pretrained={pretrained!r}: give true or false; a tag belongs to the model, model=NAME.TAG"
            )
        if "num_classes" in (config or {}):
            raise ValueError("num_classes is the weights' business: leave it out, the classifier is not kept")
        if weights is None and (pretrained or not model):
            raise ValueError("there are no weights: give weights=FOLDER or a hub id, or another model")
        how = dict(config or {})
        if pretrained and known and known.license in UNFREE and not terms_of(weights):
            logger.warning("sca: %s: its licence is %s", weights, known.license)
        file = weight_file(weights, revision) if pretrained else None
        if not model and local_file(weights) is not None:
            raise ValueError(f"which model {weights} is of has to be said: model=NAME")
        said = _said(file.parent if file else fetch(weights, revision, weights=False) if not model else None)
        if model:
            name = model
            how["pretrained_cfg_overlay"] = {"file": str(file), "custom_load": False, **said.look} if file else None
        else:
            name = f"local-dir:{fetch(weights, revision, weights=pretrained)}"
            known = timm.get_pretrained_cfg(said.architecture) if timm.is_model(said.architecture) else None
        if image_size and known and known.fixed_input_size:
            how["img_size"] = image_size
        with reading(weights if pretrained else model or weights):
            backbone = timm.create_model(name, pretrained=pretrained, **how)  # with its head: only so is it strict
            backbone.reset_classifier(0)
        self.source = weights  # also where they are not read
        self.checkpoint = weights if pretrained else None
        self.revision = revision
        self.backbone = IntermediateLayer(backbone, layer)
        look = backbone.pretrained_cfg
        image_size = image_size or how.get("img_size") or (not model and said.size) or look["input_size"][-1]
        self.image_format = image_format(image_size, look, fit)
        self.channels, self.stride = feature_shape(self.backbone, self.image_format.size, self.backbone.stride)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.backbone(pixels)


class IntermediateLayer(nn.Module):
    """(B, 3, S, S) -> (B, C, h, w) of one layer of a backbone of timm; what comes after that layer is left out.

    Raises ValueError if there is no such layer, or the backbone gives none.
    """

    def __init__(self, backbone: nn.Module, layer: int):
        super().__init__()
        name = type(backbone).__name__
        if not hasattr(backbone, "forward_intermediates"):
            raise ValueError(f"{name} gives nothing but its last output: choose another backbone")
        self.layer, last = find_layer(layer, len(backbone.feature_info), name)
        self.normalise = last and len({info["reduction"] for info in backbone.feature_info}) == 1  # only a plain ViT's
        self.stride = backbone.feature_info[self.layer]["reduction"]
        self.network = backbone.eval()
        if hasattr(backbone, "prune_intermediate_layers"):
            (self.layer,) = backbone.prune_intermediate_layers(
                [self.layer], prune_norm=not self.normalise, prune_head=True
            )

    def forward(self, pixels: Tensor) -> Tensor:
        how = {"indices": [self.layer], "norm": self.normalise, "stop_early": True, "output_fmt": "NCHW"}
        return self.network.forward_intermediates(pixels, intermediates_only=True, **how)[0]


class _Said(NamedTuple):
    """What the configuration beside some weights says."""

    architecture: str = ""
    look: Mapping[str, Any] = {}  # mean, std, interpolation, num_classes
    size: int | None = None  # what the model was built with; timm before 1.0.31 may write another input_size beside it


def _said(folder: Path | None) -> _Said:
    if folder is None or not (folder / "config.json").is_file():
        return _Said()
    with reading(folder / "config.json"):
        config = read_json(folder / "config.json")
        look = {**config, **(config.get("pretrained_cfg") or {})}
        if "num_classes" in config:  # of the weights; pretrained_cfg may have the one of the model they were tuned from
            look["num_classes"] = config["num_classes"]
        kept = {key: look[key] for key in ("mean", "std", "interpolation", "num_classes") if key in look}
        size = (config.get("model_args") or {}).get("img_size")
        return _Said(str(config.get("architecture", "")), kept, size[-1] if isinstance(size, list) else size)


def image_format(size: int, look: Mapping[str, Any], fit: str) -> ImageFormat:
    """Return the image format of weights.

    Args:
        size: The side of the image in pixels.
        look: `mean`, `std` and `interpolation` of the weights.
        fit: "pad" or "stretch".
    """
    resample = "bicubic" if look["interpolation"] == "bicubic" else "bilinear"
    return ImageFormat(size, tuple(look["mean"]), tuple(look["std"]), resample=resample, fit=fit)


def find_layer(layer: int, count: int, name: str) -> tuple[int, bool]:
    """A layer counted from 0, and whether it is the last. Raises ValueError if there is no such layer."""
    if not -count <= layer < count:
        raise ValueError(f"no layer {layer}: {name} has {count}, from 0, or from -1 backwards")
    return layer % count, layer % count == count - 1
