"""Find the variables of a container: what has to be decided before its code runs with wide layers.

Variables are derived from the recording of the student's run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from gpd_cli.widening.layers import is_leaf
from gpd_cli.widening.layout import Layout, Scale, Segment
from gpd_cli.widening.names import is_inside, local_name, qualified, split_name
from gpd_cli.widening.numbers.splits import Split
from gpd_cli.widening.observe.recording import Reads, Recording
from gpd_cli.widening.plan import IndexMap
from gpd_cli.widening.rules import Rule, rule_for
from gpd_cli.widening.search.options import (
    Maps,
    blocks_in,
    factor_variable,
    layout_variable,
    number_variable,
    tensor_variable,
)
from gpd_cli.widening.search.shared_layouts import splits_by_container
from gpd_cli.widening.search.variables import (
    SIDE_BY_SIDE,
    STAYS_NARROW,
    LayoutVariable,
    NumberVariable,
    TensorVariable,
    Variable,
)
from gpd_cli.widening.search.wide_network import WideNetwork

MapsInUse = tuple[dict[int, list[IndexMap]], set[int]]
"""Index maps in use in a container for each narrow axis size, and sizes of inputs that stay."""


class Choices:
    """Finds the variables of each container.

    Args:
        wide: the network that is widened.
        recording: the student's run.
        scale: how much wider the network gets.
        keeps_output: names of the layers that keep their output channels.
    """

    def __init__(
        self, wide: WideNetwork, recording: Recording, scale: Scale, keeps_output: Collection[str]
    ) -> None:
        self._wide, self._recording, self._scale = wide, recording, scale
        self._keeps_output = keeps_output
        self._splits = splits_by_container(recording, scale)

    def variables(
        self,
        name: str,
        maps_in_use: Callable[[], MapsInUse],
        layouts: Mapping[str, Layout],
        *,
        solved: bool,
    ) -> list[Variable[Any]]:
        """Find the variables to decide before a container's own code runs.

        Args:
            name: name of the container.
            maps_in_use: function that returns the index maps in use in the container.
            layouts: the layouts of layers' outputs that are decided already, by layer name.
            solved: whether the container's numbers and tensors are solved for. If so, only layouts,
                factors, and the attributes and tensors that a rule names are left to decide.
        """
        rule = rule_for(self._wide.modules[name])
        reads = self._recording.reads.get(name, Reads())
        of_layouts = self._layout_variables(name, rule, layouts)
        of_factors = self._factor_variables(reads, rule)
        if solved and not rule.grow and not rule.axes:
            return _to_decide([*of_factors, *of_layouts])
        known, fixed = maps_in_use()
        of_numbers = self._number_variables(name, reads, rule, known, fixed)
        of_tensors = self._tensor_variables(reads, rule, known, blocks_in(of_layouts))
        if solved:
            of_numbers = [v for v in of_numbers if _local(v) in rule.grow]
            of_tensors = [v for v in of_tensors if _local(v) in rule.axes]
        return _to_decide([*of_factors, *of_numbers, *of_tensors, *of_layouts])

    def _layout_variables(
        self, name: str, rule: Rule, layouts: Mapping[str, Layout]
    ) -> list[LayoutVariable]:
        """The variables for those layouts that are decided in this container."""
        groups = self._layers_by_splits(name, rule.blocks, layouts)
        return [
            layout_variable(layers, size, splits, self._scale, rule, local_name(layers[0], name))
            for (size, splits), layers in groups.items()
        ]

    def _factor_variables(self, reads: Reads, rule: Rule) -> list[NumberVariable]:
        """The variables for the factors (attention's scale) that a container's code reads."""
        return [
            factor_variable(attribute, value, self._scale, rule)
            for attribute, value in reads.numbers.items()
            if isinstance(value, float) and self._is_open(attribute)
        ]

    def _number_variables(
        self, name: str, reads: Reads, rule: Rule, known: Maps, fixed: Collection[int]
    ) -> list[NumberVariable]:
        """The variables for the integers that a container's code reads."""
        # A number may also be the in_channels of a layer inside.
        widths = dict(known)
        for layer, width in self._recording.in_channels.items():
            if is_inside(layer, name) and width > 1 and width not in fixed:
                widths.setdefault(width, [Segment(width).map(self._scale)])
        return [
            number_variable(attribute, value, widths, self._scale, rule)
            for attribute, value in reads.numbers.items()
            if not isinstance(value, float) and self._is_open(attribute)
        ]

    def _tensor_variables(
        self, reads: Reads, rule: Rule, known: Maps, blocks: Mapping[int, set[int]]
    ) -> list[TensorVariable]:
        """The variables for the parameters and buffers that a container's code reads."""
        direct = {*self._recording.direct, *self._recording.direct.values()}
        return [
            tensor_variable(tensor, value.shape, known, blocks, self._scale, rule)
            for tensor, value in reads.tensors.items()
            if tensor not in direct
            and tensor not in self._wide.plan.tensors
            and not self._belongs_to_leaf(tensor)
        ]

    def _layers_by_splits(
        self, name: str, ruled: Iterable[str], layouts: Mapping[str, Layout]
    ) -> dict[tuple[int, tuple[Split, ...]], tuple[str, ...]]:
        """Group the layers whose layouts are decided in this container.

        Layers with the same number of output channels and the same splits have the same layout.
        """
        splits: dict[str, Sequence[Split]] = {qualified(name, local): () for local in ruled}
        splits.update(self._splits.get(name, {}))
        groups: dict[tuple[int, tuple[Split, ...]], tuple[str, ...]] = {}
        for layer, found in splits.items():
            size = self._recording.out_channels.get(layer)
            if size and layer not in self._keeps_output and layer not in layouts:
                key = (size, tuple(found))
                groups[key] = (*groups.get(key, ()), layer)
        return groups

    def _is_open(self, attribute: str) -> bool:
        """Whether an attribute belongs to the instance (not the class) and is not widened yet."""
        owner, local = split_name(attribute)
        settled = local in self._wide.plan.attributes.get(owner, {})
        return not settled and local in self._wide.modules[owner].__dict__

    def _belongs_to_leaf(self, tensor: str) -> bool:
        """Whether a tensor belongs to a leaf, which is planned when it runs."""
        owner, _ = split_name(tensor)
        return owner in self._recording.inputs and is_leaf(self._wide.modules[owner])


def _to_decide(variables: Iterable[Variable[Any]]) -> list[Variable[Any]]:
    """Select the variables that have to be guessed.

    A variable is left out if its only option changes nothing: to stay narrow, or to have copies
    side by side, which is what layers' outputs have by default.
    """
    return [
        v for v in variables if len(v.options) > 1 or v.first not in (STAYS_NARROW, SIDE_BY_SIDE)
    ]


def _local(variable: Variable[Any]) -> str:
    """The name of a variable's attribute or tensor inside its module."""
    return split_name(variable.names[0])[1]
