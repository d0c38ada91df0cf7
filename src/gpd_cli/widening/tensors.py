"""Inverse and channel-branch reparameterization of single tensors (Guo et al., 2025, section 3).

With index maps ``out``, ``in``, n(c) copies of c, and a(c) the first of them::

    teacher[o', i'] = student[out(o'), in(i')] / n(in(i')) + d[o', i']
    student[o, i]   = n(i) * teacher[a(o), a(i)]

where the noise ``d`` sums to zero over the copies of each input channel and vanishes on the
student's block ``[a(o), a(i)]``. The noise breaks the symmetry between copies and stays exact.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from gpd_cli.widening.plan import IndexMap, TensorPlan, evenly

Storage = Literal["mixed", "student", "teacher"]
"""The scale at which a weight is stored: it changes how fast an optimizer moves the weight, and no
function.

``mixed`` keeps the student's block at the student's scale and the rest at the teacher's: every
weight then moves under SGD as in plain training of its own network. ``student`` keeps the whole
weight at the student's scale: steps of one size, as Adam takes them, are then of one relative size.

``teacher`` is the storage of the paper's authors (guoyongcs/GPD): kernels and biases are divided by
the number of copies of each output. Inside the network that is the teacher's scale, and under SGD
the student moves ratio^2 times as fast as it would alone. In the stem, whose inputs have no copies,
both networks move that fast. The classifier, whose outputs have no copies, is at the student's
scale, as are all tensors without a fan-in: depthwise kernels, norms, tokens.
"""

_CHUNK = 2**24  # elements of noise drawn at a time
_PIECE = 2**20  # elements of noise added at a time


def replicate(narrow: Tensor, plan: TensorPlan) -> Tensor:
    """The replication of a tensor by its index maps, with nothing divided: ``s[out(o'), in(i')]``.

    Args:
        narrow: the student's tensor.
        plan: the tensor's plan, of which only the index maps matter.

    Returns:
        A new tensor of the wide shape.
    """
    wide = narrow.detach()
    # From the last axis to the first, whose rows are copied whole: by far the most is copied there.
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
    """Inverse reparameterization of one tensor: the teacher's weight, at the teacher's scale.

    Args:
        narrow: the student's tensor.
        plan: the tensor's plan.
        noise: standard deviation of the zero-sum noise, in units of that of the student's weight
            divided among its copies.
        generator: random generator of the noise.

    Returns:
        A new tensor of the wide shape. From copies of the narrow layer's inputs, the wide layer
        computes copies of the narrow layer's outputs, up to rounding.
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

    The noise vanishes on the student's block; with two copies of each input channel, the whole row
    of every first output copy is therefore without noise.

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
    # Row by row, in chunks: the noise of a large layer at once would double the memory.
    chunk, few = (max(1, size // max(1, rows[0].numel())) for size in (_CHUNK, _PIECE))
    for members, which in ((but_first, is_first), (everywhere, ~is_first)):
        contrasts = _contrasts(map_, members)
        if not len(contrasts):
            continue  # no channel has two of these copies: no noise sums to zero
        factors = (scale * contrasts).to(wide).reshape(len(contrasts), -1, *[1] * (wide.ndim - 2))
        for part in which.nonzero().flatten().to(wide.device).split(chunk):
            for factor in factors:
                shape = (len(part), map_.narrow, *rows.shape[2:])
                drawn = torch.randn(shape, generator=generator)
                # In small pieces, whose memory is used again: fresh pages take most of the time.
                for piece in range(0, len(part), few):
                    some = slice(piece, piece + few)
                    noise = drawn[some].index_select(1, map_.tensor).to(wide.device) * factor
                    rows.index_add_(0, part[some], noise)


def _contrasts(map_: IndexMap, members: Tensor) -> Tensor:
    """Factors that turn independent normals per input channel into zero-sum noise of variance 1.

    Among m copies the k-th normal goes to copy k with factor k, and to each copy before it with
    factor -1 (Helmert's contrasts, normalized): m - 1 independent normals in place of m whose mean
    is then subtracted.

    Args:
        map_: the index map of the fan-in axis.
        members: which wide positions get noise, ``[wide]``.

    Returns:
        One row of factors for each normal, ``[most copies - 1, wide]``, float64.
    """
    positions = members.nonzero().flatten()
    channels = map_.tensor[positions]
    sizes = torch.bincount(channels, minlength=map_.narrow)
    # The number of each copy among those of its channel: 0, 1, ...
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
    """Undo the rounding of an expanded tensor, in place: the last copies are what the others leave.

    Args:
        wide: the teacher's tensor, at the teacher's scale, rounded.
        narrow: the student's tensor.
        plan: the tensor's plan.

    Returns:
        The largest change.

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
            if len(channels) == map_.narrow:
                left -= some[:, evenly(positions)]
            else:
                left.index_add_(1, channels, some.index_select(1, positions), alpha=-1)
        change = max(change, largest(left - some[:, evenly(lasts)]))
        some[:, evenly(lasts)] = left
    return change


def largest(values: Tensor) -> float:
    """The largest absolute value; not a number where some value is none."""
    if not values.numel():
        return 0.0
    low, high = values.aminmax()
    return float(torch.maximum(-low, high))


def _copies_in_order(map_: IndexMap) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """The copies of each channel: all first ones, all second ones, and so on, without the last.

    Returns:
        A list with the channels and their positions, and the positions of the last copies, one of
        each channel.
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
    """The factors that turn a stored tensor into the teacher's tensor and the student's.

    Args:
        plan: the tensor's plan.
        storage: at what scale the tensor is stored.
        like: a tensor that gives device and dtype.
        out_axis: the output axis whose copies storage ``teacher`` divides by; None for tensors
            that stay at the student's scale, see `gpd_cli.teacher.build.output_axis`.

    Returns:
        ``(teacher_scale, student_scale)``, None for a factor of one. The teacher's factor is for
        the student's block only with storage ``mixed``, else for the whole stored tensor; the
        student's factor turns the stored block into the student's tensor.
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
    """Channel-branch reparameterization of one merged tensor: ``n(i) * t[a(o), a(i)]``.

    Args:
        teacher: the dynamic teacher's merged tensor, at the teacher's scale.
        plan: the tensor's plan.

    Returns:
        The student's tensor, contiguous.
    """
    divisor, narrow = plan.divisor(teacher), teacher[plan.first_copies]
    return narrow.contiguous() if divisor is None else narrow * divisor
