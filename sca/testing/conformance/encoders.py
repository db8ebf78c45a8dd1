"""Promises of encoders."""

from __future__ import annotations

import inspect
from typing import get_args

import torch
from sca_registry import registry
from sca_registry.contracts import ImageFormat

from sca.testing.conformance.comparison import misshapen
from sca.testing.conformance.promises import DoesNotApply, promise
from sca.testing.conformance.trials import EncoderTrial, Trial


@promise("encoders", written="sca_registry.contracts.ImageFormat")
def image_format(trial: Trial) -> str | None:
    """`image` is an ImageFormat whose size is a multiple of the stride, with three means and positive deviations."""
    image = trial.part.image
    if not isinstance(image, ImageFormat):
        return f"image is a {type(image).__name__}"
    if image.size <= 0 or image.size % trial.part.stride:
        return f"size {image.size}, stride {trial.part.stride}"
    if len(image.mean) != 3 or len(image.std) != 3 or min(image.std) <= 0:
        return f"mean {image.mean}, std {image.std}"
    for name in ("order", "resample", "fit"):
        words = get_args(inspect.get_annotations(ImageFormat, eval_str=True)[name])
        if getattr(image, name) not in words:
            return f"{name} = {getattr(image, name)!r}; there are {', '.join(words)}"
    return None


@promise("encoders")
@torch.no_grad()
def output_shape(trial: EncoderTrial) -> str | None:
    """(B, 3, S, S) pixels give (B, channels, S/stride, S/stride) features."""
    pixels = trial.inputs()
    side = pixels.shape[-1] // trial.part.stride
    return misshapen("features", trial.part(pixels), (len(pixels), trial.part.channels, side, side))


@promise("encoders")
@torch.no_grad()
def features_follow_the_image(trial: EncoderTrial) -> str | None:
    """Different images have different features."""
    first, second = trial.part(trial.inputs())
    return "two images with the same features" if torch.allclose(first, second) else None


@promise("encoders")
def default_segmenter_is_known(trial: Trial) -> str | None:
    """`default_segmenter` is the name of a segmenter."""
    if trial.name is None:
        raise DoesNotApply("a factory without a name may not be installed, nor its segmenter")
    name, known = trial.part.default_segmenter, registry("segmenters").names()
    return None if name in known else f"{name!r}; there are {', '.join(known)}"
