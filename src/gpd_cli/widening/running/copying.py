"""Make deep copies of networks, whose activations and functions belong to the copy as well."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from torch import Tensor, nn

from gpd_cli.widening.running.tracing import all_tensors_in

Network = TypeVar("Network", bound=nn.Module)


def copy_network(network: Network, shared: Iterable[Tensor] = ()) -> Network:
    """Make a deep copy of a network.

    Activations that modules keep as attributes, alone or in lists, tuples and dictionaries, are
    detached from their graph in the copy, since torch refuses to copy a tensor that has a graph.
    Functions that modules keep as attributes, and that refer to modules of the network
    (``self.scale = lambda x: self.alpha * x``), refer to the modules of the copy in the copy.

    Args:
        network: the network to copy.
        shared: tensors that are not copied, but shared by the copy and the network.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    for module in network.modules():
        for value in all_tensors_in(list(vars(module).values())):
            if not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
    result = copy.deepcopy(network, memo)
    copies = {id(module): memo.get(id(module), module) for module in network.modules()}
    for module in result.modules():
        for name, value in vars(module).items():
            vars(module)[name] = _bound_again(value, copies)
    return result


def objects_of(function: types.FunctionType) -> dict[str, Any]:
    """The objects outside of a function that it refers to, by the names of its variables."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # the variable has no value yet
            found[name] = cell.cell_contents
    return found


def _bound_again(value: Any, copies: Mapping[int, Any]) -> Any:
    """Bind a function, or the functions in a list, tuple or dictionary, to the modules of the copy.

    Args:
        value: an attribute of a module in the copy; a value without functions is returned.
        copies: modules of the copy, by the ids of those of the original network.
    """
    if isinstance(value, types.FunctionType):
        return _function(value, copies)
    if type(value) in (list, tuple) and any(isinstance(v, types.FunctionType) for v in value):
        return type(value)(_bound_again(entry, copies) for entry in value)
    if isinstance(value, dict):
        for key, entry in value.items():
            if (bound := _bound_again(entry, copies)) is not entry:
                value[key] = bound  # only then, since dictionaries may be read-only
    return value


def _function(function: types.FunctionType, copies: Mapping[int, Any]) -> types.FunctionType:
    """Make a function that refers to the copies, if the function refers to any of the originals."""
    objects = {name: copies.get(id(found)) for name, found in objects_of(function).items()}
    if all(found is None for found in objects.values()):
        return function
    variables = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    cells = tuple(
        cell if objects.get(name) is None else types.CellType(objects[name])
        for name, cell in variables
    )
    made = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(function.__dict__)
    return made
