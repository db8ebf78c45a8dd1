"""Training over processes that each keep a part of what trains, of its gradients and of its optimizer's state.

This is torch's fully_shard (FSDP2; arXiv 2304.11277). Frozen parameters stay whole in every process and nothing of them
travels. All that trains is gathered at once for a step: it is small, being what SCA adds to frozen models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map


class ShardedModule(nn.Module):
    """A module whose trainable parameters are sharded; it does its own reduction of gradients."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> Any:
        return self.module(*inputs)


def shard_parameters(module: nn.Module) -> None:
    """Shards what trains in a module, in place. The process group must be there."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    frozen_parameters = {parameter for parameter in module.parameters() if not parameter.requires_grad}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fully_shard(
        module, mesh=init_device_mesh(device, (torch.distributed.get_world_size(),)), ignored_params=frozen_parameters
    )


def gather_tensors(tree: Any) -> Any:
    """Tensors in dictionaries and lists, made whole; all processes must ask."""
    return tree_map(lambda leaf: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf, tree)


def shard_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """A whole tensor cut up like another one, if that is."""
    return (
        distribute_tensor(tensor, reference.device_mesh, reference.placements)
        if isinstance(reference, DTensor)
        else tensor
    )


def shard_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Cuts up what was loaded into an optimizer like its parameters."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape and not isinstance(value, DTensor):
                state[name] = shard_like(value, parameter)


def load_full_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Loads whole tensors by name; gives the names that are missing and those that are not known."""
    module_tensors = module.state_dict()
    sharded_tensors = {
        name: shard_like(tensor, module_tensors[name]) if name in module_tensors else tensor
        for name, tensor in tensors.items()
    }
    return module.load_state_dict(sharded_tensors, strict=False)
