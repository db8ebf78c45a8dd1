"""Build the component under test from the weights of a reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sca_registry import get_registry
from torch import nn

from sca.io.errors import InputError
from sca.testing.conformance.harnesses import ComponentHarness
from sca.testing.tiny import get_tiny_options

Component = str | Callable[..., Any]  # registered name, or factory
SIZE_OPTIONS = ("config", "pretrained")  # options of random weights, which those of the reference replace


class SegmenterParts(NamedTuple):
    """Encoder and segmenter that are tested together.

    Attributes:
        encoder: Encoder.
        segmenter: Segmenter; None for the one that the encoder brings.
    """

    encoder: Component
    segmenter: Component | None


def collect_options(kind: str, component: Component, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that make a component tiny, overridden by `options`."""
    return {**(get_tiny_options(kind, component) if isinstance(component, str) else {}), **options}


def get_default_options(kind: str, component: Component) -> Mapping[str, Any]:
    """Return the options of a factory with their defaults.

    Args:
        kind: Kind of the component (plural).
        component: Registered name, or factory.

    Returns:
        The options.

    Raises:
        RegistryError: The name is unknown, or the component is broken or needs an extra.
    """
    if isinstance(component, str):
        get_registry(kind).check(component)
    return ComponentHarness(kind, component, {}).default_options


def require_weights_option(kind: str, component: Component) -> None:
    """Raise InputError if a component has no option `weights`."""
    if "weights" not in get_default_options(kind, component):
        name = component if isinstance(component, str) else getattr(component, "__name__", str(component))
        singular = get_registry(kind).kind.singular.replace("_", " ")
        raise InputError(
            f"{singular} {name!r} has no option weights, so that it cannot load those of the reference; add the option "
            "to its factory"
        )


def get_option_kind(kind: str, component: Component) -> str:
    """Return the kind whose options a component has: a segmenter may be named by the encoder that brings it.

    Args:
        kind: Kind of the check, singular or plural.
        component: Registered name, or factory.

    Returns:
        Plural kind.
    """
    plural = get_registry(kind).kind.plural
    if plural != "segmenters":
        return plural
    if isinstance(component, str):
        return "encoders" if component in get_registry("encoders") else plural
    return "encoders" if hasattr(component, "default_segmenter") else plural


def find_segmenter_parts(component: Component, model_type: str) -> SegmenterParts:
    """Return the encoder and the segmenter that a name or factory stands for.

    Args:
        component: Encoder that brings its segmenter, or segmenter, which is combined with the encoder of the reference.
        model_type: Model type of the reference in transformers.

    Returns:
        Both parts.

    Raises:
        InputError: The segmenter needs an encoder, and none is registered for the model type.
    """
    if get_option_kind("segmenters", component) == "encoders":
        return SegmenterParts(component, None)
    encoder = model_type.replace("_", "-")
    if encoder not in get_registry("encoders"):
        raise InputError(f"no encoder {encoder!r} is registered for the reference; name an encoder with this segmenter")
    return SegmenterParts(encoder, component)


def build_part(
    kind: str, component: Component, options: Mapping[str, Any], folder: Path, upstream: tuple[Any, ...] = ()
) -> nn.Module:
    """Build a component with the weights of a reference.

    Args:
        kind: Kind of the component (plural).
        component: Registered name, or factory.
        options: Options; those that set the size are those of the reference instead.
        folder: Folder of the weights.
        upstream: Upstream component, if the kind has one.

    Returns:
        The component in float64 and eval mode.

    Raises:
        RegistryError: The component cannot be built from the weights.
        InputError: The component is not a torch module.
    """
    default_options = get_default_options(kind, component)
    own_options = {key: value for key, value in options.items() if key not in SIZE_OPTIONS}
    folder_options = {"weights": str(folder)} | ({"model": None} if "model" in default_options else {})
    return build_module(kind, component, own_options | folder_options, upstream)


def build_module(
    kind: str, component: Component, options: Mapping[str, Any], upstream: tuple[Any, ...] = ()
) -> nn.Module:
    """Return a component in float64 and eval mode; InputError if it is not a torch module."""
    harness = ComponentHarness(kind, component, options)
    harness.upstream = upstream
    module = harness.build()
    if not isinstance(module, nn.Module):
        raise InputError(f"{type(module).__name__} is not a torch.nn.Module, so that it cannot be compared in float64")
    return module.double()
