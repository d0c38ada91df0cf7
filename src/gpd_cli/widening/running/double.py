"""Run networks in float64 throughout, also where their own code asks for float32.

Some layers compute in float32 whatever the type of their input (timm's LayerNormFp32, softmax with
``dtype=``). This protects them in mixed precision, but rounds float64 activations, and rounding
hides which channel copies which. While a network is probed and certified, float64 therefore
replaces float32 wherever the network's code asks for float32. The network itself does not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _Double(TorchFunctionMode):
    """Replace every ``torch.float32`` among the arguments of torch functions by float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.float:
            return args[0].double()
        if func is not Tensor.view:  # a view with a type reinterprets the same bits
            args = tuple(map(_double, args))
            kwargs = {name: _double(value) for name, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def _double(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def in_double() -> Iterator[None]:
    """Within this context torch computes in float64 wherever code asks for float32.

    Tensors made without a type are float64 as well. Functions of float64 tensors do not change.

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
