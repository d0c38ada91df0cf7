"""Run a network once and record the outputs of modules and the inputs of activations and norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from gpd_cli.errors import MethodError

_IMAGES = 2
_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.GELU)
_NORMS = (nn.BatchNorm2d, nn.GroupNorm)


@dataclass(frozen=True)
class Recorded:
    """A recorded output or input of a module.

    Args:
        tensor: the output or input, or the first tensor in a tuple or list of them.
        version: the tensor's version counter when it was recorded.
    """

    tensor: Tensor
    version: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(self.tensor.shape)

    @property
    def overwritten(self) -> bool:
        """Whether the tensor was changed in place after it was recorded."""
        return self.tensor._version != self.version

    def same(self, other: Recorded) -> bool:
        """Whether both recorded the same tensor, with no change in place in between."""
        return _same(self.tensor, other.tensor) and self.version == other.version


@dataclass(frozen=True)
class Run:
    """The recording of a network's run on two images.

    Args:
        outputs: outputs by module name, in the order in which the modules ended, for modules whose
            output has one row per image.
        inputs: inputs of the activations among these modules, by module name.
        norm_inputs: inputs of the norms among these modules, by module name.
        dropped: inputs of dropout layers that overwrite their inputs in train mode.
        classifier: name of the linear layer whose output is the logits; None without such a layer.
        embedding: input of the classifier, ``[2, F]``; None without a classifier.
    """

    outputs: Mapping[str, Recorded]
    inputs: Mapping[str, Recorded]
    norm_inputs: Mapping[str, Recorded]
    dropped: Sequence[Tensor]
    classifier: str | None
    embedding: Tensor | None

    def at(self, name: str, before: bool = False) -> Recorded | None:
        """The recorded output of a module, or None.

        Args:
            name: name of the module.
            before: whether the module's input is returned instead; only the inputs of activations
                are known.
        """
        return (self.inputs if before else self.outputs).get(name)

    def overwrites(self, seen: Recorded) -> bool:
        """Whether the network changes a tensor in place later on, in eval or only in train mode."""
        place = seen.tensor.untyped_storage().data_ptr()
        return seen.overwritten or any(
            dropped.untyped_storage().data_ptr() == place for dropped in self.dropped
        )


def run(network: nn.Module, shape: tuple[int, int, int]) -> Run:
    """Run a network in eval mode on two images of noise, which are the same in every call.

    Args:
        network: the network, which is left unchanged.
        shape: image shape, ``(C, H, W)``.

    Raises:
        MethodError: when the network returns no tensor.
    """
    outputs: dict[str, Recorded] = {}
    inputs: dict[str, Recorded] = {}
    norm_inputs: dict[str, Recorded] = {}
    linear: dict[str, Tensor] = {}
    dropped: list[Tensor] = []

    def hook(name: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            tensor = tensor_of_output(output)
            if tensor is None or tensor.ndim == 0 or len(tensor) != _IMAGES:
                return
            outputs.pop(name, None)
            outputs[name] = Recorded(tensor, tensor._version)
            if isinstance(module, nn.Linear) and tensor.ndim == 2:
                linear.pop(name, None)
                linear[name] = args[0]

        return note

    def entry(name: str, given: dict[str, Recorded]) -> Any:
        def note(module: nn.Module, args: Any) -> None:
            tensor = tensor_of_output(args)
            if tensor is not None:
                given[name] = Recorded(tensor, tensor._version)

        return note

    def drop(module: nn.Module, args: Any) -> None:
        tensor = tensor_of_output(args)
        if tensor is not None:
            dropped.append(tensor)

    named = [(name, module) for name, module in network.named_modules() if name]
    handles = [module.register_forward_hook(hook(name)) for name, module in named]
    handles += [
        module.register_forward_pre_hook(entry(name, given))
        for name, module in named
        for kinds, given in ((_ACTIVATIONS, inputs), (_NORMS, norm_inputs))
        if isinstance(module, kinds)
    ]
    handles += [
        module.register_forward_pre_hook(drop)
        for _, module in named
        if isinstance(module, _DropoutNd) and module.inplace
    ]
    modes = [(module, module.training) for module in network.modules()]
    like = next(network.parameters())
    try:
        with torch.inference_mode(False), torch.no_grad():
            images = torch.randn(_IMAGES, *shape, generator=torch.Generator().manual_seed(0))
            logits = tensor_of_output(network.eval()(images.to(like.device, like.dtype)))
    finally:
        for module, training in modes:
            module.training = training
        for handle in handles:
            handle.remove()
    if logits is None:
        raise MethodError(
            f"{type(network).__name__} returns no tensor of logits, which distillation needs."
        )
    # A classifier's output has to be the logits themselves; networks that average several heads
    # (distilled transformers) have no classifier in this sense.
    heads = [name for name in linear if _same(outputs[name].tensor, logits)]
    inputs, norm_inputs = (
        {name: seen for name, seen in given.items() if name in outputs}
        for given in (inputs, norm_inputs)
    )
    if not heads:
        return Run(outputs, inputs, norm_inputs, dropped, None, None)
    return Run(outputs, inputs, norm_inputs, dropped, heads[-1], linear[heads[-1]])


def tensor_of_output(output: Any) -> Tensor | None:
    """The output itself if it is a tensor, or the first tensor in tuples and lists, or None."""
    while isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.data_ptr() == other.data_ptr()
