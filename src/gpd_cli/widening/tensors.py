"""Expand and slice single tensors (Guo et al., 2025, section 3).

Expansion is the paper's inverse reparameterization, slicing its channel-branch reparameterization.
``out`` and ``in`` are index maps; channel c has n(c) copies, and a(c) is the first of them::

    teacher[o', i'] = student[out(o'), in(i')] / n(in(i')) + d[o', i']
    student[o, i]   = n(i) * teacher[a(o), a(i)]

The noise ``d`` sums to zero over the copies of each input channel, and is zero on the student's
block ``[a(o), a(i)]``. It lets the copies diverge in training, but changes no output.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from gpd_cli.widening.plan import IndexMap, TensorPlan, evenly

Storage = Literal["mixed", "student", "teacher"]
"""The scale at which a weight is stored.

It changes how fast an optimizer moves the weight, but not what the networks compute.

``mixed`` keeps the student's block at the student's scale and the rest at the teacher's. Under SGD
every weight then moves as in plain training of its own network. ``student`` keeps the whole weight
at the student's scale. Steps of equal size, as Adam takes them, then have equal relative size.

``teacher`` is the storage of the paper's authors (guoyongcs/GPD): kernels and biases are divided by
the number of copies of each output. Inside the network this is the teacher's scale, and under SGD
the student moves ratio^2 times as fast as it would alone. In the stem, whose inputs have no copies,
both networks move that fast. The classifier, whose outputs have no copies, is at the student's
scale, and so are all tensors without a fan-in: depthwise kernels, norms, tokens.
"""

_CHUNK = 2**24  # how many elements of noise are drawn at a time
_PIECE = 2**20  # how many elements of noise are added at a time


def replicate(narrow: Tensor, plan: TensorPlan) -> Tensor:
    """Copy a tensor along its axes by index maps, without division: ``s[out(o'), in(i')]``.

    Args:
        narrow: the student's tensor.
        plan: the tensor's plan, of which only the index maps matter.

    Returns:
        A new tensor of the wide shape.
    """
    wide = narrow.detach()
    # The first axis comes last: most of the data is copied there, in whole rows.
    for axis, map_ in reversed([*enumerate(plan.axes)]):
        if map_ is not None:
            wide = wide.index_select(axis, map_.tensor.to(wide.device))
    return wide.clone() if wide.data_ptr() == narrow.data_ptr() else wide


def expand_tensor(
    narrow: Tensor,
    plan: TensorPlan,
    *,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Expand one tensor of the student to the teacher's tensor, at the teacher's scale.

    With this tensor, the wide layer maps copies of the narrow layer's inputs to copies of the
    narrow layer's outputs, up to rounding.

    Args:
        narrow: the student's tensor.
        plan: the tensor's plan.
        noise: standard deviation of the zero-sum noise, relative to the standard deviation of the
            student's weight divided by the numbers of copies.
        generator: random generator of the noise.

    Returns:
        A new tensor of the wide shape.
    """
    divisor = plan.divisor(narrow)
    if divisor is None:
        return replicate(narrow, plan)
    shares = narrow.detach() / divisor
    wide = replicate(shares, plan)
    if noise > 0 and plan.fan_in_map is not None and narrow.numel() > 1:
        add_zero_sum_noise_(wide, plan, noise * float(shares.std()), generator)
    return wide


def add_zero_sum_noise_(
    wide: Tensor, plan: TensorPlan, scale: float, generator: torch.Generator | None = None
) -> None:
    """Add noise whose sum over the copies of each input channel is zero, in place.

    The noise is zero on the student's block: in the rows of the first output copies, the first copy
    of each input channel has none. With only two copies, the second copy then has none either.

    Args:
        wide: the teacher's tensor.
        plan: a plan that divides (``plan.fan_in_map`` is not None).
        scale: standard deviation of the noise.
        generator: random generator of the noise.
    """
    map_, fan_in = plan.fan_in_map, plan.fan_in or 0
    if map_ is None:
        raise ValueError("zero-sum noise needs a tensor with a widened fan-in axis")
    out_axis = 1 - fan_in
    rows = wide.movedim((out_axis, fan_in), (0, 1))
    out = plan.axes[out_axis]
    is_first = torch.ones(len(rows), dtype=torch.bool)
    if out is not None:
        is_first[:] = False
        is_first[out.firsts] = True
    everywhere = torch.ones(len(map_), dtype=torch.bool)
    but_first = everywhere.clone()
    but_first[map_.firsts] = False
    # The noise is drawn for chunks of rows: for a whole large layer it would double the memory.
    chunk, few = (max(1, size // max(1, rows[0].numel())) for size in (_CHUNK, _PIECE))
    for members, which in ((but_first, is_first), (everywhere, ~is_first)):
        contrasts = _contrasts(map_, members)
        if not len(contrasts):
            continue  # no channel has two such copies, whose noise could sum to zero
        factors = (scale * contrasts).to(wide).reshape(len(contrasts), -1, *[1] * (wide.ndim - 2))
        for part in which.nonzero().flatten().to(wide.device).split(chunk):
            for factor in factors:
                shape = (len(part), map_.narrow_size, *rows.shape[2:])
                drawn = torch.randn(shape, generator=generator)
                # Small pieces reuse the same memory; new memory pages would take most of the time.
                for piece in range(0, len(part), few):
                    some = slice(piece, piece + few)
                    noise = drawn[some].index_select(1, map_.tensor).to(wide.device) * factor
                    rows.index_add_(0, part[some], noise)


def _contrasts(map_: IndexMap, members: Tensor) -> Tensor:
    """Compute the factors that turn independent normal numbers into zero-sum noise of variance 1.

    For m copies of an input channel, m - 1 independent normals are drawn. The k-th of them is added
    to copy k with factor k, and to each copy before copy k with factor -1 (Helmert's contrasts,
    normalized). This takes the place of m normals whose mean is subtracted.

    Args:
        map_: the index map of the fan-in axis.
        members: whether each wide position gets noise, ``[wide]``.

    Returns:
        One row of factors for each normal, ``[most copies - 1, wide]``, in float64.
    """
    positions = members.nonzero().flatten()
    channels = map_.tensor[positions]
    sizes = torch.bincount(channels, minlength=map_.narrow_size)
    # The position of each copy among the copies of the same channel: 0, 1, ...
    order = channels.argsort(stable=True)
    number = torch.empty(len(map_), dtype=torch.int64)
    before = (sizes.cumsum(0) - sizes)[channels[order]]
    number[positions[order]] = torch.arange(len(positions)) - before
    factors = torch.zeros(max(0, int(sizes.max()) - 1), len(map_), dtype=torch.float64)
    sizes = sizes[map_.tensor]
    unit = (sizes / (sizes - 1).clamp(min=1)).sqrt()
    for k, row in enumerate(factors, start=1):
        row[members & (number == k)] = k
        row[members & (number < k)] = -1
        row *= unit * (sizes > k) / math.sqrt(k * (k + 1))
    return factors


def complete_(wide: Tensor, narrow: Tensor, plan: TensorPlan) -> float:
    """Undo the rounding of an expanded tensor, in place.

    The last copy of each input channel is set to the student's weight minus the other copies.

    Args:
        wide: the teacher's tensor, at the teacher's scale, with rounding errors.
        narrow: the student's tensor.
        plan: the tensor's plan.

    Returns:
        The largest change of an element.

    Example:
        >>> plan = TensorPlan((None, IndexMap(1, (0, 0))), fan_in=1)
        >>> wide = torch.tensor([[2.0, 0.5]])
        >>> complete_(wide, torch.tensor([[3.0]]), plan), wide
        (0.5, tensor([[2., 1.]]))
    """
    map_, fan_in = plan.fan_in_map, plan.fan_in or 0
    if map_ is None:
        exact = expand_tensor(narrow, plan)
        change = largest(wide - exact)
        wide.copy_(exact)
        return change
    if plan.extra_divisor != 1:
        narrow = narrow / plan.extra_divisor
    axes = (1 - fan_in, fan_in)
    rows, source = wide.movedim(axes, (0, 1)), narrow.movedim(axes, (0, 1))
    out = plan.axes[1 - fan_in]
    others, lasts = _copies_in_order(map_)
    change, few = 0.0, max(1, _PIECE // max(1, rows[0].numel()))
    for start in range(0, len(rows), few):
        some = rows[start : start + few]
        index = torch.arange(start, start + len(some)) if out is None else out.tensor
        left = source.index_select(0, index if out is None else index[start : start + few])
        for channels, positions in others:
            if len(channels) == map_.narrow_size:
                left -= some[:, evenly(positions)]
            else:
                left.index_add_(1, channels, some.index_select(1, positions), alpha=-1)
        change = max(change, largest(left - some[:, evenly(lasts)]))
        some[:, evenly(lasts)] = left
    return change


def largest(values: Tensor) -> float:
    """The largest absolute value in a tensor; NaN if the tensor has a NaN."""
    if not values.numel():
        return 0.0
    low, high = values.aminmax()
    return float(torch.maximum(-low, high))


def _copies_in_order(map_: IndexMap) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Group the copies of all channels: the first copies, the second copies, and so on.

    Args:
        map_: the index map of an axis.

    Returns:
        For all groups, without the last copy of each channel, the channels and the wide positions
        of their copies; and the wide positions of the last copies, one for each channel.
    """
    order, counts = map_.tensor.argsort(stable=True), map_.counts
    before = counts.cumsum(0) - counts
    others = []
    for k in range(int(counts.max()) - 1):
        channels = (counts > k + 1).nonzero().flatten()
        others.append((channels, order[before[channels] + k]))
    return others, order[before + counts - 1]


def stored_scales(
    plan: TensorPlan, storage: Storage, like: Tensor, out_axis: int | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the factors that turn a stored tensor into the teacher's and the student's tensor.

    Args:
        plan: the tensor's plan.
        storage: the scale at which the tensor is stored.
        like: a tensor with the device and dtype of the factors.
        out_axis: the output axis, by whose numbers of copies storage ``teacher`` divides; None for
            tensors that stay at the student's scale, see `gpd_cli.teacher.build.output_axis`.

    Returns:
        ``(teacher_scale, student_scale)``, each None for a factor of one. With storage ``mixed``
        the teacher's factor applies to the student's block only, else to the whole stored tensor.
        The student's factor applies to the student's block.
    """
    if storage == "mixed":
        divisor = plan.divisor(like)
        return (None if divisor is None else 1 / divisor), None
    divisor = plan.wide_divisor(like)
    out = plan.axes[out_axis] if storage == "teacher" and out_axis is not None else None
    if out is None or out_axis is None:
        return (None if divisor is None else 1 / divisor), None
    shape = [1] * len(plan.axes)
    shape[out_axis] = -1
    student_scale = out.counts.to(like).reshape(shape)
    wide_scale = out.counts[out.tensor].to(like).reshape(shape)
    teacher_scale = wide_scale if divisor is None else wide_scale / divisor
    return _unless_one(teacher_scale), _unless_one(student_scale)


def _unless_one(scale: Tensor) -> Tensor | None:
    return None if bool((scale == 1).all()) else scale


def slice_tensor(teacher: Tensor, plan: TensorPlan) -> Tensor:
    """Slice the student's tensor out of one merged tensor of the teacher: ``n(i) * t[a(o), a(i)]``.

    Args:
        teacher: the dynamic teacher's merged tensor, at the teacher's scale.
        plan: the tensor's plan.

    Returns:
        The student's tensor, contiguous.
    """
    divisor, narrow = plan.divisor(teacher), teacher[plan.first_copies]
    return narrow.contiguous() if divisor is None else narrow * divisor
