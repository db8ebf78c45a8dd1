"""Devices, dtypes and precisions by name.

Importing this module does not import torch.
"""

from __future__ import annotations

from textwrap import shorten
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DEVICE_EXAMPLES = "cpu, cuda, cuda:1, mps"
DTYPES = ("float32", "bfloat16", "float16")
PRECISIONS = (*DTYPES, "int8", "auto")


def resolve_device(name: str | torch.device, allow_meta: bool = False) -> torch.device:
    """Return an available device by name.

    Args:
        name: Name such as "cuda:1".
        allow_meta: Accept "meta", the device without data.

    Returns:
        The device.

    Raises:
        ValueError: The name is invalid, or the device is not available.
    """
    import torch

    try:
        device = torch.device(name)
        if not (allow_meta and device.type == "meta"):
            torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, TypeError) as error:  # an invalid name, a missing device, another type
        reason = shorten(str(error).rstrip("."), 80, placeholder=" ...")
        hint = " Did you mean 'cuda'?" if str(name).startswith("gpu") else ""
        raise ValueError(
            f"device {str(name)!r} is not available ({reason}).{hint} Try one of: {DEVICE_EXAMPLES}"
        ) from error
    return device


def resolve_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """Return the dtype of weights by name.

    Args:
        name: One of `DTYPES`, a dtype, or None.

    Returns:
        The dtype; None for None.

    Raises:
        ValueError: The name is not one of `DTYPES`, or the dtype is not a floating-point one.
    """
    import torch

    if isinstance(name, torch.dtype) and name.is_floating_point:
        return name
    if name is not None and name not in DTYPES:
        from sca_registry.errors import make_unknown_name_error

        raise make_unknown_name_error(f"unknown dtype {str(name)!r}", str(name), DTYPES)
    return None if name is None else getattr(torch, str(name))


def resolve_precision(precision: str | torch.dtype | None) -> str | None:
    """Return the name of a precision.

    Args:
        precision: One of `PRECISIONS`, a dtype of torch, or None.

    Returns:
        One of `PRECISIONS`; None for None.

    Raises:
        ValueError: The precision is unknown.
    """
    name = None if precision is None else str(precision).removeprefix("torch.")
    if name is not None and name not in PRECISIONS:
        from sca_registry.errors import make_unknown_name_error

        raise make_unknown_name_error(f"unknown precision {name!r}", name, PRECISIONS)
    return name
