"""Forward hooks that keep a network's feature maps and embedding while the network runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gpd_cli.distill.features.info import FeatureInfo
from gpd_cli.distill.features.running import tensor_of_output
from gpd_cli.errors import MethodError


@dataclass(frozen=True)
class Outputs:
    """Logits and features of a network for a batch.

    Args:
        logits: the network's logits, ``[B, C]``.
        stages: feature maps, from shallow to deep, each ``[B, C_i, H_i, W_i]``, in the dtype of the
            network's activations; empty unless the method needs feature maps.
        embedding: input of the classifier, ``[B, F]``; None unless the method needs the embedding.
        weight: weight of the classifier in this run, ``[C, F]``, with its graph; None unless the
            method needs the embedding.
        bias: bias of the classifier in this run, ``[C]``, or None.
    """

    logits: Tensor
    stages: tuple[Tensor, ...] = ()
    embedding: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    def detach(self) -> Outputs:
        """The same outputs, detached from the graph."""
        return replace(
            self,
            logits=self.logits.detach(),
            stages=tuple(stage.detach() for stage in self.stages),
            **{
                name: None if (value := getattr(self, name)) is None else value.detach()
                for name in ("embedding", "weight", "bias")
            },
        )


class FeatureHooks:
    """Hooks on a network's stages and classifier, which keep the features of the last run.

    The network's code is not edited. In a deep or pickled copy of the network the hooks do nothing;
    otherwise the copy would keep the features and the graph of the last run alive.

    Args:
        network: the network, which keeps the hooks until `remove` is called.
        info: the network's stages and classifier.
    """

    def __init__(self, network: nn.Module, info: FeatureInfo) -> None:
        self._info = info
        self._stages = [_KeepOutput(stage.overwritten) for stage in info.stages]
        self._handles = []
        for stage, keep in zip(info.stages, self._stages, strict=True):
            module = network.get_submodule(stage.name)
            self._handles.append(
                module.register_forward_pre_hook(keep)
                if stage.before
                else module.register_forward_hook(keep)
            )
        self._classifier = _KeepClassifierInput()
        if info.classifier is not None:
            module = network.get_submodule(info.classifier)
            self._handles.append(module.register_forward_pre_hook(self._classifier))

    def take(self, logits: Tensor) -> Outputs:
        """Return the features of the last run, with the run's logits, and drop them here.

        Args:
            logits: the logits of the same run, ``[B, C]``.

        Raises:
            MethodError: when the module of a stage did not run.
        """
        maps = []
        for stage, keep in zip(self._info.stages, self._stages, strict=True):
            output = keep.take()
            if output is None:
                raise MethodError(
                    f"Module '{stage.name}' did not run and gives no features; name a module that "
                    "runs in train and in eval mode."
                )
            maps.append(stage.as_map(output))
        return Outputs(logits, tuple(maps), *self._classifier.take())

    def remove(self) -> None:
        """Remove the hooks from the network and drop the features that they keep."""
        for handle in self._handles:
            handle.remove()
        for keep in self._stages:
            keep.take()
        self._classifier.take()


class _KeepOutput:
    """A forward hook that keeps a module's output.

    Registered as a forward pre-hook, it keeps the module's input.

    Args:
        copies: whether a copy is kept, since the network changes the tensor in place later on.
    """

    def __init__(self, copies: bool) -> None:
        self._copies = copies
        self._value: Tensor | None = None

    def __call__(self, module: nn.Module, args: Any, *output: Any) -> None:
        value = tensor_of_output(output or args)
        self._value = value.clone() if self._copies and value is not None else value

    def take(self) -> Tensor | None:
        value, self._value = self._value, None
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return _Inert, ()


class _KeepClassifierInput:
    """A forward pre-hook that keeps a linear layer's input, and its weight and bias in this run."""

    def __init__(self) -> None:
        self._value: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)

    def __call__(self, module: nn.Module, args: Any) -> None:
        assert isinstance(module, nn.Linear)
        # They are read during the run, since the student's module has no weights afterwards.
        weight: Tensor = module.weight
        bias: Tensor | None = module.bias
        if not torch.is_grad_enabled():
            # Parameters require gradients even where the run's activations do not.
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        self._value = (args[0], weight, bias)

    def take(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        value, self._value = self._value, (None, None, None)
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return _Inert, ()


class _Inert:
    """The hook that does nothing, which replaces the other hooks in copies of a network."""

    def __call__(self, *_: Any) -> None:
        return None

    def take(self) -> None:
        return None
