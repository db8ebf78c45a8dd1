"""Sharding of trainable parameters, gradients and optimizer states over processes.

Uses `fully_shard` of torch (FSDP2; arXiv 2304.11277). Frozen parameters are replicated in every process and never
communicated. All trainable parameters form one group that is gathered at once, because SCA adds few parameters to its
frozen models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map


class ShardedModule(nn.Module):
    """Wrapper of a module with sharded parameters, which reduces its gradients itself."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> Any:
        """Call the wrapped module."""
        return self.module(*inputs)


def shard_parameters(module: nn.Module) -> None:
    """Shard the trainable parameters of a module in place; requires an initialized process group."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    frozen_parameters = {parameter for parameter in module.parameters() if not parameter.requires_grad}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fully_shard(
        module, mesh=init_device_mesh(device, (torch.distributed.get_world_size(),)), ignored_params=frozen_parameters
    )


def gather_tensors(tree: Any) -> Any:
    """Gather the sharded tensors of nested dictionaries and lists; all processes must call it."""
    return tree_map(lambda leaf: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf, tree)


def shard_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """Shard a full tensor like `reference`; return it unchanged if that is not sharded."""
    return (
        distribute_tensor(tensor, reference.device_mesh, reference.placements)
        if isinstance(reference, DTensor)
        else tensor
    )


def shard_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Shard the loaded state of an optimizer like its parameters."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape and not isinstance(value, DTensor):
                state[name] = shard_like(value, parameter)


def load_full_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Load full tensors into a module that may be sharded; return the missing and the unexpected names."""
    module_tensors = module.state_dict()
    sharded_tensors = {
        name: shard_like(tensor, module_tensors[name]) if name in module_tensors else tensor
        for name, tensor in tensors.items()
    }
    return module.load_state_dict(sharded_tensors, strict=False)
