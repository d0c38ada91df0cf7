"""One run of a network that notes what every module gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpd_cli.errors import MethodError

_IMAGES = 2


@dataclass(frozen=True)
class Seen:
    """What a module gave.

    Args:
        tensor: its output, or the first tensor in it.
        version: of the tensor, when the module ended.
    """

    tensor: Tensor
    version: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the output."""
        return tuple(self.tensor.shape)

    @property
    def overwritten(self) -> bool:
        """Whether it was changed in place after the module had ended."""
        return self.tensor._version != self.version


def run(network: nn.Module, shape: tuple[int, int, int]) -> tuple[Mapping[str, Seen], str | None]:
    """Run a network on two black images, in eval mode.

    Args:
        network: left as it was.
        shape: of its images, ``(C, H, W)``.

    Returns:
        What each module gave by its name, in the order in which they ended, for modules that give
        one row per image; and the name of the linear layer whose output is the logits, if any.
    """
    outputs: dict[str, Seen] = {}
    linear: list[str] = []

    def hook(name: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is None or tensor.ndim == 0 or len(tensor) != _IMAGES:
                return
            outputs.pop(name, None)
            outputs[name] = Seen(tensor, tensor._version)
            if isinstance(module, nn.Linear) and tensor.ndim == 2:
                linear.append(name)

        return note

    handles = [
        module.register_forward_hook(hook(name)) for name, module in network.named_modules() if name
    ]
    modes = [(module, module.training) for module in network.modules()]
    like = next(network.parameters())
    try:
        with torch.inference_mode(False), torch.no_grad():
            images = torch.zeros(_IMAGES, *shape, device=like.device, dtype=like.dtype)
            logits = first_tensor(network.eval()(images))
    finally:
        for module, training in modes:
            module.training = training
        for handle in handles:
            handle.remove()
    if logits is None:
        raise MethodError(f"{type(network).__name__} gives no tensor of logits to distil from.")
    # The very logits: averaged heads, as of distilled transformers, have no classifier.
    heads = [name for name in linear if _same(outputs[name].tensor, logits)]
    return outputs, heads[-1] if heads else None


def first_tensor(output: Any) -> Tensor | None:
    """The first tensor of a module's output; None if it gives none."""
    while isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.data_ptr() == other.data_ptr()
