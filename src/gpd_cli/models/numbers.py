"""Check that the numbers in tensors from a file are possible for a network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_STATISTICS = ("running_mean", "running_var")


def unusual_tensor(tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Find a tensor of a kind that networks do not have: complex, quantized or not strided.

    Args:
        tensors: the state dict.

    Returns:
        Name of the first such tensor, and its dtype and layout in words; None if there is none.
    """
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_complex() or tensor.is_quantized:
            return name, f"{tensor.dtype}, {tensor.layout}"
    return None


def wrong_numbers(
    network: nn.Module, tensors: Mapping[str, Tensor], *, finite: bool = True
) -> str | None:
    """Find a tensor with impossible values.

    These are integers where the network has floating-point numbers or the reverse, weights and
    running statistics that are NaN or infinite, and negative variances.

    Args:
        network: a network whose tensors have the right kinds of numbers.
        tensors: tensors by their names in the network; tensors of other names are not checked.
        finite: whether values are checked as well as kinds of numbers.

    Returns:
        Name of the first such tensor and what is wrong, in words; None if there is none.
    """
    weights = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    for name, own in network.state_dict().items():
        if name not in tensors:
            continue
        found = tensors[name]
        if found.is_floating_point() != own.is_floating_point():
            return f"{name} is of {found.dtype} and not of {own.dtype}"
        if finite and (name in weights or name.endswith(_STATISTICS)):
            if not torch.isfinite(values := _comparable(found)).all():
                return f"{name} has values that are NaN or infinite"
            if name.endswith("running_var") and (values < 0).any():
                return f"{name} has a negative variance"
    return None


def _comparable(tensor: Tensor) -> Tensor:
    """Convert floating-point types of one byte, which torch cannot compare, to float32."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
