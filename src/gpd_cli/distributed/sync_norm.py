"""Synchronized batch normalization, whose statistics are over the batches of all processes."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch.plugins import LayerSync
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as FusedSync
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode


class SyncedNorms(LayerSync):
    """Lightning plugin that synchronizes batch normalization layers over processes.

    The layers are changed in place: the class of each layer is replaced by a subclass. This keeps
    additions to batch normalization (such as the activation in timm's ``BatchNormAct2d``), hooks,
    parametrizations, layers with several names, parameters that are set for a run only, and all
    keys of state dicts. In eval mode the layers compute the same as before.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        """Synchronize all batch normalization layers of a module, in place."""
        for module in list(model.modules()):
            if isinstance(module, _BatchNorm) and not isinstance(module, _Synced):
                module.__class__ = _synced(type(module))  # type: ignore[assignment, arg-type]
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Give every layer its original class again, in place."""
        for module in list(model.modules()):
            if isinstance(module, _Synced):
                module.__class__ = type(module).__bases__[1]
        return model


class _Synced(nn.Module):
    """Mixin that synchronizes batch normalization; the original class follows it as second base."""

    # Collective operations cannot be part of a compiled graph.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(*args, **kwargs)
        with _OverAllProcesses():
            return super().forward(*args, **kwargs)


@cache
def _synced(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"Synced{cls.__name__}", (_Synced, cls), {})


class _OverAllProcesses(TorchFunctionMode):
    """A mode within which `torch.nn.functional.batch_norm` uses statistics over all processes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As `torch.nn.functional.batch_norm`, with statistics over all processes when training."""
    if not training:
        return nn.functional.batch_norm(
            input, running_mean, running_var, weight, bias, False, momentum, eps
        )
    if input.device.type != "cpu":
        group, world = dist.group.WORLD, dist.get_world_size()
        statistics = (running_mean, running_var, eps, momentum, group, world)
        return cast(Tensor, FusedSync.apply(input, weight, bias, *statistics))
    return _composed(input, running_mean, running_var, weight, bias, momentum, eps)


def _composed(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """Synchronized batch normalization by elementary operations; torch's fused one needs a GPU."""
    values = input.float() if input.element_size() < 4 else input
    axes = [axis for axis in range(input.ndim) if axis != 1]
    shape = [-1 if axis == 1 else 1 for axis in range(input.ndim)]
    ones = values.new_full((1,), values.numel() // values.shape[1])
    total, count = _summed(torch.cat([values.sum(axes), ones])).split([values.shape[1], 1])
    mean = total / count.detach()
    centred = values - mean.view(shape)
    variance = _summed(centred.square().sum(axes)) / count.detach()
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            unbiased = variance * (count / (count - 1))
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    output: Tensor = centred * (variance + eps).rsqrt().view(shape)
    if weight is not None:
        output = output * weight.view(shape)
    if bias is not None:
        output = output + bias.view(shape)
    return output.to(input.dtype)


def _summed(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, through which gradients flow to all processes."""
    return cast(Tensor, _Sum.apply(values))


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total
