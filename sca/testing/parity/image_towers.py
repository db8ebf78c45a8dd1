"""Image towers of timm and open_clip as references for encoders."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import save_file
from sca_registry.errors import suggest_name
from torch import Tensor

from sca.encoders.open_clip import CONFIG_FILE, MINIMAL_TEXT_CONFIG, resolve_pretrained_config, silence_open_clip
from sca.io.errors import InputError
from sca.io.hub import OPEN_CLIP_PREFIX
from sca.io.weight_files import SAFETENSORS_FILE
from sca.testing.parity.references import EncoderReference, reshape_tokens
from sca.testing.tiny import get_tiny_options

PREPROCESSING_FIELDS = ("mean", "std", "interpolation")


class TimmReference(EncoderReference):
    """Backbone of timm.

    Like timm's repositories on the Hub, the folder contains the weights also in the format of open_clip, if that is
    installed.

    Args:
        name: Name in timm.
        options: Options of the component: `config` with arguments of the backbone, `image_size` and `feature_layer`.

    Raises:
        InputError: timm has no such model, or it does not accept the arguments.
    """

    def __init__(self, name: str, options: Mapping[str, Any]):
        import timm

        if not timm.is_model(name):
            raise InputError(
                f"timm has no model {name!r}.{suggest_name(name, timm.list_models())} List all models with "
                "timm.list_models()."
            )
        arguments = dict(options.get("config") or {})
        if not arguments or "timm_model_name" in arguments:  # open_clip cannot set the size of a backbone
            arguments = dict(get_tiny_options("encoder", "timm")["config"])
        pretrained_config = timm.get_pretrained_cfg(name)
        if options.get("image_size") and pretrained_config and pretrained_config.fixed_input_size:
            arguments["img_size"] = options["image_size"]
        try:
            self.model = timm.create_model(name, **arguments)
        except TypeError as error:
            raise InputError(
                f"timm's {name} does not accept {', '.join(arguments)} ({error}); pass config={{...}} with arguments "
                "that make it tiny"
            ) from error
        self.arguments = arguments
        self.image_size: int = options.get("image_size") or self.model.pretrained_cfg["input_size"][-1]
        self.feature_layer: int = options.get("feature_layer", -1)

    def save_weights(self, folder: Path) -> None:
        """Write the configuration and the weights."""
        import timm

        timm.models.save_for_hf(self.model, str(folder), model_args=self.arguments, safe_serialization=True)
        if importlib.util.find_spec("open_clip") is None:
            return
        config = {"timm_model_name": f"local-dir:{folder}", "timm_pool": "", "timm_proj": "none"}
        preprocessing = {name: self.model.pretrained_cfg[name] for name in PREPROCESSING_FIELDS}
        write_open_clip_config(folder, {**config, "image_size": self.image_size}, {}, preprocessing)
        clip = build_open_clip_model(folder)
        clip.visual.trunk.load_state_dict(self.model.state_dict(), strict=False)  # without the classifier
        save_file(clip.state_dict(), folder / f"{OPEN_CLIP_PREFIX}{SAFETENSORS_FILE}")

    def compute_features(self, pixel_values: Tensor) -> Tensor:
        """Encode images: (B, 3, S, S) -> (B, C, h, w)."""
        return compute_timm_features(self.model, pixel_values, self.feature_layer)

    def preprocess_image(self, image: Image.Image, image_size: int, content_size: tuple[int, int]) -> Tensor | None:
        """Preprocess an image; see `ImageReference`."""
        from timm.data import create_transform, resolve_model_data_config

        config = {name: resolve_model_data_config(self.model)[name] for name in PREPROCESSING_FIELDS}
        width, height = content_size
        return create_transform(input_size=(3, height, width), crop_pct=1.0, crop_mode="squash", **config)(image)


class OpenClipReference(EncoderReference):
    """Image tower of open_clip.

    Args:
        name: Name in open_clip.
        options: Options of the component: `config` with fields of the tower's configuration, `image_size` and
            `feature_layer`.
        folder: Folder for the configuration and the weights.

    Raises:
        ValueError: open_clip has no such model.
        InputError: The model does not accept the configuration.
    """

    def __init__(self, name: str, options: Mapping[str, Any], folder: Path):
        pretrained_config = resolve_pretrained_config(name, False, None)
        import open_clip

        self.preprocessing = {field: pretrained_config[field] for field in PREPROCESSING_FIELDS}
        model_config = open_clip.get_model_config(name)
        vision_config = {**model_config["vision_cfg"], **(options.get("config") or {})}
        self.image_size: int | None = options.get("image_size")
        if self.image_size:
            vision_config["image_size"] = self.image_size
        other_fields = {"quick_gelu": True} if model_config.get("quick_gelu") else {}
        write_open_clip_config(folder, vision_config, other_fields, self.preprocessing)
        try:
            self.clip = build_open_clip_model(folder)
        except TypeError as error:
            raise InputError(
                f"open_clip's {name} does not accept the configuration: {error}; pass config={{...}}"
            ) from error
        self.model = self.clip.visual
        self.feature_layer: int = options.get("feature_layer", -1)

    def save_weights(self, folder: Path) -> None:
        """Write the weights, including those of a minimal text tower."""
        save_file(self.clip.state_dict(), folder / f"{OPEN_CLIP_PREFIX}{SAFETENSORS_FILE}")
        if hasattr(self.model, "trunk") and self.image_size:  # after loading weights, as in open_clip
            self.model.set_input_size(self.image_size)

    def compute_features(self, pixel_values: Tensor) -> Tensor:
        """Encode images: (B, 3, S, S) -> (B, C, h, w)."""
        if hasattr(self.model, "trunk"):
            return compute_timm_features(self.model.trunk, pixel_values, self.feature_layer)
        is_vit = hasattr(self.model, "transformer")
        if is_vit and self.feature_layer == -1 and self.model.attn_pool is None:
            self.model.output_tokens = True
            tokens = self.model(pixel_values)[1]
            return reshape_tokens(tokens, pixel_values.shape[-1] // self.model.patch_size[0])
        return self.model.forward_intermediates(pixel_values, indices=[self.feature_layer])["image_intermediates"][0]

    def preprocess_image(self, image: Image.Image, image_size: int, content_size: tuple[int, int]) -> Tensor | None:
        """Preprocess an image; see `ImageReference`."""
        from open_clip.transform import image_transform

        transform = image_transform(content_size[::-1], is_train=False, resize_mode="squash", **self.preprocessing)
        return transform(image)


def compute_timm_features(model: Any, pixel_values: Tensor, layer: int) -> Tensor:
    """Return the features of a layer of a timm backbone.

    Args:
        model: Backbone.
        pixel_values: (B, 3, S, S) images.
        layer: Index of the block or stage, negative from the end.

    Returns:
        (B, C, h, w); the last block of a plain ViT is normalized.
    """
    is_plain = len({info["reduction"] for info in model.feature_info}) == 1
    if is_plain and layer in (-1, len(model.feature_info) - 1):
        features = model.forward_features(pixel_values)
        stride = model.feature_info[-1]["reduction"]
        return features if features.dim() == 4 else reshape_tokens(features, pixel_values.shape[-1] // stride)
    layer %= len(model.feature_info)
    options = {"indices": [layer], "output_fmt": "NCHW", "intermediates_only": True}
    return model.forward_intermediates(pixel_values, **options)[0]


def write_open_clip_config(
    folder: Path, vision_config: Mapping[str, Any], other_fields: Mapping[str, Any], preprocessing: Mapping[str, Any]
) -> None:
    """Write the configuration of a model of open_clip with a minimal text tower.

    Args:
        folder: Folder in open_clip's format.
        vision_config: Configuration of the image tower.
        other_fields: Other fields of the configuration.
        preprocessing: `mean`, `std` and `interpolation`.
    """
    model_config = {"embed_dim": 8, "vision_cfg": dict(vision_config), "text_cfg": MINIMAL_TEXT_CONFIG, **other_fields}
    content = {"model_cfg": model_config, "preprocess_cfg": dict(preprocessing)}
    (folder / CONFIG_FILE).write_text(json.dumps(content), "utf-8")


def build_open_clip_model(folder: Path) -> Any:
    """Return the model of a folder in open_clip's format, with random weights."""
    resolve_pretrained_config(None, False, None)  # imports open_clip without its side effects
    import open_clip

    with silence_open_clip():
        return open_clip.create_model(f"local-dir:{folder}", load_weights=False)
