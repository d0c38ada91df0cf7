"""Convert networks to another type of number, without losing imaginary parts."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def converted(network: Network, device: torch.device | str, dtype: torch.dtype) -> Network:
    """Convert a network in place, as its method `to` does, but keep complex tensors complex.

    Args:
        network: the network.
        device: the new device.
        dtype: the new type of real tensors; complex tensors get the complex type of the same
            precision.
    """
    complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64

    def convert(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(device, complex_dtype)
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    network._apply(convert)  # type: ignore[no-untyped-call]
    return network
