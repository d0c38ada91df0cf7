"""Adjust the calls in a container's code to the copies in its tensors, and solve for attributes.

The code computes with the student's numbers (sizes, numbers of heads), since its attributes have
not widened yet. Each call that these numbers do not fit is made with numbers that fit the wide
tensors (it follows the copies), and each such number is noted as an equation. When the code has
run, the equations are solved for the attributes. Constants (tokens, tables, masks) are expanded in
the calls in the same way, and the parameters that they come from are widened at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpd_cli.widening.layers import LayerPlan, is_leaf
from gpd_cli.widening.match import Matches
from gpd_cli.widening.mismatch import ANOTHER_PATH, Mismatch
from gpd_cli.widening.names import split_name
from gpd_cli.widening.numbers.alignment import aligned, summed
from gpd_cli.widening.numbers.arithmetic import Attribute, attributes_in
from gpd_cli.widening.numbers.axes import cut
from gpd_cli.widening.numbers.calls import (
    EXPANDS,
    NUMBERED,
    RESHAPES,
    SPLITS,
    UNFLATTENS,
    Call,
    Unfollowed,
    follow,
)
from gpd_cli.widening.numbers.solve import Equation, Unsolvable, solve
from gpd_cli.widening.observe.constants import Constants, source_axes
from gpd_cli.widening.observe.events import Event, is_event
from gpd_cli.widening.plan import Axes, IndexMap, TensorPlan
from gpd_cli.widening.rules import Rule
from gpd_cli.widening.running.tracing import replace_tensors, tensors_in
from gpd_cli.widening.search.wide_network import WideNetwork
from gpd_cli.widening.tensors import expand_tensor


@dataclass
class Frame:
    """One call of a container, while the container's own code runs.

    Args:
        name: name of the container.
        is_guessed: whether attributes are guessed, and the code's calls are made unchanged.
        events: the events of the same container call in the student's run.
        position: number of events so far in the wide run.
        equations: the equations of the numbers in the code.
        maps: for each parameter or buffer that the code uses directly, the index maps by axis.
        fan_in: for each such parameter in a product, the axis that the product sums over.
    """

    name: str
    is_guessed: bool = False
    events: Sequence[Event] = ()
    position: int = 0
    equations: list[Equation] = field(default_factory=list)
    maps: dict[str, dict[int, IndexMap]] = field(default_factory=dict)
    fan_in: dict[str, int] = field(default_factory=dict)

    def next(self, function: Any) -> Event:
        """Return the event of the student's run that corresponds to the next call.

        Args:
            function: the function that is called in the wide network.

        Raises:
            Mismatch: when the student called another function, or none.
        """
        if self.position >= len(self.events) or self.events[self.position].function != function:
            raise Mismatch(self.name, ANOTHER_PATH)
        self.position += 1
        return self.events[self.position - 1]


@dataclass(frozen=True)
class _GrownAxis:
    """An axis of a constant that is aligned with an axis of an activation that has widened.

    Args:
        axis: number of the constant's axis.
        map_: index map of the activation's axis.
        is_summed: whether the call sums over the axis, so that each copy gets 1/n of the constant.
    """

    axis: int
    map_: IndexMap
    is_summed: bool

    def expanded(self, constant: Tensor) -> Tensor:
        """The constant with copies along the axis; the same tensor if it has them or needs none."""
        narrow_size = self.map_.narrow_size
        if constant.shape[self.axis] != narrow_size or len(self.map_) == narrow_size:
            return constant
        maps = [self.map_ if k == self.axis else None for k in range(constant.ndim)]
        return expand_tensor(
            constant, TensorPlan(tuple(maps), self.axis if self.is_summed else None)
        )


class Following:
    """Adjusts the calls in containers' code to the copies, and widens what the code reads.

    Args:
        wide: the network that is widened.
        allows_multiples: whether activations may be multiples of copies.
    """

    def __init__(self, wide: WideNetwork, allows_multiples: bool = False) -> None:
        self._wide = wide
        self.matches = Matches(allows_multiples)
        self.constants = Constants()
        self._deferred: list[tuple[Call, Event, frozenset[str]]] = []
        own = (*wide.student.parameters(), *wide.student.buffers())
        self._own = {id(tensor) for tensor in own}

    def read(self, name: str, tensor: Tensor) -> None:
        """Note a parameter or buffer that the code of a container reads.

        Args:
            name: qualified name of the tensor.
            tensor: the tensor, narrow or wide.
        """
        # A tensor that a forward has replaced is no state: the wide network computes it again.
        if id(tensor) in self._own or name in self._wide.plan.tensors:
            self.constants.add(tensor, [name])

    def prepare(self, frame: Frame, call: Call) -> Call:
        """Adjust a call: replace numbers and constants by those that fit the wide tensors.

        Args:
            frame: the frame of the running container.
            call: the call as the container's code makes it.

        Raises:
            Mismatch: when no numbers fit the copies.
        """
        if not is_event(call.function, call.args, call.kwargs, self.constants):
            return call
        event = frame.next(call.function)
        if call.function in NUMBERED:
            return self._follow(frame, event, call)
        return self._expand_constants(frame, event, call)

    def settle(self, frame: Frame, rule: Rule) -> bool:
        """Widen the attributes and constants of a container, once its code has run.

        Args:
            frame: the frame of the container's call, with its equations.
            rule: the rule of the container's class.

        Returns:
            Whether any attribute or tensor has changed.

        Raises:
            Mismatch: when no values of the container's attributes fit.
        """
        for name in frame.maps.keys() - self._wide.plan.tensors.keys():
            self._note_deferred(frame, name)
        attributes = {a for e in frame.equations for a in attributes_in(e.expression)}
        values = {a: self._value(a) for a in attributes}
        fixed = {a for a in attributes if not self._may_change(a) or a.name in rule.keep}
        try:
            solution = solve(frame.equations, values, fixed)
        except Unsolvable as reason:
            raise Mismatch(frame.name, str(reason)) from None
        for attribute, value in solution.items():
            self._wide.apply(attribute.owner, LayerPlan(attributes=self._changed(attribute, value)))
        changed = bool(solution)
        for name, maps in frame.maps.items():
            axes = tuple(maps.get(k) for k in range(self._wide.source(name).ndim))
            owner, local = split_name(name)
            before = self._wide.plan.tensors.get(name)
            if before is not None and before.axes != axes:
                raise Mismatch(frame.name, f"{name} would have to widen in two ways")
            if before is None:
                self._wide.apply(
                    owner, LayerPlan({local: TensorPlan(axes, frame.fan_in.get(name))})
                )
                changed = True
        return changed

    def _note_deferred(self, frame: Frame, name: str) -> None:
        """Note the equations of earlier calls on a constant whose source is about to widen.

        These calls were made with narrow numbers, since nothing in them had widened yet.

        Args:
            frame: the frame of the container's call, which gets the equations.
            name: name of the parameter or buffer that widens now.
        """
        source = self._wide.source(name)
        for call, event, names in self._deferred:
            if name not in names:
                continue
            derived = event.tensors[0]
            axes: list[IndexMap | None] = [None] * derived.ndim
            with torch.enable_grad():
                for axis in range(derived.ndim):
                    for k, offset in source_axes(derived, axis, source).items():
                        if offset == 0 and derived.shape[axis] == source.shape[k]:
                            axes[axis] = frame.maps[name].get(k)
            wide = derived.new_empty(TensorPlan(tuple(axes)).wide_shape(derived.shape))
            stand_in = Call(call.function, (wide, *call.args[1:]), call.kwargs)
            later = Frame(frame.name)
            _fit(later, event, stand_in, partial(tuple, axes))
            # A number without attributes may come from the narrow constant's own size. The next
            # run of the code then computes it from the wide size, so no equation is needed.
            frame.equations += [e for e in later.equations if any(attributes_in(e.expression))]

    def _follow(self, frame: Frame, event: Event, call: Call) -> Call:
        """Adjust the numbers in a call to the copies in its input."""
        x = call.input
        if not event.tensors or not isinstance(x, Tensor):
            return call
        narrow, names = event.tensors[0], self.constants.names(x)
        if names is not None and not names & self._wide.plan.tensors.keys():
            # The parameter behind the constant has not widened yet, so narrow numbers fit for now.
            self._deferred.append((call, event, names))
            return _as_recorded(call, event)
        return _fit(frame, event, call, partial(self.matches.axes, frame.name, narrow, x))

    def _expand_constants(self, frame: Frame, event: Event, call: Call) -> Call:
        """Expand the constants in a call along those axes that are aligned with widened axes."""
        tensors = list(tensors_in((call.args, call.kwargs)))
        if len(tensors) != len(event.tensors):
            raise Mismatch(frame.name, ANOTHER_PATH)
        replaced: dict[int, Tensor] = {}
        for constant, recorded in zip(tensors, event.tensors, strict=True):
            names = self.constants.names(constant)
            if names is None or constant.numel() <= 1:
                continue
            wide = constant
            for grown in self._grown_axes(frame, event, call, constant, recorded):
                self.note_sources(frame, recorded, names, grown.axis, grown.map_, grown.is_summed)
                wide = grown.expanded(wide)
            if wide is not constant:
                replaced[id(constant)] = wide
        if not replaced:
            return call
        args, kwargs = replace_tensors((call.args, call.kwargs), replaced)
        return Call(call.function, args, kwargs)

    def _grown_axes(
        self, frame: Frame, event: Event, call: Call, constant: Tensor, recorded: Tensor
    ) -> Iterator[_GrownAxis]:
        """Find the axes of a constant that are aligned with axes of activations that have widened.

        Args:
            frame: the frame of the running container.
            event: the same call in the student's run.
            call: the call, whose activations are wide.
            constant: the constant, narrow or wide.
            recorded: the narrow constant in the student's run.
        """
        tensors = tensors_in((call.args, call.kwargs))
        for x, narrow in zip(tensors, event.tensors, strict=True):
            if self.constants.names(x) is not None or x.shape == narrow.shape:
                continue
            maps = self.matches.axes(frame.name, narrow, x)
            summed_axis, aligned_axes = _aligned_axes(call, x, constant, recorded)
            for axis, axis_of_x in aligned_axes.items():
                map_ = maps[axis_of_x]
                if map_ is None or recorded.shape[axis] != map_.narrow_size:
                    continue
                # A constant's axis of one element is broadcast over the copies, so it need not
                # widen, unless the call sums over the axis.
                if map_.narrow_size > 1 or summed_axis is not None:
                    yield _GrownAxis(axis, map_, axis == summed_axis)

    def note_sources(
        self,
        frame: Frame,
        derived: Tensor,
        names: Iterable[str],
        axis: int,
        map_: IndexMap,
        divides: bool = False,
    ) -> None:
        """Note the index maps of the parameters that a constant was computed from.

        Args:
            frame: the frame of the container whose code uses the constant.
            derived: the narrow constant, with its graph.
            names: names of the parameters and buffers that the constant was computed from.
            axis: an axis of the constant that widens.
            map_: index map of this axis.
            divides: whether a product sums over this axis, so that each copy gets 1/n.

        Raises:
            Mismatch: when a parameter would have to widen in two ways.
        """
        for name in sorted(names):  # since the order of a set differs between processes
            source = self._wide.source(name)
            if not source.is_floating_point():
                continue
            with torch.enable_grad():
                sources = source_axes(derived, axis, source)
            for k, offset in sources.items():
                rest = map_.narrow_size - offset - source.shape[k]
                pieces = cut(map_, [offset, source.shape[k], rest])
                if pieces is None:
                    raise Mismatch(frame.name, f"{name} is used across the copies of its channels")
                if pieces[1].is_identity:
                    continue
                if divides:
                    frame.fan_in[name] = k
                before = frame.maps.setdefault(name, {}).setdefault(k, pieces[1])
                if before != pieces[1]:
                    raise Mismatch(frame.name, f"{name} would have to widen in two ways")

    def _value(self, attribute: Attribute) -> int:
        value = getattr(self._wide.network.get_submodule(attribute.owner), attribute.name)
        return int(value if attribute.entry is None else value[attribute.entry])

    def _may_change(self, attribute: Attribute) -> bool:
        """Whether an attribute belongs to an instance of a container, and has not widened yet."""
        module = self._wide.modules[attribute.owner]
        settled = attribute.name in self._wide.plan.attributes.get(attribute.owner, {})
        return not settled and not is_leaf(module) and attribute.name in module.__dict__

    def _changed(self, attribute: Attribute, value: int) -> dict[str, Any]:
        if attribute.entry is None:
            return {attribute.name: value}
        whole = list(getattr(self._wide.network.get_submodule(attribute.owner), attribute.name))
        whole[attribute.entry] = value
        kind = type(getattr(self._wide.modules[attribute.owner], attribute.name))
        return {attribute.name: kind(int(v) for v in whole)}


def _aligned_axes(
    call: Call, x: Tensor, constant: Tensor, recorded: Tensor
) -> tuple[int | None, dict[int, int]]:
    """Find the axes of a constant that are aligned with axes of an activation.

    Args:
        call: the call that both are passed to.
        x: the activation.
        constant: the constant.
        recorded: the constant in the student's run.

    Returns:
        The axis of the constant that the call sums over, or None; and the activation's axis for
        each axis of the constant that is aligned with one.
    """
    aligned_axes = aligned(call.function, call.args, call.kwargs, x, recorded)
    summed_axes = summed(call.function, call.args, x, constant)
    if summed_axes is None:
        return None, aligned_axes
    summed_axis, axis_of_x = summed_axes
    return summed_axis, {**aligned_axes, summed_axis: axis_of_x}


def _fit(frame: Frame, event: Event, call: Call, axes: Callable[[], Axes]) -> Call:
    """Adjust the numbers in a call to the copies, and add their equations to the frame.

    Args:
        frame: the frame of the running container.
        event: the same call in the student's run.
        call: the call.
        axes: function that returns the index maps of the call's input.
    """
    try:
        return follow(call, axes, event.tensors[0].shape, event.result, frame.equations)
    except Unfollowed as reason:
        raise Mismatch(frame.name, str(reason), needs_other_layout=True) from None


def _as_recorded(call: Call, event: Event) -> Call:
    """Make a call on a constant with the numbers of the student's run."""
    if call.function is Tensor.view:
        return Call(Tensor.view, (call.input, event.result))
    if call.function in RESHAPES or call.function in UNFLATTENS:
        return Call(Tensor.reshape, (call.input, event.result))
    if call.function in EXPANDS:
        return Call(Tensor.expand, (call.input, event.result))
    if call.function in SPLITS:
        dim = call.argument(2, "dim") or 0
        return Call(torch.split, (call.input, [shape[dim] for shape in event.result], dim))
    return call
