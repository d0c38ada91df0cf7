"""The copy of the student that is widened step by step; an earlier state can be restored."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from gpd_cli.widening.layers import LayerPlan, is_leaf
from gpd_cli.widening.names import qualified, split_name
from gpd_cli.widening.plan import TensorPlan, WidthPlan
from gpd_cli.widening.running.copying import copy_network
from gpd_cli.widening.tensors import expand_tensor

_LAYER_WIDTHS = {"in_features", "out_features", "in_channels", "out_channels", "embedding_dim"}


class WideNetwork:
    """A copy of the student that is widened step by step, and the plan of all steps so far.

    Args:
        student: the student. The copy shares its tensors until they are widened; they are never
            changed.
        ratio: the expansion ratio.
    """

    def __init__(self, student: nn.Module, ratio: float) -> None:
        self.student = student
        self.modules = dict(student.named_modules())
        self.plan = WidthPlan(ratio)
        self.network = copy_network(student, [*student.parameters(), *student.buffers()])
        self._postponed: dict[str, Tensor | None] = {}

    def apply(self, name: str, layer: LayerPlan, postponed: Collection[str] = ()) -> None:
        """Widen tensors and attributes of one module.

        Args:
            name: name of the module.
            layer: the plans of the module's tensors, and the wide values of its attributes.
            postponed: local names of the tensors that are computed only when they are read (see
                `read`).
        """
        module = self.network.get_submodule(name)
        for attribute, value in layer.attributes.items():
            setattr(module, attribute, value)
            self.plan.attributes.setdefault(name, {})[attribute] = value
        for local, plan in layer.tensors.items():
            full = qualified(name, local)
            if local in postponed:
                self._set(full, _stand_in(self.source(full), plan))
                self._postponed[full] = None
            else:
                self._set(full, expand_tensor(self.source(full), plan))
            self.plan.tensors[full] = plan

    def read(self, name: str, value: Tensor) -> Tensor:
        """Return a tensor of the copy that code reads; compute it now if it was postponed.

        Args:
            name: qualified name of the tensor.
            value: the tensor that the module has under this name.
        """
        if name not in self._postponed:
            return value
        made = self._postponed[name]
        if made is None:
            made = nn.Parameter(expand_tensor(self.source(name), self.plan.tensors[name]))
            self._postponed[name] = made
        return made

    def forget(self, name: str) -> None:
        """Free the values of a postponed tensor, which are computed again if it is read again."""
        if name in self._postponed:
            self._postponed[name] = None

    def restore(self, plan: WidthPlan) -> None:
        """Undo all changes since an earlier plan.

        Args:
            plan: a copy of the plan at that time, which becomes the plan of this network.
        """
        for name, values in self.plan.attributes.items():
            for attribute in values:
                narrow = getattr(self.modules[name], attribute)
                value = plan.attributes.get(name, {}).get(attribute, narrow)
                setattr(self.network.get_submodule(name), attribute, value)
        for name in self.plan.tensors.keys() - plan.tensors.keys():
            self._set(name, self.source(name))
            self._postponed.pop(name, None)
        self.plan = plan

    def drop_idle_attributes(self) -> None:
        """Remove from the plan the width attributes of layers whose tensors stay narrow."""
        for name, attributes in self.plan.attributes.items():
            tensors = dict(self.modules[name].named_parameters(recurse=False))
            widened = any(qualified(name, local) in self.plan.tensors for local in tensors)
            if is_leaf(self.modules[name]) and tensors and not widened:
                for attribute in _LAYER_WIDTHS & attributes.keys():
                    del attributes[attribute]
        self.plan.attributes = {name: a for name, a in self.plan.attributes.items() if a}

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer of the copy, in its present width."""
        return _tensor(self.network, name)

    def source(self, name: str) -> Tensor:
        """A parameter or buffer of the student."""
        return _tensor(self.student, name)

    def is_tensor(self, value: Any, name: str) -> bool:
        """Whether a value is the parameter of a certain name, of the copy or of the student."""
        return value is self.tensor(name) or value is _tensor(self.student, name)

    def _set(self, name: str, tensor: Tensor) -> None:
        owner, local = split_name(name)
        module = self.network.get_submodule(owner)
        if local in module._buffers:
            module._buffers[local] = tensor
        else:
            parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
            module.register_parameter(local, parameter)


def _stand_in(narrow: Tensor, plan: TensorPlan) -> Tensor:
    """Make a tensor of the wide shape that takes no memory, in place of a postponed one.

    Its values are NaN, so that any use of it shows.
    """
    shape = plan.wide_shape(narrow.shape)
    return nn.Parameter(torch.full((), math.nan, dtype=narrow.dtype).expand(shape), False)


def _tensor(network: nn.Module, name: str) -> Tensor:
    owner, local = split_name(name)
    tensor = getattr(network.get_submodule(owner), local)
    assert isinstance(tensor, Tensor)
    return tensor
