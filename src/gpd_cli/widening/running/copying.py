"""Make deep copies of networks, whose activations and functions belong to the copy as well."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar

from torch import Tensor, nn

from gpd_cli.widening.running.tracing import all_tensors_in

Network = TypeVar("Network", bound=nn.Module)


def copy_network(network: Network, shared: Iterable[Tensor] = ()) -> Network:
    """Make a deep copy of a network.

    Activations that modules keep as attributes, alone or in lists, tuples and dictionaries, are
    detached from their graph in the copy, since torch refuses to copy a tensor that has a graph.
    Functions that modules keep as attributes or hooks, and that refer to objects of the network
    (``self.scale = lambda x: self.alpha * x``), refer to the objects of the copy in the copy.

    Args:
        network: the network to copy.
        shared: tensors that are not copied, but shared by the copy and the network.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    for module in network.modules():
        for value in all_tensors_in(list(vars(module).values())):
            if not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
    result = copy.deepcopy(network, memo)  # which leaves functions as they are
    counterparts = _Counterparts(memo)
    for module in result.modules():
        for name, value in vars(module).items():
            vars(module)[name] = counterparts.bound(value)
    return result


class _Counterparts:
    """Finds, for objects of a network, their counterparts in a deep copy of the network.

    Args:
        copies: the objects of the copy, by the ids of those of the network. Functions and
            containers that only functions refer to are added when they are first met.
    """

    def __init__(self, copies: dict[int, Any]) -> None:
        self._copies = copies

    def bound(self, value: Any) -> Any:
        """Bind functions to the copy: the value itself, or those in a container of the copy.

        Args:
            value: an attribute of a module of the copy; lists and dictionaries are changed in
                place.
        """
        if isinstance(value, FunctionType | partial):
            return self.of(value)
        if type(value) is tuple:
            entries = tuple(map(self.bound, value))
            changed = any(a is not b for a, b in zip(entries, value, strict=True))
            return entries if changed else value
        if isinstance(value, list | dict):
            for key, entry in list(value.items() if isinstance(value, dict) else enumerate(value)):
                if (bound := self.bound(entry)) is not entry:
                    value[key] = bound  # only then, since dictionaries may be read-only
        return value

    def of(self, original: Any) -> Any:
        """The counterpart of an object of the network; the object itself if it has none."""
        if id(original) in self._copies:
            return self._copies[id(original)]
        if not any(id(found) in self._copies for found in reached(original)):
            return original
        if isinstance(original, FunctionType):
            return self._function(original)
        if isinstance(original, partial):
            # A partial of the network was copied with it, but not the function in it.
            made: Any = partial(
                self.of(original.func),
                *map(self.of, original.args),
                **{name: self.of(value) for name, value in original.keywords.items()},
            )
        elif isinstance(original, MethodType):
            made = MethodType(original.__func__, self.of(original.__self__))
        elif isinstance(original, tuple):
            made = tuple(map(self.of, original))
        else:
            made = copy.copy(original)  # of the same type, such as a dictionary with a default
            self._copies[id(original)] = made  # before its entries, which may lead to it again
            for key in list(made) if isinstance(made, dict) else range(len(made)):
                made[key] = self.of(made[key])
        self._copies[id(original)] = made
        return made

    def _function(self, function: FunctionType) -> FunctionType:
        cells = tuple(CellType() for _ in function.__closure__ or ())
        made = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
        self._copies[id(function)] = made  # before its objects, among which it may be itself
        for cell, original in zip(cells, function.__closure__ or (), strict=True):
            if _has_value(original):
                cell.cell_contents = self.of(original.cell_contents)
        if function.__defaults__ is not None:
            made.__defaults__ = tuple(map(self.of, function.__defaults__))
        if function.__kwdefaults__ is not None:
            made.__kwdefaults__ = {n: self.of(v) for n, v in function.__kwdefaults__.items()}
        made.__dict__.update(function.__dict__)
        return made


def reached(value: Any) -> Iterator[Any]:
    """An object, and the objects that it leads to through functions, methods and containers.

    Args:
        value: any object, such as an attribute of a module.
    """
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if id(value) not in seen:
            seen.add(id(value))
            yield value
            waiting += _held_by(value)


def _held_by(value: Any) -> Iterable[Any]:
    """The objects that a function, method, partial or container holds; nothing for other values."""
    if isinstance(value, FunctionType):
        return _objects_of(value)
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if type(value) in (list, tuple) else []


def _objects_of(function: FunctionType) -> list[Any]:
    """The objects that a function keeps: those of its enclosing functions, and its defaults."""
    cells = [cell for cell in function.__closure__ or () if _has_value(cell)]
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return [*(cell.cell_contents for cell in cells), *defaults]


def _has_value(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # the variable has no value yet
        return False
    return True
