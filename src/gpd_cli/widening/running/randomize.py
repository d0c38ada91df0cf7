"""Give a network random weights and statistics, so that every error of an expansion shows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gpd_cli.widening.running.own_errors import forward_errors, own_errors
from gpd_cli.widening.running.refresh import refresh
from gpd_cli.widening.running.tracing import Tracer, first_tensor


def randomize(network: nn.Module, generator: torch.Generator) -> None:
    """Give every parameter and running statistic a random value, in place.

    In a new network, statistics of 0 and 1, gates of zero and tokens of zero would hide errors.

    Args:
        network: the network to change.
        generator: random generator of the values.
    """

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

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


def calibrate(network: nn.Module, images: Tensor, generator: torch.Generator) -> None:
    """Give batch norms running statistics near the statistics of their inputs, in place.

    With statistics that do not suit the inputs, the activations of a deep network would grow until
    attention weights are all 0 or 1, which hides errors.

    Args:
        network: the network, in eval mode.
        images: a batch, ``[B, C, H, W]``.
        generator: random generator of the deviations from the inputs' statistics.

    Raises:
        ForwardError: when the network does not run on the images.
    """
    modules = network.modules()
    norms = [m for m in modules if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return

    def near(like: Tensor) -> Tensor:
        deviation = torch.randn(like.shape, generator=generator, dtype=torch.float64)
        return 1 + 0.15 * deviation.clamp(-3, 3).to(like)

    @own_errors()
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        assert isinstance(module, _BatchNorm) and module.running_mean is not None
        x = first_tensor(args, kwargs)
        if x is None:
            return
        x = x.detach().transpose(0, 1).flatten(1)
        mean, var = x.mean(1), x.var(1, correction=0)
        # Channels with hardly any variance would amplify rounding from layer to layer.
        var = var.clamp(min=0.25 * float(var.mean()) + 1e-6)
        module.running_mean.copy_(mean * near(mean))
        assert module.running_var is not None
        module.running_var.copy_(var * near(var))

    handles = [norm.register_forward_pre_hook(hook, with_kwargs=True) for norm in norms]
    try:
        with (
            torch.no_grad(),
            forward_errors(),
            Tracer(),
        ):  # the tracer replaces activation functions, as in the recorded run
            network(images)
    finally:
        for handle in handles:
            handle.remove()
        refresh(network)
