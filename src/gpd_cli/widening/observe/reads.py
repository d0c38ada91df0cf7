"""Observe which attributes, parameters and buffers the code of a network's modules reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Reader = Callable[[str, str, Any], Any]
"""A function of module name, attribute name and value; the code gets what this function returns."""


@contextmanager
def reading(network: nn.Module, number: Reader, tensor: Reader) -> Iterator[None]:
    """Within this context, pass all attributes that are read on modules through a function.

    Args:
        network: the network.
        number: function for integers, floats, tuples and lists.
        tensor: function for parameters and buffers.
    """
    classes = {module: type(module) for module in network.modules()}
    for name, module in network.named_modules():
        module.__class__ = _reading(type(module), name, number, tensor)
    try:
        yield
    finally:
        for module, cls in classes.items():
            module.__class__ = cls


class _Unannounced:
    """A first base class that keeps subclasses from the `__init_subclass__` of the other bases.

    Users' classes may register their subclasses by `__init_subclass__`, but those made here must
    not be registered.
    """

    def __init_subclass__(cls) -> None:
        pass


def _reading(cls: type, owner: str, number: Reader, tensor: Reader) -> type:
    """Make a subclass of a module's class whose attribute reads pass through two functions.

    Args:
        cls: the module's class.
        owner: name of the module.
        number: function for integers, floats, tuples and lists.
        tensor: function for parameters and buffers.
    """

    def get(self: Any, name: str) -> Any:
        value = cls.__getattribute__(self, name)  # type: ignore[call-arg]
        return number(owner, name, value) if type(value) in (int, float, tuple, list) else value

    def missing(self: Any, name: str) -> Any:
        value = cls.__getattr__(self, name)  # type: ignore[attr-defined]
        return tensor(owner, name, value) if isinstance(value, Tensor) else value

    members = {"__getattribute__": get, "__getattr__": missing}
    announces = any("__init_subclass__" in vars(base) for base in cls.__mro__[:-1])
    bases = (_Unannounced, cls) if announces else (cls,)
    return type(cls.__name__, bases, members)
