"""Have modules forget what they computed from their weights in eval mode."""

from __future__ import annotations

from torch import nn


def refresh(network: nn.Module) -> None:
    """Empty the caches of modules that keep results until they are trained again (LeViT's biases).

    Such modules clear them in ``train()``; every module's mode is left as it was.

    Args:
        network: what was copied, or has got other weights.
    """
    modes = [(module, module.training) for module in network.modules()]
    network.train()
    for module, mode in modes:
        module.training = mode
