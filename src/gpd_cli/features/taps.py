"""Forward hooks that catch stage maps and embedding while a network runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from gpd_cli.features.places import Places, first_tensor


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

    A copy of the network gets copies of the hooks that catch nothing.

    Args:
        network: what runs; hooks stay until `remove`.
        places: where to look in it.
    """

    def __init__(self, network: nn.Module, places: Places) -> None:
        self._places = places
        self._stages = [_Catch() for _ in places.stages]
        self._handles = [
            network.get_submodule(stage.name).register_forward_hook(catch)
            for stage, catch in zip(places.stages, self._stages, strict=True)
        ]
        self._classifier = _CatchInput()
        if places.classifier is not None:
            module = network.get_submodule(places.classifier)
            self._handles.append(module.register_forward_pre_hook(self._classifier))

    def take(self, logits: Tensor) -> Outputs:
        """What was caught in the run that gave these logits; it is let go here.

        Args:
            logits: ``[B, C]``.
        """
        stages = tuple(
            stage.as_map(first_tensor(catch.take()))
            for stage, catch in zip(self._places.stages, self._stages, strict=True)
        )
        return Outputs(logits, stages, *self._classifier.take())

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()


class _Catch:
    """A forward hook that keeps the output."""

    def __init__(self) -> None:
        self._value: Any = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self._value = output

    def take(self) -> Any:
        value, self._value = self._value, None
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> _Inert:
        return _Inert()


class _CatchInput:
    """A forward pre-hook that keeps a linear layer's input and the weights it runs with."""

    def __init__(self) -> None:
        self._value: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)

    def __call__(self, module: nn.Module, args: Any) -> None:
        assert isinstance(module, nn.Linear)
        # Here and not later: the student's weights are put in place for the run only.
        self._value = (args[0], module.weight, module.bias)

    def take(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        value, self._value = self._value, (None, None, None)
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> _Inert:
        return _Inert()


class _Inert:
    """What a copied hook becomes."""

    def __call__(self, *_: Any) -> None:
        return None
