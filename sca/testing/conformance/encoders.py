"""Conformance checks of encoders."""

from __future__ import annotations

import inspect
from typing import get_args

import torch
from sca_registry import get_registry
from sca_registry.contracts import ImageFormat

from sca.testing.conformance.checks import DoesNotApply, register_check
from sca.testing.conformance.comparison import describe_shape_mismatch
from sca.testing.conformance.harnesses import EncoderHarness, PartHarness


@register_check("encoders", source="sca_registry.contracts.ImageFormat")
def image_format(harness: PartHarness) -> str | None:
    """`image_format` is an ImageFormat: size a multiple of the stride, three means, three positive deviations."""
    image = harness.part.image_format
    if not isinstance(image, ImageFormat):
        return f"image_format is a {type(image).__name__}"
    if image.size <= 0 or image.size % harness.part.stride:
        return f"size {image.size}, stride {harness.part.stride}"
    if len(image.mean) != 3 or len(image.std) != 3 or min(image.std) <= 0:
        return f"mean {image.mean}, std {image.std}"
    for name in ("channel_order", "resample", "resize_mode"):
        allowed_values = get_args(inspect.get_annotations(ImageFormat, eval_str=True)[name])
        if getattr(image, name) not in allowed_values:
            return f"{name} = {getattr(image, name)!r}; there are {', '.join(allowed_values)}"
    return None


@register_check("encoders")
@torch.no_grad()
def output_shape(harness: EncoderHarness) -> str | None:
    """Pixels of shape (B, 3, S, S) produce features of shape (B, channels, S/stride, S/stride)."""
    pixels = harness.make_inputs()
    side = pixels.shape[-1] // harness.part.stride
    return describe_shape_mismatch("features", harness.part(pixels), (len(pixels), harness.part.channels, side, side))


@register_check("encoders")
@torch.no_grad()
def features_follow_the_image(harness: EncoderHarness) -> str | None:
    """Different images have different features."""
    first, second = harness.part(harness.make_inputs())
    return "two images with the same features" if torch.allclose(first, second) else None


@register_check("encoders")
def default_segmenter_is_known(harness: PartHarness) -> str | None:
    """`default_segmenter` is the name of a registered segmenter."""
    if harness.name is None:
        raise DoesNotApply("a factory without a name may not be installed, nor its segmenter")
    name, segmenter_names = harness.part.default_segmenter, get_registry("segmenters").list_names()
    return None if name in segmenter_names else f"{name!r}; there are {', '.join(segmenter_names)}"
