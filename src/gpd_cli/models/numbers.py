"""What the numbers of a network's tensors can be, whatever file they come from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_STATISTICS = ("running_mean", "running_var")


def unusual_tensor(tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The first tensor of complex numbers, or of another layout than networks have.

    Args:
        tensors: the state dict: tensors by name.

    Returns:
        Its name, and its dtype and layout in words; None if there is none.
    """
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_complex() or tensor.is_quantized:
            return name, f"{tensor.dtype}, {tensor.layout}"
    return None


def wrong_numbers(
    network: nn.Module, tensors: Mapping[str, Tensor], *, finite: bool = True
) -> str | None:
    """The first tensor whose values are none that a network's tensor can have.

    Those are whole numbers where the network has others or the reverse, weights and running
    statistics that are NaN or infinite, and negative variances.

    Args:
        network: a network whose tensors have the right kind of numbers.
        tensors: tensors by the names of the network; those of other names are not looked at.
        finite: whether to look at values as well, and not at the kind of numbers only.

    Returns:
        Its name and what is wrong, in words; None if all are right.
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
    """The tensor in a type that torch compares: types of one byte only store numbers."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
