"""Parameters that two modules share."""

from __future__ import annotations

from torch import nn


def share_parameters(source: nn.Module, target: nn.Module) -> None:
    """Replace the parameters of a module by those of another one with the same names.

    Args:
        source: Module whose parameters are used.
        target: Module whose parameters are replaced, for example one on the meta device.

    Raises:
        RuntimeError: The names or shapes differ.
    """
    parameters = dict(source.named_parameters(remove_duplicate=False))
    for name, parameter in target.named_parameters():
        if name in parameters:  # otherwise `load_state_dict` raises
            parameter.requires_grad_(parameters[name].requires_grad)  # torch copies it to the assigned parameter
    target.load_state_dict(parameters, assign=True)
