"""What a network of someone else's would give, without computing it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call


@torch.no_grad()
def feature_shape(network: nn.Module, size: int, stride: int | None = None) -> tuple[int, int]:
    """The channels and the stride of the features (1, C, size/stride, size/stride) that pixels (1, 3, size, size) give.

    Raises ValueError if they are not square, the stride is no whole number, or not the network's own, where that is
    known: then it would leave out an edge of the image.
    """
    with torch.device("meta"):
        shape = functional_call(network, _drawn(network), (torch.empty(1, 3, size, size),)).shape
    if len(shape) != 4 or shape[2] != shape[3] or size % shape[2]:
        raise ValueError(
            f"images of {size} pixels give features of shape {tuple(shape)}, and a square grid whose side divides "
            "the image's is needed: choose another size or layer"
        )
    found = size // shape[2]
    if stride is not None and found != stride:
        raise ValueError(f"size {size} must be a multiple of the stride {stride}")
    return shape[1], found


def freeze_unused(network: nn.Module, size: int) -> None:
    """Parameters that have no part in what pixels (1, 3, size, size) give shall not ask for gradients."""
    drawn = _drawn(network)
    parameters = {name: drawn[name].requires_grad_() for name, _ in network.named_parameters()}
    with torch.device("meta"), torch.enable_grad():
        given = functional_call(network, drawn, (torch.empty(1, 3, size, size),))
        gradients = torch.autograd.grad(given.sum(), list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            network.get_parameter(name).requires_grad_(False)


def _drawn(network: nn.Module) -> dict[str, Tensor]:
    everything = [*network.named_parameters(), *network.named_buffers()]  # one that is shared, once
    return {name: tensor.detach().to("meta") for name, tensor in everything}
