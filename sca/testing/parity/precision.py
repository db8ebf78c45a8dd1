"""Computation in float64 only, also where models convert to float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from sca.io.errors import InputError


@contextmanager
def compute_in_float64() -> Iterator[None]:
    """Compute in float64 only, and create tensors in float64.

    Many models convert norms and softmax to float32, which turns rounding errors of 1e-16 into differences of 1e-7.

    Raises:
        InputError: An operation does not support float64.
    """
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64Mode():
            yield
    except RuntimeError as error:
        if "Double" not in str(error):
            raise
        raise InputError(f"the model cannot be computed in float64: {' '.join(str(error).split())}") from error
    finally:
        torch.set_default_dtype(default_dtype)


class _Float64Mode(TorchFunctionMode):
    """Replaces conversions to float32 by conversions to float64."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        arguments = [_promote_dtype(each) for each in args]
        return func(*arguments, **{name: _promote_dtype(each) for name, each in (kwargs or {}).items()})


def _promote_dtype(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
