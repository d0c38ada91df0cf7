"""Run networks in float64 throughout, even where their own code asks for float32.

Some layers compute in float32 whatever the dtype of their input (timm's LayerNormFp32, softmax with
``dtype=``). This protects them in mixed precision, but it rounds float64 activations, so that one
cannot see which channel copies which. Therefore, while a network is observed and certified, float64
takes the place of float32 in the calls of the network's code. The network itself does not change.
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
        if func is not Tensor.view:  # a view with a dtype reinterprets the same bits
            args = tuple(map(_double, args))
            kwargs = {name: _double(value) for name, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def _double(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def in_double() -> Iterator[None]:
    """Within this context torch computes in float64 wherever code asks for float32.

    Tensors that are made without a dtype are float64 as well. Other calls do not change.

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
