"""Empty the caches that modules compute from their weights in eval mode."""

from __future__ import annotations

from torch import nn


def refresh(network: nn.Module) -> None:
    """Empty the caches of modules that keep results while in eval mode (LeViT's biases).

    Such modules empty their caches in ``train()``, which is called here. Afterwards every module
    has its own mode again.

    Args:
        network: a network that was copied or has new weights.
    """
    modes = [(module, module.training) for module in network.modules()]
    try:
        network.train()
    finally:
        for module, mode in modes:
            module.training = mode
