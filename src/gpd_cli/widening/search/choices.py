"""What a container has to decide: its variables, from what was recorded of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from gpd_cli.widening.layers import is_leaf
from gpd_cli.widening.layout import Layout, Scale, Segment
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

Sizes = tuple[dict[int, list[IndexMap]], set[int]]
"""By what maps axes of each size widen around a container, and sizes of its inputs that do not."""


class Choices:
    """The variables of each container.

    Args:
        wide: the network that is widened.
        recording: what the student's run showed.
        scale: how much wider.
        kept: layers that keep their width.
    """

    def __init__(
        self, wide: WideNetwork, recording: Recording, scale: Scale, kept: set[str]
    ) -> None:
        self._wide, self._recording, self._scale, self._kept = wide, recording, scale, kept
        self._splits = splits_by_container(recording, scale)

    def variables(
        self, name: str, sizes: Callable[[], Sizes], layouts: Mapping[str, Layout], *, solved: bool
    ) -> list[Variable]:
        """What is to be decided in a container before its own code runs.

        Args:
            name: the container.
            sizes: gives which sizes widen around it, and which do not.
            layouts: of layers that are settled already.
            solved: whether its numbers and tensors are solved for, so that only the layouts of its
                layers are to be decided, and what a rule says.
        """
        rule, prefix = rule_for(self._wide.modules[name]), f"{name}." if name else ""
        reads = self._recording.reads.get(name, Reads())
        lying = []
        for (size, splits), layers in self._alike(name, rule.blocks, layouts).items():
            local = layers[0].removeprefix(prefix)
            lying.append(layout_variable(layers, size, splits, self._scale, rule, local))
        factors = [
            factor_variable(attribute, value, self._scale, rule)
            for attribute, value in reads.numbers.items()
            if isinstance(value, float) and self._is_open(attribute)
        ]
        if solved and not rule.grow and not rule.axes:
            return [v for v in (*factors, *lying) if len(v.options) > 1 or v.first != "plain"]
        known, fixed = sizes()
        # Numbers may also tell how many inputs a layer inside has.
        widths = dict(known)
        for layer, width in self._recording.widths.items():
            if layer.startswith(prefix) and width > 1 and width not in fixed:
                widths.setdefault(width, [Segment(width).map(self._scale)])
        numbers = [
            number_variable(attribute, value, widths, self._scale, rule)
            for attribute, value in reads.numbers.items()
            if not isinstance(value, float) and self._is_open(attribute)
        ]
        blocks = blocks_in(lying)
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
        # One that can only stay as it is leaves nothing to decide.
        decided = ("keep", "plain")
        everything = (*factors, *numbers, *tensors, *lying)
        return [v for v in everything if len(v.options) > 1 or v.first not in decided]

    def _alike(
        self, name: str, ruled: Iterable[str], layouts: Mapping[str, Layout]
    ) -> dict[tuple[int, tuple[Split, ...]], tuple[str, ...]]:
        """Layers whose layout a container decides: together, where they are taken apart alike."""
        prefix = f"{name}." if name else ""
        splits: dict[str, Sequence[Split]] = {prefix + local: () for local in ruled}
        splits.update(self._splits.get(name, {}))
        alike: dict[tuple[int, tuple[Split, ...]], tuple[str, ...]] = {}
        for layer, found in splits.items():
            size = self._recording.sizes.get(layer)
            if size and layer not in self._kept and layer not in layouts:
                key = (size, tuple(found))
                alike[key] = (*alike.get(key, ()), layer)
        return alike

    def _is_open(self, attribute: str) -> bool:
        """Whether an attribute is an instance's own and not settled yet."""
        owner, _, local = attribute.rpartition(".")
        settled = local in self._wide.plan.attributes.get(owner, {})
        return not settled and local in self._wide.modules[owner].__dict__

    def _is_layers(self, tensor: str) -> bool:
        """Whether a tensor belongs to a layer that is planned when it runs."""
        owner = tensor.rpartition(".")[0]
        return owner in self._recording.inputs and is_leaf(self._wide.modules[owner])


def _local(variable: Variable) -> str:
    """The name of an attribute or tensor inside of its module."""
    return variable.names[0].rpartition(".")[2]
