"""Feature shapes and unused parameters of third-party networks, found on the meta device."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call


@torch.no_grad()
def probe_feature_shape(network: nn.Module, image_size: int, stride: int | None = None) -> tuple[int, int]:
    """Return the channels C and the stride of a network's features.

    Args:
        network: Network that maps images (1, 3, S, S) to features (1, C, S/stride, S/stride).
        image_size: S in pixels.
        stride: Stride of the network, if known. A feature grid with another stride would omit an edge of the image.

    Returns:
        C and the stride in pixels.

    Raises:
        ValueError: The feature grid is not square, the stride is not an integer, or it differs from `stride`.
    """
    with torch.device("meta"):
        shape = functional_call(
            network, _copy_tensors_to_meta(network), (torch.empty(1, 3, image_size, image_size),)
        ).shape
    if len(shape) != 4 or shape[2] != shape[3] or image_size % shape[2]:
        raise ValueError(
            f"images of {image_size} pixels have features of shape {tuple(shape)}, not a square grid whose side "
            "divides the image size; choose another size or layer"
        )
    actual_stride = image_size // shape[2]
    if stride is not None and actual_stride != stride:
        raise ValueError(f"image_size {image_size} must be a multiple of the stride {stride}")
    return shape[1], actual_stride


def freeze_unused_parameters(network: nn.Module, image_size: int) -> None:
    """Freeze the parameters that do not affect the features, since they would never receive gradients.

    Args:
        network: Network that maps images to features.
        image_size: Side of the images in pixels.
    """
    meta_tensors = _copy_tensors_to_meta(network)
    parameters = {name: meta_tensors[name].requires_grad_() for name, _ in network.named_parameters()}
    with torch.device("meta"), torch.enable_grad():
        features = functional_call(network, meta_tensors, (torch.empty(1, 3, image_size, image_size),))
        gradients = torch.autograd.grad(features.sum(), list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            network.get_parameter(name).requires_grad_(False)


def _copy_tensors_to_meta(network: nn.Module) -> dict[str, Tensor]:
    tensors = [*network.named_parameters(), *network.named_buffers()]  # shared tensors appear once
    return {name: tensor.detach().to("meta") for name, tensor in tensors}
