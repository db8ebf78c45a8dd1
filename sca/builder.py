"""Build models from the names and options of their components."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import sca_registry
import torch
from sca_registry import RegistryError, get_registry
from sca_registry.compatibility import check_compatible
from sca_registry.contracts import Encoder, LanguageModel, Mixer, Segmenter
from sca_registry.overrides import MODEL_COMPONENTS, MODEL_FIELDS
from sca_registry.spec import ComponentSpec, ModelSpec, check_generation

from sca.devices import resolve_device
from sca.hints import check_argument_names
from sca.language_models.quantization import check_quantization
from sca.model import SegmentCaptioner


@check_argument_names(*MODEL_FIELDS, "format")
def compose(
    encoder: str | Mapping[str, Any],
    mixer: str | Mapping[str, Any],
    language_model: str | Mapping[str, Any],
    *,
    device: str | torch.device = "cpu",
    weights: bool = True,
    **fields: Any,
) -> SegmentCaptioner:
    """Build a model from named components: `compose("tiny-vit", "query", "tiny-gpt2", task_tokens=2)`.

    Args:
        encoder: Name, or dict with the name and options: `{"name": "tiny-vit", "image_size": 96}`.
        mixer: Name or dict.
        language_model: Name or dict.
        device: Device of the model. "meta" downloads no weights and allocates no memory; use it to count parameters. A
            component that `sca list` does not show still downloads its configuration file.
        weights: Load pretrained weights; False initializes all weights randomly.
        **fields: Other fields of `ModelSpec`: `segmenter`, `projection`, `task_tokens`, `tasks`, `prompt_template`,
            `geometry`, `questions`, `lengths`, `trainable`, `lora`, `generation`, `everything`, `zoom`.

    Returns:
        The model in eval mode.

    Raises:
        TypeError: Unknown keyword argument; the message suggests the closest one.
        RegistryError: A name or option is unknown, or the components are incompatible.
        ValueError: The device is not available.
    """
    spec = ModelSpec.from_dict({"encoder": encoder, "mixer": mixer, "language_model": language_model, **fields})
    return build(spec, device, weights)


@check_argument_names()
def build(spec: ModelSpec, device: str | torch.device = "cpu", weights: bool = True) -> SegmentCaptioner:
    """Build a model from its spec.

    Args:
        spec: Components and options.
        device: Device of the model; "meta" as in `compose`.
        weights: Load pretrained weights; False initializes all weights randomly.

    Returns:
        The model in eval mode.

    Raises:
        TypeError: Unknown keyword argument; the message suggests the closest one.
        RegistryError: A name or option is unknown, or the components are incompatible.
        ValueError: An argument has the wrong type, or the device is not available.
    """
    if not isinstance(spec, ModelSpec):
        raise ValueError(
            f"the spec is of type {type(spec).__name__}; pass an sca.ModelSpec, such as sca.ModelSpec.parse('a+b+c')"
        )
    if not isinstance(weights, bool):
        raise ValueError(
            f"weights must be True or False, not {weights!r:.80}; to load a weight file, use the component option "
            "'weights'"
        )
    target_device = resolve_device(device, allow_meta=True)
    check_compatible(spec)
    check_quantization(spec, target_device.type)
    use_random_weights = not weights or target_device.type == "meta"
    if use_random_weights:
        spec = disable_pretrained_weights(spec)
    init_device = target_device if use_random_weights else contextlib.nullcontext()
    with init_device:  # initialize random weights on the target device
        encoder = sca_registry.encoders.build(spec.encoder.name, **spec.encoder.options)
        segmenter_component = resolve_components(spec, encoder)["segmenter"]
        if spec.segmenter is None:  # the weights of the encoder may decide
            check_compatible(replace(spec, segmenter=segmenter_component))
        segmenter = sca_registry.segmenters.build(segmenter_component.name, encoder, **segmenter_component.options)
        has_projection = spec.projection["type"] != "none"
        mixer = _build_mixer(spec, segmenter) if has_projection else None
        language_model = sca_registry.language_models.build(spec.language_model.name, **spec.language_model.options)
        if mixer is None:
            mixer = _build_mixer(spec, segmenter, language_model.hidden_size)
            _check_widths(spec, mixer, language_model)
        check_generation("generation", spec.generation, language_model.generate)
        if isinstance(spec.lora, Mapping):
            language_model.add_lora(**spec.lora)
        model = SegmentCaptioner(spec, encoder, segmenter, mixer, language_model)
        _check_prefix_fits(model)
    return model.to(target_device).eval()


def _build_mixer(spec: ModelSpec, segmenter: Segmenter, hidden_size: int | None = None) -> Mixer:
    """Build the mixer, with a hidden size if it has this option."""
    options = dict(spec.mixer.options)
    if hidden_size is not None and "hidden_size" in get_registry("mixer").load_entry(spec.mixer.name).options:
        options = {"hidden_size": hidden_size} | options
    return sca_registry.mixers.build(spec.mixer.name, segmenter, **options)


def _check_widths(spec: ModelSpec, mixer: Mixer, language_model: LanguageModel) -> None:
    """Raise RegistryError if queries without a projection have another width than the language model."""
    if mixer.hidden_size != language_model.hidden_size:
        raise RegistryError(
            f"projection=none requires queries of the width {language_model.hidden_size} of the language model "
            f"{spec.language_model.name!r}, but those of the mixer {spec.mixer.name!r} have {mixer.hidden_size}; use "
            "projection=linear, or a mixer with the option hidden_size, such as semantic-perceiver"
        )


def _check_prefix_fits(model: SegmentCaptioner) -> None:
    """Raise RegistryError if the prefix leaves the language model no position for tokens."""
    max_positions = getattr(model.language_model, "max_positions", None)
    if max_positions is None:
        return
    spec = model.spec
    num_positions = max(map(model.count_prefix_positions, spec.task_names))
    if num_positions >= max_positions:
        text = "the prompt of the task" if spec.tasks else f"{spec.task_tokens} task tokens"
        raise RegistryError(
            f"the prefix of {num_positions} positions ({model.mixer.num_queries} queries, "
            f"{text}{', the geometry' if spec.geometry == 'token' else ''}) fills "
            f"the {max_positions} positions of the language model {spec.language_model.name!r}; "
            "use fewer queries or another language model"
        )


def disable_pretrained_weights(spec: ModelSpec) -> ModelSpec:
    """Return the spec with `pretrained=False` for every component that has this option."""
    changed_components: dict[str, Any] = {}
    for kind in MODEL_COMPONENTS:
        component = getattr(spec, kind)
        if component is not None and "pretrained" in get_registry(kind).load_entry(component.name).options:
            changed_components[kind] = ComponentSpec(component.name, {**component.options, "pretrained": False})
    return replace(spec, **changed_components)


def resolve_components(spec: ModelSpec, encoder: Encoder) -> dict[str, ComponentSpec]:
    """Return the component of each kind; a missing segmenter is the encoder's default."""
    segmenter = spec.segmenter or ComponentSpec(encoder.default_segmenter)
    return {
        "encoder": spec.encoder,
        "segmenter": segmenter,
        "mixer": spec.mixer,
        "language_model": spec.language_model,
    }
