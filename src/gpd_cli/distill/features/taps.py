"""Forward hooks that catch stage maps and embedding while a network runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gpd_cli.distill.features.places import Places
from gpd_cli.distill.features.running import first_tensor
from gpd_cli.errors import MethodError


@dataclass(frozen=True)
class Outputs:
    """What a network says about a batch.

    Args:
        logits: ``[B, C]``.
        stages: feature maps, from shallow to deep, each ``[B, C_i, H_i, W_i]``, in the type the
            network computed them in; empty unless the method needs them.
        embedding: what the classifier sees, ``[B, F]``; None unless the method needs it.
        weight: the classifier's weight, ``[C, F]``, as it was used, with its graph; None likewise.
        bias: the classifier's bias, ``[C]``, or None.
    """

    logits: Tensor
    stages: tuple[Tensor, ...] = ()
    embedding: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    def detach(self) -> Outputs:
        """The same without graph."""
        return replace(
            self,
            logits=self.logits.detach(),
            stages=tuple(stage.detach() for stage in self.stages),
            **{
                name: None if (value := getattr(self, name)) is None else value.detach()
                for name in ("embedding", "weight", "bias")
            },
        )


class Taps:
    """Hooks on a network's stages and classifier; the network itself is not edited.

    A copy of the network, deep or pickled, gets hooks that catch nothing: it would otherwise hold
    on to the features and graph of its last run.

    Args:
        network: what runs; hooks stay until `remove`.
        places: where to look in it.
    """

    def __init__(self, network: nn.Module, places: Places) -> None:
        self._places = places
        self._stages = [_Catch(stage.overwritten) for stage in places.stages]
        self._handles = []
        for stage, catch in zip(places.stages, self._stages, strict=True):
            module = network.get_submodule(stage.name)
            self._handles.append(
                module.register_forward_pre_hook(catch)
                if stage.before
                else module.register_forward_hook(catch)
            )
        self._classifier = _CatchInput()
        if places.classifier is not None:
            module = network.get_submodule(places.classifier)
            self._handles.append(module.register_forward_pre_hook(self._classifier))

    def take(self, logits: Tensor) -> Outputs:
        """What was caught in the run that gave these logits; it is let go here.

        Args:
            logits: ``[B, C]``.

        Raises:
            MethodError: when a module did not run.
        """
        maps = []
        for stage, catch in zip(self._places.stages, self._stages, strict=True):
            output = catch.take()
            if output is None:
                raise MethodError(
                    f"Module '{stage.name}' did not run and gives no features; name one that runs "
                    "in train and in eval mode."
                )
            maps.append(stage.as_map(output))
        return Outputs(logits, tuple(maps), *self._classifier.take())

    def remove(self) -> None:
        """Take the hooks away and let go of what they caught."""
        for handle in self._handles:
            handle.remove()
        for catch in self._stages:
            catch.take()
        self._classifier.take()


class _Catch:
    """A forward hook that keeps the output, or a copy if the network overwrites it.

    As a forward pre-hook it keeps the input.
    """

    def __init__(self, copies: bool) -> None:
        self._copies = copies
        self._value: Tensor | None = None

    def __call__(self, module: nn.Module, args: Any, *output: Any) -> None:
        value = first_tensor(output or args)
        self._value = value.clone() if self._copies and value is not None else value

    def take(self) -> Tensor | None:
        value, self._value = self._value, None
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return _Inert, ()


class _CatchInput:
    """A forward pre-hook that keeps a linear layer's input and the weights it runs with."""

    def __init__(self) -> None:
        self._value: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)

    def __call__(self, module: nn.Module, args: Any) -> None:
        assert isinstance(module, nn.Linear)
        # Here and not later: the student's weights are put in place for the run only.
        weight: Tensor = module.weight
        bias: Tensor | None = module.bias
        if not torch.is_grad_enabled():
            # They have a gradient of their own, unlike what is computed with them.
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        self._value = (args[0], weight, bias)

    def take(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        value, self._value = self._value, (None, None, None)
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return _Inert, ()


class _Inert:
    """What a copied hook becomes."""

    def __call__(self, *_: Any) -> None:
        return None

    def take(self) -> None:
        return None
