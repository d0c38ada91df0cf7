"""The variables of a container, derived from the recording of the student's run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from gpd_cli.widening.layers import is_leaf
from gpd_cli.widening.layout import Layout, Scale, Segment
from gpd_cli.widening.names import is_inside, local_name, qualified, split_name
from gpd_cli.widening.numbers.splits import Split
from gpd_cli.widening.observe.record import Reads, Recording
from gpd_cli.widening.plan import IndexMap
from gpd_cli.widening.rules import rule_for
from gpd_cli.widening.search.shared_layouts import splits_by_container
from gpd_cli.widening.search.variables import (
    Variable,
    blocks_in,
    factor_variable,
    layout_variable,
    number_variable,
    tensor_variable,
)
from gpd_cli.widening.search.wide_network import WideNetwork

MapsInUse = tuple[dict[int, list[IndexMap]], set[int]]
"""Index maps in use for each axis size in a container, and sizes of its inputs that stay."""


class Choices:
    """The variables of each container.

    Args:
        wide: the network that is widened.
        recording: the student's run.
        scale: how much wider the network gets.
        kept: layers that keep their output channels.
    """

    def __init__(
        self, wide: WideNetwork, recording: Recording, scale: Scale, kept: set[str]
    ) -> None:
        self._wide, self._recording, self._scale, self._kept = wide, recording, scale, kept
        self._splits = splits_by_container(recording, scale)

    def variables(
        self,
        name: str,
        maps_in_use: Callable[[], MapsInUse],
        layouts: Mapping[str, Layout],
        *,
        solved: bool,
    ) -> list[Variable]:
        """The variables to decide before a container's own code runs.

        Args:
            name: the container.
            maps_in_use: returns the index maps in use around the container.
            layouts: layouts of layers that are settled already.
            solved: whether the container's numbers and tensors are found by arithmetic, so that
                only layouts and the attributes and tensors of a rule are left to decide.
        """
        rule = rule_for(self._wide.modules[name])
        reads = self._recording.reads.get(name, Reads())
        layouts_to_decide = []
        for (size, splits), layers in self._layers_by_splits(name, rule.blocks, layouts).items():
            local = local_name(layers[0], name)
            layouts_to_decide.append(
                layout_variable(layers, size, splits, self._scale, rule, local)
            )
        factors = [
            factor_variable(attribute, value, self._scale, rule)
            for attribute, value in reads.numbers.items()
            if isinstance(value, float) and self._is_open(attribute)
        ]
        if solved and not rule.grow and not rule.axes:
            return [
                v
                for v in (*factors, *layouts_to_decide)
                if len(v.options) > 1 or v.first != "plain"
            ]
        known, fixed = maps_in_use()
        # A number may also be the in_channels of a layer inside.
        widths = dict(known)
        for layer, width in self._recording.in_channels.items():
            if is_inside(layer, name) and width > 1 and width not in fixed:
                widths.setdefault(width, [Segment(width).map(self._scale)])
        numbers = [
            number_variable(attribute, value, widths, self._scale, rule)
            for attribute, value in reads.numbers.items()
            if not isinstance(value, float) and self._is_open(attribute)
        ]
        blocks = blocks_in(layouts_to_decide)
        direct = {*self._recording.direct, *self._recording.direct.values()}
        tensors = [
            tensor_variable(tensor, value.shape, known, blocks, self._scale, rule)
            for tensor, value in reads.tensors.items()
            if tensor not in direct
            and tensor not in self._wide.plan.tensors
            and not self._is_layers(tensor)
        ]
        if solved:
            numbers = [v for v in numbers if _local(v) in rule.grow]
            tensors = [v for v in tensors if _local(v) in rule.axes]
        # A variable whose only option is to stay leaves nothing to decide.
        decided = ("keep", "plain")
        everything = (*factors, *numbers, *tensors, *layouts_to_decide)
        return [v for v in everything if len(v.options) > 1 or v.first not in decided]

    def _layers_by_splits(
        self, name: str, ruled: Iterable[str], layouts: Mapping[str, Layout]
    ) -> dict[tuple[int, tuple[Split, ...]], tuple[str, ...]]:
        """Layers whose layout a container decides, grouped by output channels and splits."""
        splits: dict[str, Sequence[Split]] = {qualified(name, local): () for local in ruled}
        splits.update(self._splits.get(name, {}))
        alike: dict[tuple[int, tuple[Split, ...]], tuple[str, ...]] = {}
        for layer, found in splits.items():
            size = self._recording.out_channels.get(layer)
            if size and layer not in self._kept and layer not in layouts:
                key = (size, tuple(found))
                alike[key] = (*alike.get(key, ()), layer)
        return alike

    def _is_open(self, attribute: str) -> bool:
        """Whether an attribute belongs to the instance and is not settled yet."""
        owner, local = split_name(attribute)
        settled = local in self._wide.plan.attributes.get(owner, {})
        return not settled and local in self._wide.modules[owner].__dict__

    def _is_layers(self, tensor: str) -> bool:
        """Whether a tensor belongs to a layer, which is planned when the layer runs."""
        owner, _ = split_name(tensor)
        return owner in self._recording.inputs and is_leaf(self._wide.modules[owner])


def _local(variable: Variable) -> str:
    """The name of a variable's attribute or tensor inside its module."""
    return split_name(variable.names[0])[1]
