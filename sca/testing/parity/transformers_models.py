"""Models of transformers as references."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from sca_registry.contracts import PromptBatch
from sca_registry.errors import suggest_name
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from sca.io.errors import InputError
from sca.io.hub import silence_transformers
from sca.language_models.causal import SPECIAL_TOKEN_FIELDS
from sca.language_models.tiny_config import make_tiny_config
from sca.testing.parity.comparison import Outputs
from sca.testing.parity.references import (
    EncoderReference,
    ImageReference,
    LanguageModelReference,
    SegmenterReference,
    reshape_tokens,
)

MODELS_WITH_SORTED_MASKS = ("SamHQModel",)  # by their predicted IoU, if there are several per region


def find_model_class(name: str, kind: str) -> type[PreTrainedModel]:
    """Return a model class of transformers.

    Args:
        name: Name of the class.
        kind: Kind of the components (plural) that it must fit.

    Returns:
        The class.

    Raises:
        InputError: transformers has no such class, or it is of another kind.
    """
    model_class = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        names = [each for each in dir(transformers) if each.endswith("Model") or "For" in each]
        raise InputError(
            f"transformers has no model class {name!r}.{suggest_name(name, names)} Give a class such as SamModel."
        )
    actual_kind = _infer_kind(model_class)
    if actual_kind != kind:
        hint = f"; run `sca check {actual_kind[:-1].replace('_', '-')}`" if actual_kind else ""
        raise InputError(f"transformers' {name} does not fit {kind.replace('_', ' ')}{hint}")
    return model_class


def _infer_kind(model_class: type[PreTrainedModel]) -> str:
    """Return the kind of components that a class is a reference for; "" for none."""
    if model_class.can_generate():
        return "language_models" if model_class.main_input_name == "input_ids" else ""
    parameters = inspect.signature(model_class.forward).parameters
    if "input_boxes" in parameters:
        return "segmenters"
    return "encoders" if "pixel_values" in parameters else ""


class TransformersReference:
    """Model of transformers; combined with the kind of the reference.

    Args:
        model_class: Class of the model.
        config: Fields of its configuration.

    Raises:
        InputError: The configuration is missing or does not fit.
    """

    def __init__(self, model_class: type[PreTrainedModel], config: Mapping[str, Any] | None):
        with silence_transformers():
            self.model: Any = model_class(_build_config(model_class, config))

    def save_weights(self, folder: Path) -> None:
        """Write the configuration and the weights."""
        with silence_transformers():
            self.model.save_pretrained(folder)


class TransformersImageReference(TransformersReference, ImageReference):
    """Model of transformers with images as inputs."""

    def preprocess_image(self, image: Image.Image, image_size: int, content_size: tuple[int, int]) -> Tensor | None:
        """Preprocess an image; see `ImageReference`."""
        from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

        model_type = self.model.config.model_type
        backends = next(
            (
                IMAGE_PROCESSOR_MAPPING_NAMES[name]
                for name in (model_type, *(model_type.removesuffix(each) for each in ("_vision_model", "_model")))
                if name in IMAGE_PROCESSOR_MAPPING_NAMES
            ),
            {},
        )
        class_name = backends.get("pil") or backends.get("torchvision")
        if class_name is None:
            return None
        processor = getattr(transformers, class_name)()
        square = {"height": image_size, "width": image_size}
        width, height = content_size
        options: dict[str, Any] = {"size": {"height": height, "width": width}, "do_center_crop": False}
        if processor.size.get("longest_edge"):
            options = {"size": {"longest_edge": image_size}, "pad_size": square}
        return processor(images=image, return_tensors="pt", **options)["pixel_values"][0]


class TransformersEncoder(TransformersImageReference, EncoderReference):
    """Vision model of transformers; its features are `last_hidden_state`."""

    def compute_features(self, pixel_values: Tensor) -> Tensor:
        """Encode images: (B, 3, S, S) -> (B, C, h, w)."""
        features = getattr(self.model(pixel_values=pixel_values), "last_hidden_state", None)
        if features is None:
            raise InputError(
                f"transformers' {type(self.model).__name__} returns no last_hidden_state; pass its vision model"
            )
        if features.dim() == 4:
            return features
        patch_size = self.model.config.patch_size
        return reshape_tokens(features, pixel_values.shape[-1] // patch_size)


class TransformersSegmenter(TransformersImageReference, SegmenterReference):
    """Promptable segmenter of transformers. Each region is predicted alone, since only that supports mask prompts."""

    def predict(self, pixel_values: Tensor, prompts: PromptBatch, multimask_output: bool) -> Outputs:
        """Predict masks and their IoU; see `SegmenterReference`."""
        embeddings = {int(index): self._embed_image(pixel_values[index]) for index in prompts.image_index.unique()}
        outputs = []
        for row, image_index in enumerate(prompts.image_index.tolist()):
            region = prompts[row : row + 1]
            outputs.append(
                self.model(
                    **embeddings[image_index],
                    input_boxes=None if region.boxes is None else region.boxes[None],
                    input_points=None if region.points is None else region.points[None],
                    input_labels=None if region.labels is None else region.labels[None],
                    input_masks=region.masks,
                    multimask_output=multimask_output,
                )
            )
        return {
            "masks": torch.stack([each.pred_masks[0, 0] for each in outputs]),
            "iou_scores": torch.stack([each.iou_scores[0, 0] for each in outputs]),
        }

    def _embed_image(self, image: Tensor) -> dict[str, Any]:
        """Return the arguments of the model that replace an image (3, S, S)."""
        embeddings = self.model.get_image_embeddings(image[None])
        if isinstance(embeddings, tuple):
            return dict(zip(("image_embeddings", "intermediate_embeddings"), embeddings, strict=True))
        return {"image_embeddings": embeddings}

    @property
    def has_sorted_masks(self) -> bool:
        """Whether the candidate masks of a region are sorted by their predicted IoU."""
        return type(self.model).__name__ in MODELS_WITH_SORTED_MASKS


class TransformersLanguageModel(TransformersReference, LanguageModelReference):
    """Causal language model of transformers."""

    def compute_logits(
        self, attention_mask: Tensor, input_ids: Tensor | None = None, embeddings: Tensor | None = None
    ) -> Tensor:
        """Return logits; see `LanguageModelReference`."""
        return self.model(input_ids=input_ids, inputs_embeds=embeddings, attention_mask=attention_mask).logits

    def generate(self, prefix: Tensor, max_new_tokens: int, num_beams: int) -> Tensor:
        """Generate token ids; see `LanguageModelReference`. Of the generation config, only special tokens are used."""
        ids = {name: getattr(self.model.config, name, None) for name in SPECIAL_TOKEN_FIELDS}
        self.model.generation_config = GenerationConfig(**ids)
        with silence_transformers():
            sequences = self.model.generate(
                inputs_embeds=prefix,
                attention_mask=prefix.new_ones(prefix.shape[:2], dtype=torch.long),
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
                num_return_sequences=num_beams,
                do_sample=False,
            )
        return sequences.unflatten(0, (len(prefix), num_beams))


def _build_config(model_class: type[PreTrainedModel], config: Mapping[str, Any] | None) -> PreTrainedConfig:
    """Return the configuration of a reference.

    The fields may be those of a larger model that contains it, or of another language model, whose size is then tiny.
    """
    config_class: Any = model_class.config_class
    fields = dict(config or {})
    if "vision_config" in fields and "vision_config" not in config_class.sub_configs:
        fields = dict(fields["vision_config"])
    model_type = fields.pop("model_type", config_class.model_type)
    if _infer_kind(model_class) == "language_models" and model_type != config_class.model_type:
        return make_tiny_config(config_class())
    if model_type != config_class.model_type:
        raise InputError(
            f"the component has the model type {model_type!r}, and {model_class.__name__} has "
            f"{config_class.model_type!r}; pass a class of that type, or config={{...}}"
        )
    if not fields:
        raise InputError(
            f"the size of {model_class.__name__} is unknown; pass config={{...}}, or add tiny_options to the card of "
            "the component"
        )
    return config_class(**fields)
