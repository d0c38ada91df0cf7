"""Random weights and statistics, under which no error of an expansion can hide."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def randomize(network: nn.Module, generator: torch.Generator) -> None:
    """Give every parameter and running statistic a random value, in place.

    Fresh networks hide errors: statistics of 0 and 1, gates of zero, tokens of zero.

    Args:
        network: the network to change.
        generator: source of the values.
    """

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)

    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                fan_in = max(1, parameter[0].numel())
                parameter.copy_(normal(parameter) / fan_in**0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * normal(parameter))
            else:
                parameter.copy_(1 + 0.3 * normal(parameter).clamp(-3, 3))
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * normal(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(1 + 0.15 * normal(buffer).clamp(-3, 3))
