"""Run a network on weights that are not its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn
from torch.func import functional_call


def with_weights(network: nn.Module, weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Run a network on given weights, and leave its own as they are.

    Args:
        network: the network.
        weights: a weight for each name of each parameter of the network, tied ones included.
        images: a batch, ``[B, C, H, W]``.

    Returns:
        The logits, ``[B, classes]``.
    """
    # A module that is registered twice has each weight under a further name. By default torch sets
    # and restores that as well, in the wrong order: a given weight would then stay in the module.
    logits = functional_call(network, dict(weights), (images,), tie_weights=False)
    return cast(Tensor, logits)
