"""Run networks in float64 throughout, also where their own code asks for float32.

Some layers compute in float32 whatever comes (timm's LayerNormFp32, softmax with ``dtype=``): in
mixed precision that protects them, but in float64 it rounds, and rounding hides which channel
copies which. While a network is probed and certified, float64 stands wherever its code says
float32. Nothing of the network changes: in training it computes as it always did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _Double(TorchFunctionMode):
    """Read every float32 that torch functions are asked for as float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.float:
            return args[0].double()
        if func is not Tensor.view:  # which reads the same bits as numbers of another type
            args = tuple(map(_double, args))
            kwargs = {name: _double(value) for name, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def _double(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def in_double() -> Iterator[None]:
    """While this lasts, torch computes in float64 what it is asked to compute in float32.

    Tensors that are made without a type are float64 as well. Functions on float64 tensors alone
    are what they were.

    Example:
        >>> with in_double():
        ...     torch.ones(2, dtype=torch.float64).float().dtype
        torch.float64
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Double():
            yield
    finally:
        torch.set_default_dtype(before)
