"""From names to a built model."""

from __future__ import annotations

import contextlib
from typing import Any

import sca_registry
import torch
from sca_registry.contracts import Encoder
from sca_registry.options import check_options
from sca_registry.spec import ModelSpec, Part

from sca.model import SegmentCaptioner


def compose(
    encoder: str, mixer: str, language_model: str, *, device: str | torch.device = "cpu", **fields: Any
) -> SegmentCaptioner:
    """A model of the named parts: `compose("tiny-vit", "query", "tiny-gpt2", task_tokens=2)`.

    Other fields of `ModelSpec` go by keyword (segmenter, projection, task_tokens, trainable, lora, generation), and the
    options of a part with its name in a table: `compose({"name": "tiny-vit", "size": 96}, ...)`. On `device="meta"`
    nothing is allocated: for counting parameters.
    """
    spec = ModelSpec.from_dict({"encoder": encoder, "mixer": mixer, "language_model": language_model, **fields})
    return build(spec, device)


def build(spec: ModelSpec, device: str | torch.device = "cpu") -> SegmentCaptioner:
    """The step below `compose`. Raises RegistryError for unknown names, options, and parts that do not fit together."""
    spec.check()
    where = torch.device(device)
    with where if where.type == "meta" else contextlib.nullcontext():
        encoder = sca_registry.encoders.build(spec.encoder.name, **spec.encoder.options)
        chosen = parts(spec, encoder)["segmenter"]
        segmenter = sca_registry.segmenters.build(chosen.name, encoder, **chosen.options)
        mixer = sca_registry.mixers.build(spec.mixer.name, segmenter, **spec.mixer.options)
        language_model = sca_registry.language_models.build(spec.language_model.name, **spec.language_model.options)
        what = f"generation of the language model {spec.language_model.name!r}"
        check_options(what, language_model.generate, 1, spec.generation)
        if spec.lora:
            language_model.adapt(**spec.lora)
        model = SegmentCaptioner(spec, encoder, segmenter, mixer, language_model)
    return model.to(where).eval()


def parts(spec: ModelSpec, encoder: Encoder) -> dict[str, Part]:
    """The part of each kind, the encoder's own segmenter where the spec names none."""
    segmenter = spec.segmenter or Part(encoder.default_segmenter)
    return {
        "encoder": spec.encoder,
        "segmenter": segmenter,
        "mixer": spec.mixer,
        "language_model": spec.language_model,
    }
