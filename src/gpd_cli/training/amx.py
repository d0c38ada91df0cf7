"""Workaround for a bug of oneDNN: some bfloat16 convolutions are run in float32.

On processors with AMX, oneDNN computes a wrong weight gradient for strided bfloat16 convolutions
whose input maps have one pixel: the computation reads memory that was never written, and weights
become NaN after some steps, at random. To report upstream: the processor,
``torch.__config__.show()``, and that ``torch.nn.functional.conv2d`` with a 3 x 3 kernel, stride 2,
padding 1, on bfloat16 images ``[B, C, 1, 1]`` gives another weight gradient at each computation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd


def has_amx() -> bool:
    """Whether the processor has AMX, by which bfloat16 is then computed."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported is not None and supported())


def keep_in_float32(network: nn.Module) -> int:
    """Run strided convolutions in float32, outside autocast, on input maps of one pixel.

    Args:
        network: module with the trained networks; forward hooks are added to its convolutions.

    Returns:
        The number of layers that got hooks.
    """
    count = 0
    for module in network.modules():
        if isinstance(module, _ConvNd) and max(module.stride) > 1 and max(module.kernel_size) > 1:
            _Guard(module)
            count += 1
    return count


class _Guard:
    """Hooks of one convolution that switch CPU autocast off during its forward pass."""

    def __init__(self, module: nn.Module) -> None:
        self._left: list[Any] = []
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        images, *others = inputs
        if max(images.shape[2:]) > 1 or not torch.is_autocast_enabled("cpu"):
            return None
        if torch.get_autocast_dtype("cpu") != torch.bfloat16:
            return None
        outside = torch.autocast("cpu", enabled=False)
        outside.__enter__()
        self._left.append(outside)
        return images.float(), *others

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._left:
            self._left.pop().__exit__(None, None, None)
