"""Replace the numbers in calls such as ``reshape`` or ``split`` by numbers that fit wide tensors.

As long as it is unknown which attributes of a container widen, the container's code passes narrow
numbers to these functions. `follow` therefore replaces each of them by a number that fits the
copies in the call's wide input, and notes an equation for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpd_cli.widening.numbers.arithmetic import expression_of
from gpd_cli.widening.numbers.axes import cut, reshaped
from gpd_cli.widening.numbers.solve import Equation
from gpd_cli.widening.plan import Axes, IndexMap

RESHAPES = {Tensor.reshape, Tensor.view, torch.reshape}
UNFLATTENS = {Tensor.unflatten, torch.unflatten}
SPLITS = {Tensor.split, Tensor.split_with_sizes, torch.split, torch.split_with_sizes}
CHUNKS = {Tensor.chunk, torch.chunk, Tensor.tensor_split, torch.tensor_split}
NARROW_FUNCTIONS = {Tensor.narrow, torch.narrow}  # torch's word for taking a range of an axis
INDEXES = {Tensor.__getitem__}
EXPANDS = {Tensor.expand, Tensor.broadcast_to, torch.broadcast_to}
NORMS = {F.layer_norm, F.rms_norm}

_PIECES = (  # names of the argument that tells the number or the sizes of a split's pieces
    *("split_size_or_sections", "split_size", "split_sizes", "chunks"),
    *("sections", "indices", "indices_or_sections", "tensor_indices_or_sections"),
)
NUMBERED = RESHAPES | UNFLATTENS | SPLITS | CHUNKS | NARROW_FUNCTIONS | INDEXES | EXPANDS | NORMS


@dataclass
class Call:
    """A call of a torch function in a container's own code.

    Args:
        function: the function.
        args: the positional arguments.
        kwargs: the keyword arguments.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def input(self) -> Any:
        """The tensor that the function is called on."""
        return self.args[0] if self.args else self.kwargs.get("input")

    def argument(self, position: int, *names: str) -> Any:
        """The argument at a position or under one of some names; None if it is not given."""
        if position < len(self.args):
            return self.args[position]
        return next((self.kwargs[name] for name in names if name in self.kwargs), None)

    @property
    def is_numbered(self) -> bool:
        """Whether the call's numbers may have to follow the copies in its input."""
        # A view with a dtype has no sizes: it reads the same bits as numbers of another dtype.
        given = (*self.args[1:2], *self.kwargs.values())
        return self.function in NUMBERED and not any(isinstance(v, torch.dtype) for v in given)

    def numbers(self, *names: str) -> list[int]:
        """The sizes after the call's first argument, which are given one by one or as a tuple.

        Args:
            names: names under which the sizes may be given as a keyword argument.
        """
        rest = self.args[1:] or tuple(self.kwargs[n] for n in names if n in self.kwargs)
        if len(rest) == 1 and isinstance(rest[0], tuple | list):
            rest = tuple(rest[0])
        return list(rest)

    def asked(self, ndim: int) -> list[int]:
        """The sizes that the call of a reshape asks for, with -1 for sizes that it leaves open.

        Args:
            ndim: number of axes of the result; ``unflatten`` asks for sizes of some axes only.
        """
        if self.function not in UNFLATTENS:
            return self.numbers("shape", "size")
        sizes = list(self.argument(2, "sizes"))
        dim = self.argument(1, "dim") % (ndim - len(sizes) + 1)
        return [*[-1] * dim, *sizes, *[-1] * (ndim - dim - len(sizes))]


class Unfollowed(Exception):  # noqa: N818 - an outcome, not an error
    """No numbers make a call fit the copies in its input; the message is the reason."""


def follow(
    call: Call, axes: Callable[[], Axes], old: Sequence[int], new: Any, equations: list[Equation]
) -> Call:
    """Replace the numbers in a call by those that fit the copies in its wide input.

    Args:
        call: a call of one of the functions in `NUMBERED`, with a wide tensor and any numbers.
        axes: function that returns the index maps of the wide tensor.
        old: shape of the same tensor in the student.
        new: shape of the call's result in the student, or a list of shapes.
        equations: list to which an equation is added for each number.

    Returns:
        The call to make instead.

    Raises:
        Unfollowed: when no numbers fit.
    """
    function, x = call.function, call.input
    if function in RESHAPES or function in UNFLATTENS:
        return _follow_reshape(call, axes, old, new, equations)
    if tuple(x.shape) == tuple(old):
        return call  # nothing has grown, so the numbers stay
    return _follow_widened(call, axes(), old, new, equations)


def _follow_widened(
    call: Call, axes: Axes, old: Sequence[int], new: Any, equations: list[Equation]
) -> Call:
    function, x = call.function, call.input
    if function in SPLITS or function in CHUNKS:
        return _follow_split(call, axes, old, new, equations)
    if function in NARROW_FUNCTIONS:
        dim, start, length = (
            call.argument(k, n) for k, n in ((1, "dim"), (2, "start"), (3, "length"))
        )
        map_ = axes[dim]
        if map_ is None:
            return call
        begin = int(start) + (old[dim] if start < 0 else 0)
        first, stop = _range(map_, begin, begin + int(length), equations, start, None)
        _note(equations, length, stop - first)
        return Call(torch.narrow, (x, dim, first, stop - first))
    if function in INDEXES:
        return Call(function, (x, _follow_index(call.args[1], axes, old, equations)))
    if function in EXPANDS:
        return _follow_expand(call, axes, new, equations)
    return _follow_norm(call, axes, equations)


def _note(equations: list[Equation], given: Any, wanted: int) -> None:
    if isinstance(given, int):
        equations.append(Equation(expression_of(given), wanted, int(given)))


def _note_position(equations: list[Equation], given: Any, wanted: int, size: int) -> None:
    """Note the equation of a position on an axis, which code may count from the end of the axis.

    Args:
        equations: list to which the equation is added.
        given: the position in the code.
        wanted: the wide position, counted from the start.
        size: wide size of the axis. Positions beyond the axis stand for its end in both networks,
            and need no equation.
    """
    if -size <= given <= size:
        _note(equations, given, wanted - size if given < 0 else wanted)


def _follow_reshape(
    call: Call,
    axes: Callable[[], Axes],
    old: Sequence[int],
    new: Sequence[int],
    equations: list[Equation],
) -> Call:
    given = call.asked(len(new))
    sizes = reshaped(old, new, call.input.shape, axes, given)
    if sizes is None:
        raise Unfollowed(
            f"it reshapes {_shown(old)} to {_shown(new)} across the copies of its channels"
        )
    for number, size in zip(given, sizes, strict=True):
        if number != -1:
            _note(equations, number, size)
    function = Tensor.view if call.function is Tensor.view else Tensor.reshape
    return Call(function, (call.input, sizes))


def _follow_split(
    call: Call, axes: Axes, old: Sequence[int], new: Sequence[Sequence[int]], equations: Any
) -> Call:
    dim = call.argument(2, "dim") or 0
    map_ = axes[dim]
    if map_ is None:
        return call
    pieces = cut(map_, [shape[dim] for shape in new])
    if pieces is None:
        raise Unfollowed(
            f"it cuts {old[dim]} channels into {_shown([shape[dim] for shape in new])} across "
            "their copies"
        )
    sizes = [len(piece) for piece in pieces]
    given = call.argument(1, *_PIECES)
    if call.function in CHUNKS:
        if isinstance(given, int):
            pieces_made = call.function(torch.empty(len(map_)), int(given))
            natural = [len(piece) for piece in pieces_made]
            if natural != sizes:
                raise Unfollowed(
                    f"it cuts its channels into {_shown(natural)}, and their copies take "
                    f"{_shown(sizes)}"
                )
        elif isinstance(given, tuple | list):
            for number, position in zip(given, accumulate(sizes[:-1]), strict=True):
                _note_position(equations, number, position, len(map_))
    elif isinstance(given, int):
        if len(set(sizes[:-1])) > 1 or sizes[-1] > sizes[0]:
            raise Unfollowed(f"its pieces of {given} channels widen to different sizes")
        _note(equations, given, sizes[0])
    else:
        for number, size in zip(given, sizes, strict=True):
            _note(equations, number, size)
    return Call(torch.split, (call.input, sizes, dim))


def _follow_index(index: Any, axes: Axes, old: Sequence[int], equations: Any) -> Any:
    """Replace the slices in an index by those that fit the copies.

    Args:
        index: the index in the code.
        axes: index maps of the tensor's axes.
        old: narrow shape of the tensor.
        equations: list to which an equation is added for each number.
    """
    parts = index if isinstance(index, tuple) else (index,)
    taken = sum(1 for p in parts if p is not None and p is not Ellipsis and not isinstance(p, bool))
    axis, followed = 0, list[Any]()
    for part in parts:
        if part is None or isinstance(part, bool):
            followed.append(part)
            continue
        if part is Ellipsis:
            axis += len(old) - taken
            followed.append(part)
            continue
        map_ = axes[axis] if axis < len(axes) else None
        if map_ is not None and isinstance(part, slice) and part != slice(None):
            part = _follow_slice(part, map_, old[axis], equations)
        elif map_ is not None and isinstance(part, int):
            raise Unfollowed(f"it takes channel {part} by its position")
        axis += 1
        followed.append(part)
    return tuple(followed)


def _follow_slice(part: slice, map_: IndexMap, size: int, equations: list[Equation]) -> slice:
    """Replace a slice by the slice of the copies of the channels that it takes in the student.

    Args:
        part: the slice in the code.
        map_: index map of the axis.
        size: narrow size of the axis.
        equations: list to which an equation is added for each end that the code gives.
    """
    start, stop, step = part.indices(size)
    if step == 1:
        return slice(*_range(map_, start, stop, equations, part.start, part.stop))
    if start >= abs(step) or part.stop is not None:
        raise Unfollowed(f"it takes channels {start} to {stop} in steps of {step}")
    # The slice takes one of every few neighbours. This is right if the neighbours are copied
    # together; if not, the inputs of later modules will not match.
    return part


def _range(
    map_: IndexMap, start: int, stop: int, equations: list[Equation], *given: Any
) -> tuple[int, int]:
    """Find the wide positions of a range of channels, and note their equations.

    Args:
        map_: index map of the axis.
        start: first narrow position.
        stop: narrow position after the last one.
        equations: list to which an equation is added for each number in `given`.
        given: the numbers in the code for start and stop; None for one that the code leaves out.

    Returns:
        The first wide position, and the wide position after the last one.
    """
    pieces = cut(map_, [start, stop - start, map_.narrow_size - stop])
    if pieces is None:
        raise Unfollowed(f"it takes channels {start} to {stop - 1} across their copies")
    first = len(pieces[0])
    last = first + len(pieces[1])
    for number, position in zip(given, (first, last), strict=True):
        if number is not None:
            _note_position(equations, number, position, len(map_))
    return first, last


def _follow_expand(call: Call, axes: Axes, new: Sequence[int], equations: list[Equation]) -> Call:
    x: Tensor = call.input
    given = call.numbers("size")
    offset = len(given) - x.ndim
    sizes = []
    for k, number in enumerate(given):
        map_ = axes[k - offset] if k >= offset else None
        if map_ is not None and map_.narrow_size > 1 and number != -1:
            _note(equations, number, len(map_))
            number = len(map_)
        sizes.append(number)
    return Call(Tensor.expand, (x, sizes))


def _follow_norm(call: Call, axes: Axes, equations: list[Equation]) -> Call:
    shape = call.argument(1, "normalized_shape")
    given = list(shape) if isinstance(shape, tuple | list) else [shape]
    wide = list(call.input.shape[len(axes) - len(given) :])
    for number, size in zip(given, wide, strict=True):
        _note(equations, number, size)
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    named = dict(zip(names, call.args, strict=False)) | dict(call.kwargs)
    named |= {"normalized_shape": wide}
    return Call(call.function, (), named)


def _shown(sizes: Sequence[int]) -> str:
    return " x ".join(str(int(size)) for size in sizes)
