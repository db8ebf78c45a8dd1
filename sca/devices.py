"""Devices and number formats by name. Importing this module does not import torch."""

from __future__ import annotations

from textwrap import shorten
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DEVICE_EXAMPLES = "cpu, cuda, cuda:1, mps"
DTYPES = ("float32", "bfloat16", "float16")


def resolve_device(name: str | torch.device, allow_meta: bool = False) -> torch.device:
    """Find a device that computes on this machine.

    Args:
        name: Such as "cuda:1".
        allow_meta: Accept "meta", which computes nothing.

    Raises:
        ValueError: If the name is not a device, or torch does not have it here.
    """
    import torch

    try:
        device = torch.device(name)
        if not (allow_meta and device.type == "meta"):
            torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, TypeError) as error:  # for a wrong name, an absent device, another type
        reason = shorten(str(error).rstrip("."), 80, placeholder=" ...")
        hint = " Did you mean 'cuda'?" if str(name).startswith("gpu") else ""
        raise ValueError(
            f"device {str(name)!r} is not available ({reason}).{hint} Try one of: {DEVICE_EXAMPLES}"
        ) from error
    return device


def resolve_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """Find the number format of weights; None stays None.

    Raises:
        ValueError: If the name is not one of `DTYPES`, or the format is not of floating-point numbers.
    """
    import torch

    if isinstance(name, torch.dtype) and name.is_floating_point:
        return name
    if name is not None and name not in DTYPES:
        from sca_registry.errors import make_unknown_name_error

        raise make_unknown_name_error(f"no dtype {str(name)!r}", str(name), DTYPES)
    return None if name is None else getattr(torch, str(name))
