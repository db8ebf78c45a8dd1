"""Conformance checks of encoders."""

from __future__ import annotations

import inspect
from typing import get_args

import torch
from sca_registry import get_registry
from sca_registry.contracts import ImageFormat

from sca.testing.conformance.checks import DoesNotApply, register_check
from sca.testing.conformance.comparison import describe_shape_mismatch
from sca.testing.conformance.harnesses import ComponentHarness, EncoderHarness


@register_check("encoders", source="sca_registry.contracts.ImageFormat")
def image_format_is_valid(harness: ComponentHarness) -> str | None:
    """`image_format` is an ImageFormat: size a multiple of the stride, three means, three positive deviations."""
    image = harness.component.image_format
    if not isinstance(image, ImageFormat):
        return f"image_format is of type {type(image).__name__}"
    if image.size <= 0 or image.size % harness.component.stride:
        return f"size {image.size} is not a multiple of the stride {harness.component.stride}"
    if len(image.mean) != 3 or len(image.std) != 3 or min(image.std) <= 0:
        return f"mean is {image.mean}, std is {image.std}"
    for name in ("channel_order", "resample", "resize_mode"):
        allowed_values = get_args(inspect.get_annotations(ImageFormat, eval_str=True)[name])
        if getattr(image, name) not in allowed_values:
            return f"{name} is {getattr(image, name)!r}; choose from {', '.join(allowed_values)}"
    return None


@register_check("encoders")
@torch.no_grad()
def output_shape(harness: EncoderHarness) -> str | None:
    """Pixels of shape (B, 3, S, S) produce features of shape (B, channels, S/stride, S/stride)."""
    pixels = harness.make_inputs()
    side = pixels.shape[-1] // harness.component.stride
    return describe_shape_mismatch(
        "features", harness.component(pixels), (len(pixels), harness.component.channels, side, side)
    )


@register_check("encoders")
@torch.no_grad()
def features_depend_on_image(harness: EncoderHarness) -> str | None:
    """Different images have different features."""
    first, second = harness.component(harness.make_inputs())
    return "two different images have the same features" if torch.allclose(first, second) else None


@register_check("encoders")
def default_segmenter_is_registered(harness: ComponentHarness) -> str | None:
    """`default_segmenter` is the name of a registered segmenter."""
    if harness.name is None:
        raise DoesNotApply(
            "the encoder is a factory, not a registered name, so its default segmenter cannot be looked up"
        )
    name, segmenter_names = harness.component.default_segmenter, get_registry("segmenters").list_names()
    return None if name in segmenter_names else f"no segmenter {name!r}; choose from {', '.join(segmenter_names)}"
