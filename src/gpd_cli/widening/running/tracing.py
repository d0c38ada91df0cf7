"""Observe which torch functions a network calls, and which module calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_RECTIFIERS = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
_NOT_HOMOGENEOUS = {
    F.relu6,
    F.hardtanh,
    F.hardtanh_,
    F.hardswish,
    F.hardsigmoid,
    F.gelu,
    F.silu,
    F.mish,
    F.elu,
    F.elu_,
    F.celu,
    F.selu,
    F.softplus,
}
_SLOPE = 0.3  # slope of the leaky activation below zero
_SHIFT = 0.1  # shift of the input; without it, twice the input would give twice the output

_LINEAR = {F.linear, F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d}


class Tracer(TorchFunctionMode):
    """Replace activation functions by a leaky one, and pass every other torch call to `call`.

    Index maps do not depend on the activation function. But with a rectifier, several channels
    could be zero in the whole probe batch, and could then not be told apart. Multiples of copies
    stay multiples only through rectifiers; so in place of other activation functions the input is
    shifted first, which lets wrong multiples show.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Replace activation functions by a leaky one, and pass all other calls to `call`."""
        kwargs = kwargs or {}
        if func in _RECTIFIERS or func in _NOT_HOMOGENEOUS:
            x = args[0] if args else kwargs["input"]
            return F.leaky_relu(x if func in _RECTIFIERS else x - _SHIFT, _SLOPE)
        return self.call(func, args, kwargs)

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call; subclasses override this to observe or change calls."""
        return func(*args, **kwargs)


def linear_call(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Any, Any] | None:
    """Input, weight and bias of a call of a linear or convolution function; None for others.

    Grouped convolutions are among the others, since they do not mix all channels.

    Args:
        func: the function.
        args: the positional arguments.
        kwargs: the keyword arguments.
    """
    groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
    if func not in _LINEAR or groups != 1:
        return None
    x, weight, bias = (
        args[k] if k < len(args) else kwargs.get(name)
        for k, name in enumerate(("input", "weight", "bias"))
    )
    return (x, weight, bias) if isinstance(x, Tensor) else None


def all_tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of any dtype in a nested structure of tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from all_tensors_in(inner)
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from all_tensors_in(inner)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in a nested structure of tuples, lists and dictionaries."""
    return (tensor for tensor in all_tensors_in(value) if tensor.is_floating_point())


def replace_tensors(value: Any, replaced: Mapping[int, Tensor]) -> Any:
    """Replace some tensors in a nested structure of tuples, lists and dictionaries.

    Args:
        value: the structure.
        replaced: the new tensors, by the id of the tensors that they replace.
    """
    if isinstance(value, Tensor):
        return replaced.get(id(value), value)
    if isinstance(value, dict):
        return {key: replace_tensors(inner, replaced) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(replace_tensors(inner, replaced) for inner in value)
    return value


def first_tensor(*values: Any) -> Tensor | None:
    """The first floating-point tensor in values, which may be nested, or None."""
    return next(tensors_in(values), None)


class Position:
    """Keeps track, by hooks, of the modules that are running.

    Args:
        network: the network.
        is_leaf: function that says whether a module is a leaf.
    """

    def __init__(self, network: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> None:
        self._stack: list[tuple[str, int]] = []
        self._calls: dict[str, int] = {}
        self._leaves = {name for name, module in network.named_modules() if is_leaf(module)}

    @property
    def execution(self) -> tuple[str, int] | None:
        """The container whose own code runs, and the number of the call; None inside a leaf."""
        if not self._stack or any(name in self._leaves for name, _ in self._stack):
            return None
        return self._stack[-1]

    @property
    def container(self) -> str | None:
        """The name of the container whose own code runs; None inside a leaf."""
        execution = self.execution
        return None if execution is None else execution[0]

    def hooks(self, network: nn.Module) -> Iterable[Any]:
        """Register the hooks that keep track of running modules, and yield their handles.

        They have to be registered before other hooks, which then see the present position.
        """
        for name, module in network.named_modules():

            def enter(module: nn.Module, args: Any, name: str = name) -> None:
                call = self._calls.get(name, 0)
                self._calls[name] = call + 1
                self._stack.append((name, call))

            def leave(module: nn.Module, args: Any, output: Any) -> None:
                self._stack.pop()

            yield module.register_forward_pre_hook(enter)
            yield module.register_forward_hook(leave)
