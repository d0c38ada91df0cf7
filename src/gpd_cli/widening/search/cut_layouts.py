"""Find layouts for code that shuffles channels and then cuts them, such as ShuffleNet V2's.

ShuffleNet V2 interleaves the channels of two layers and cuts the result in two, unit after unit.
The way of a layer's output through these cuts depends on its position alone. So of two copies side
by side, one might pass through and the other go into the next branch. In the layouts found here,
the copies of each output are placed among those wide outputs that go the same way as the output.

To find the ways, the container's code runs twice on stand-ins for its layers, once with the
student's numbers of outputs and once with the wide ones. Gradients tell which outputs reach which
piece of which cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from gpd_cli.widening.layers import channel_axis, is_leaf
from gpd_cli.widening.layout import Layout, Segment
from gpd_cli.widening.mismatch import ANOTHER_PATH, Mismatch
from gpd_cli.widening.numbers.calls import CHUNKS, INDEXES, NARROW_FUNCTIONS, SPLITS
from gpd_cli.widening.running.own_errors import ForwardError, forward_errors, own_errors
from gpd_cli.widening.running.tracing import Tracer, all_tensors_in, tensors_in

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and the keyword arguments of a call."""

_CUTS = SPLITS | CHUNKS | NARROW_FUNCTIONS | INDEXES

_Shapes = tuple[torch.Size, torch.Size]  # shapes of a layer's input and output
_Way = tuple[bool, ...]  # whether an output reaches a piece, for each piece of each cut


def cut_layouts(
    container: nn.Module, narrow: Arguments, wide: Arguments, sizes: Mapping[str, int]
) -> dict[str, Layout]:
    """Find layouts in which the copies of each output go the same way as the output.

    Args:
        container: a container of the student.
        narrow: the arguments of a call of the container in the student; code may change them in
            place.
        wide: the arguments of the same call in the wide network; code may change them in place.
        sizes: the wide number of outputs of each layer that mixes channels, by the layer's name
            inside the container.

    Returns:
        A layout for each layer whose outputs go several ways, by layer name. Empty if there is no
        such layer, if no layouts fit, or if the code does not run with wide layers.
    """
    layers = {name: module for name, module in container.named_modules() if is_leaf(module)}
    if any(isinstance(layer, nn.MultiheadAttention) for layer in layers.values()):
        return {}  # the output of this layer is no single tensor
    students = _RunOnStandIns(layers, sizes)
    runs = (students, _RunOnStandIns(layers, sizes, students.shapes))
    try:
        for run, (args, kwargs) in zip(runs, (narrow, wide), strict=True):
            with torch.enable_grad(), _replaced(layers, run.stand_in), run, forward_errors():
                container(*args, **kwargs)
        ways = [_ways(run) for run in runs]
    except (ForwardError, Mismatch):  # the container's code takes layers of one width only
        return {}
    return _layouts(*ways)


@contextmanager
def _replaced(
    layers: Mapping[str, nn.Module], stand_in: Callable[[str, nn.Module], Callable[..., Any]]
) -> Iterator[None]:
    """Within this context, let stand-ins run in place of the layers' own forward.

    Args:
        layers: the layers, by name.
        stand_in: function that makes the stand-in for a layer's forward from name and layer.
    """
    own = {name: layer.forward for name, layer in layers.items() if "forward" in vars(layer)}
    for name, layer in layers.items():
        layer.forward = stand_in(name, layer)
    try:
        yield
    finally:
        for name, layer in layers.items():
            del layer.forward
            if name in own:
                layer.forward = own[name]


class _RunOnStandIns(Tracer):
    """A run of a container's code on stand-ins for its layers.

    Args:
        layers: the student's layers in the container, by name.
        sizes: the wide number of outputs of each layer that mixes channels, by name.
        given: for the run with wide layers, the shapes of the student's input and output in each
            call of each layer, by layer name. None for the run with the student's layers, in which
            these shapes are found.

    Attributes:
        shapes: the shapes of the student's input and output in each call of each layer, by layer
            name.
        outputs: for layers that mix channels, the stand-in's outputs (random numbers) in each call,
            by layer name.
        pieces: the pieces of all tensors that the code cuts.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        sizes: Mapping[str, int],
        given: Mapping[str, Sequence[_Shapes]] | None = None,
    ) -> None:
        super().__init__()
        self.layers, self._sizes, self._given = layers, sizes, given
        self.shapes: dict[str, list[_Shapes]] = {}
        self.outputs: dict[str, list[Tensor]] = {}
        self.pieces: list[Tensor] = []

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if func in _CUTS:
            with own_errors():
                self.pieces += [piece for piece in tensors_in(result) if piece.requires_grad]
        return result

    def stand_in(self, name: str, layer: nn.Module) -> Callable[..., Any]:
        """Make the function that runs in place of a layer's forward.

        Args:
            name: name of the layer.
            layer: the layer.
        """
        forward = layer.forward
        calls = None if self._given is None else iter(self._given.get(name, ()))

        def run(*args: Any, **kwargs: Any) -> Tensor:
            x = next(all_tensors_in((args, kwargs)))
            shapes: _Shapes | None
            if calls is None:
                shapes = (x.shape, forward(*args, **kwargs).shape)
            else:
                shapes = next(calls, None)
            with own_errors():
                if shapes is None or len(shapes[0]) != x.ndim:
                    raise Mismatch(name, ANOTHER_PATH)
                return self._output(name, layer, x, shapes)

        return run

    def _output(self, name: str, layer: nn.Module, x: Tensor, shapes: _Shapes) -> Tensor:
        """Compute a stand-in's output.

        Args:
            name: name of the layer.
            layer: the layer.
            x: the layer's input.
            shapes: the shapes of input and output of the same call in the student.
        """
        self.shapes.setdefault(name, []).append(shapes)
        before, after = shapes
        if name not in self._sizes:
            return _resized(x, before, after)
        shape = [*after]
        if self._given is not None:
            shape[channel_axis(layer)] = self._sizes[name]
        output = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        self.outputs.setdefault(name, []).append(output)
        return output.clone()  # code may change the copy in place


def _resized(x: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Make the stand-in's output for a layer that does not mix channels, such as a depthwise one.

    Axes whose size the student's layer does not change stay as they are in the wide input; the
    others are averaged and then expanded to the size in the student's output.

    Args:
        x: the layer's wide input.
        before: shape of the narrow input.
        after: shape of the narrow output.
    """
    changed = [k for k, sizes in enumerate(zip(before, after, strict=True)) if len({*sizes}) > 1]
    if not changed:
        return x
    shape = [after[k] if k in changed else size for k, size in enumerate(x.shape)]
    return x.mean(changed, keepdim=True).expand(shape)


def _ways(run: _RunOnStandIns) -> dict[str, list[_Way]]:
    """Find the way of each output of each layer that mixes channels, by layer name.

    Args:
        run: a run of the container's code on stand-ins.

    Raises:
        ForwardError: when the backward pass of the container's code does not run.
    """
    calls = [(name, output) for name, outputs in run.outputs.items() for output in outputs]
    reached: dict[str, list[list[bool]]] = {name: [] for name in run.outputs}
    for piece in run.pieces if calls else ():
        # Random weights, since the plain sum of a piece may be constant.
        weights = torch.randn(piece.shape, dtype=piece.dtype)
        outputs = [output for _, output in calls]
        with forward_errors():
            gradients = torch.autograd.grad(
                piece, outputs, weights, retain_graph=True, allow_unused=True
            )
        for (name, output), gradient in zip(calls, gradients, strict=True):
            used = torch.zeros_like(output) if gradient is None else gradient
            channels = used.movedim(channel_axis(run.layers[name]), 0).flatten(1)
            reached[name].append((channels != 0).any(1).tolist())
    return {name: [*zip(*pieces, strict=True)] for name, pieces in reached.items()}


def _layouts(
    narrow: Mapping[str, Sequence[_Way]], wide: Mapping[str, Sequence[_Way]]
) -> dict[str, Layout]:
    """Make layouts in which the copies of an output are among the wide outputs that go its way.

    Args:
        narrow: the way of each narrow output, by layer name.
        wide: the way of each wide output, by layer name.

    Returns:
        Layouts by layer name, for layers whose outputs go several ways; empty if none fit.
    """
    layouts: dict[str, Layout] = {}
    for name in narrow:
        segments, places = (
            [(way, len([*run])) for way, run in groupby(ways[name])] for ways in (narrow, wide)
        )
        fits = [way for way, _ in segments] == [way for way, _ in places]
        if not fits or any(n > w for (_, n), (_, w) in zip(segments, places, strict=True)):
            return {}
        if len(segments) > 1:
            pairs = zip(segments, places, strict=True)
            layouts[name] = tuple(Segment(size, wide=count) for (_, size), (_, count) in pairs)
    return layouts
