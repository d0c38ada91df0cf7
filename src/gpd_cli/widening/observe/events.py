"""Events: calls in a container's code that may need other numbers or constants in the wide network.

Such numbers and constants are said to follow the copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gpd_cli.widening.numbers.alignment import overlays_operands
from gpd_cli.widening.numbers.calls import NUMBERED, Call
from gpd_cli.widening.observe.constants import Constants
from gpd_cli.widening.running.tracing import tensors_in


@dataclass
class Event:
    """A call in a container's own code whose numbers or constants may have to follow the copies.

    Args:
        function: the torch function that was called.
        tensors: the floating-point arguments: copies of the activations, and the constants
            themselves with their graph.
        result: the shape of the result, or a list of shapes if the result is several tensors.
    """

    function: Any
    tensors: list[Tensor]
    result: Any


def is_event(func: Any, args: Any, kwargs: Any, constants: Constants) -> bool:
    """Whether the numbers or the constants of a call may have to follow the copies.

    Args:
        func: the torch function.
        args: the positional arguments.
        kwargs: the keyword arguments.
        constants: the constants known so far.
    """
    if func in NUMBERED:
        return Call(func, args, kwargs).is_numbered
    if not overlays_operands(func):
        return False
    tensors = list(tensors_in((args, kwargs)))
    if len(tensors) < 2:
        return False
    constant = [constants.names(tensor) is not None for tensor in tensors]
    large = any(c and t.numel() > 1 for c, t in zip(constant, tensors, strict=True))
    return large and not all(constant)


def shapes(result: Any) -> Any:
    """The shape of a tensor, or the list of shapes of several tensors."""
    if isinstance(result, Tensor):
        return tuple(result.shape)
    return [tuple(tensor.shape) for tensor in result]


def takes_a_part(call: Call) -> bool:
    """Whether the index in a call may select only some of the channels."""
    index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    return any(
        (isinstance(p, slice) and p != slice(None)) or (type(p) is not bool and isinstance(p, int))
        for p in index
    )
