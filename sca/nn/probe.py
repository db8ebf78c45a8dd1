"""What a network of someone else's would give, without computing it."""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call


@torch.no_grad()
def feature_shape(network: nn.Module, size: int) -> tuple[int, int]:
    """The channels and the stride of the features (1, C, size/stride, size/stride) that pixels (1, 3, size, size) give.

    Raises ValueError if they are not square, or the stride is no whole number.
    """
    everything = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
    drawn = {name: tensor.to("meta") for name, tensor in everything}
    with torch.device("meta"):
        shape = functional_call(network, drawn, (torch.empty(1, 3, size, size),)).shape
    if len(shape) != 4 or shape[2] != shape[3] or size % shape[2]:
        raise ValueError(
            f"images of {size} pixels give features of shape {tuple(shape)}, and a square grid whose side divides "
            "the image's is needed: choose another size or layer"
        )
    return shape[1], size // shape[2]
