"""One stored tensor, two kernels: the teacher's kernel, and the student's block of the same tensor.

`SharedKernel` is a parametrization (`torch.nn.utils.parametrize`): it merges the stored tensor with
the branches, once, and returns the kernel that the teacher's layer runs with; the student's kernel
is sliced from the same merged tensor on the way.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gpd_cli.branches import BranchBank
from gpd_cli.distributed.averaging import averaged
from gpd_cli.errors import ExpansionError
from gpd_cli.widening.plan import Index, TensorPlan
from gpd_cli.widening.tensors import Storage, complete_, largest, stored_scales


def _student_kernel(merged: Tensor, block: tuple[Index, ...], scale: Tensor | None) -> Tensor:
    """The student's block of a merged tensor, at the student's scale, contiguous."""
    return (merged[block] if scale is None else merged[block] * scale).contiguous()


class _BothKernels(torch.autograd.Function):
    """Slice and scale in one autograd node, in the fewest passes over the wide tensor.

    As separate operations, the slice's backward would fill a second wide gradient with zeros, and
    the scale would touch every element; here both touch the student's block only.
    """

    @staticmethod
    def forward(
        ctx: Any,
        merged: Tensor,
        teacher_scale: Tensor | None,
        block: tuple[Index, ...],
        mixed: bool,
        student_scale: Tensor | None,
        in_place: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(teacher_scale, student_scale)
        ctx.block, ctx.mixed, ctx.shape = block, mixed, merged.shape
        ctx.set_materialize_grads(False)
        student = _student_kernel(merged, block, student_scale)
        if teacher_scale is None:
            return merged.view_as(merged), student
        if in_place:
            ctx.mark_dirty(merged)
        if mixed:
            teacher = merged if in_place else merged.clone()
            teacher[block] = student * teacher_scale
        else:
            teacher = merged.mul_(teacher_scale) if in_place else merged * teacher_scale
        return teacher, student

    @staticmethod
    def backward(ctx: Any, teacher: Tensor | None, student: Tensor | None) -> Any:
        teacher_scale, student_scale = ctx.saved_tensors
        if student is not None and student_scale is not None:
            student = student * student_scale
        if teacher is None:
            if student is None:
                return (None,) * 6
            grad = student.new_zeros(ctx.shape)
            grad[ctx.block] = student
            return grad, None, None, None, None, None
        scale = teacher_scale if ctx.mixed else None  # of the block; else of the whole tensor
        grad = teacher.clone() if teacher_scale is None or ctx.mixed else teacher * teacher_scale
        block = grad[ctx.block]
        if student is None:
            if scale is not None:
                grad[ctx.block] = block * scale
        else:
            # One pass over the strided block in each direction.
            grad[ctx.block] = (
                block + student if scale is None else torch.addcmul(student, block, scale)
            )
        return grad, None, None, None, None, None


def both_kernels(
    merged: Tensor,
    teacher_scale: Tensor | None,
    block: tuple[Index, ...],
    storage: Storage = "mixed",
    student_scale: Tensor | None = None,
    *,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """Teacher's and student's kernel from one merged tensor.

    Args:
        merged: the wide tensor, branches merged, at its stored scale.
        teacher_scale: factor from the stored scale to the teacher's, for the student's block only
            with mixed storage, else for the whole tensor; None for one.
        block: the index of the student's block.
        storage: the scale at which the merged tensor is stored.
        student_scale: factor from the stored scale of the block to the student's; None for one, as
            always with mixed storage.
        in_place: whether the teacher's kernel may take the merged tensor's memory.

    Returns:
        The teacher's kernel, of the wide shape, and the student's, contiguous.
    """
    if teacher_scale is None and student_scale is None:
        return merged, _student_kernel(merged, block, None)
    teacher, student = _BothKernels.apply(
        merged, teacher_scale, block, storage == "mixed", student_scale, in_place
    )
    return teacher, student


class Sharing(nn.Module):
    """How teacher and student share one stored tensor.

    Args:
        plan: the tensor's plan.
        storage: the scale at which the tensor is stored.
        like: a tensor that gives device and dtype.
        out_axis: the output axis, by whose copies storage ``teacher`` divides; None for a tensor
            that stays at the student's scale.
    """

    teacher_scale: Tensor | None
    student_scale: Tensor | None

    def __init__(
        self, plan: TensorPlan, storage: Storage, like: Tensor, out_axis: int | None = None
    ) -> None:
        super().__init__()
        self.plan, self.out_axis = plan, out_axis
        self.block = plan.first_copies
        self.storage = storage
        teacher_scale, student_scale = stored_scales(plan, storage, like, out_axis)
        # Constants of the plan, not state: they stay out of checkpoints.
        self.register_buffer("teacher_scale", teacher_scale, persistent=False)
        self.register_buffer("student_scale", student_scale, persistent=False)

    @property
    def is_plain(self) -> bool:
        """Whether both networks use the stored tensor as it is."""
        return self.teacher_scale is None and self.student_scale is None

    def forward(self, stored: Tensor, in_place: bool = False) -> tuple[Tensor, Tensor]:
        """The teacher's and the student's tensor, see `both_kernels`."""
        return both_kernels(
            stored,
            self.teacher_scale,
            self.block,
            self.storage,
            self.student_scale,
            in_place=in_place,
        )

    def student(self, stored: Tensor) -> Tensor:
        """The student's tensor alone, without graph; equal to `forward`'s bit for bit."""
        return _student_kernel(stored.detach(), self.block, self.student_scale)

    @torch.no_grad()
    def store_(self, wide: Tensor, narrow: Tensor) -> None:
        """Turn the teacher's tensor into the stored tensor, in place.

        Args:
            wide: the teacher's tensor, at the teacher's scale.
            narrow: the student's tensor. Without a student's factor its own numbers are stored,
                not n * (s / n), so that extraction gives them back bit for bit.
        """
        if self.teacher_scale is not None and self.storage != "mixed":
            wide /= self.teacher_scale
        wide[self.block] = narrow if self.student_scale is None else narrow / self.student_scale


class ExactSharing(nn.Module):
    """A `Sharing` in float64 in which the teacher's tensor is an exact expansion of the student's.

    A stored tensor is rounded to its own type, so that the copies of an input channel add up to the
    student's weight up to rounding only. Here the last copy of each input channel is what the
    others leave of the student's weight, and tensors without a fan-in are copied from the
    student's. The function is then exactly the student's if the plan is right. That this moves no
    weight by more than rounding is checked.

    Args:
        sharing: how teacher and student share the stored tensor.
        name: name of the tensor, for errors.
    """

    def __init__(self, sharing: Sharing, name: str) -> None:
        super().__init__()
        self.plan, self.storage, self.name = sharing.plan, sharing.storage, name
        like = torch.empty(0, dtype=torch.float64)
        self.teacher_scale, self.student_scale = stored_scales(
            sharing.plan, sharing.storage, like, sharing.out_axis
        )

    def forward(self, stored: Tensor, in_place: bool = False) -> tuple[Tensor, None]:
        """The teacher's tensor in float64, and nothing of the student's: memory is scarce here.

        Args:
            stored: the stored tensor, branches left out.
            in_place: not used, since the result is of another type.

        Raises:
            ExpansionError: when the stored tensor is no expansion of the student's.
        """
        student = self.student(stored)
        teacher = stored.detach().to(torch.float64, copy=True)
        if self.teacher_scale is not None and self.storage == "mixed":
            teacher[self.plan.first_copies] *= self.teacher_scale
        elif self.teacher_scale is not None:
            teacher *= self.teacher_scale
        copies = 1 if self.plan.fan_in_map is None else int(self.plan.fan_in_map.counts.max())
        rounding = (copies + 2) * torch.finfo(stored.dtype).eps * largest(teacher)
        if not complete_(teacher, student, self.plan) <= rounding:
            raise ExpansionError(
                f"The teacher's {self.name} is no expansion of the student's; this is an error of "
                "gpd itself."
            )
        return teacher, None

    def student(self, stored: Tensor) -> Tensor:
        """The student's tensor in float64."""
        student = stored.detach()[self.plan.first_copies].double()
        return student.contiguous() if self.student_scale is None else student * self.student_scale


class SharedKernel(nn.Module):
    """The parametrization of a kernel that teacher and student share.

    Args:
        sharing: the scale of the stored tensor, and the student's block of it.
        branches: a module that merges extra branches into the stored tensor, or None.
    """

    def __init__(self, sharing: Sharing, branches: BranchBank | None = None) -> None:
        super().__init__()
        self.sharing = sharing
        self.branches = branches
        self.averages_gradient = False  # of the merged kernel, over processes
        self.holds = False  # the merged kernel, until `forget`: its layer runs again
        self._student: Tensor | None = None
        self._held: tuple[Tensor, int] | None = None  # with the stored tensor's version

    def forward(self, stored: Tensor) -> Tensor:
        """Merge the branches and return the teacher's kernel; `student` returns the student's.

        Args:
            stored: the trainable tensor, of the wide shape.
        """
        holds = self.holds and torch.is_grad_enabled()
        if holds and self._held is not None and self._held[1] == stored._version:
            return self._held[0]
        teacher, self._student = self.both_kernels(stored)
        if holds:
            self._held = teacher, stored._version
        return teacher

    def both_kernels(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's kernel and the student's, which is a block of the merged kernel."""
        if self.branches is None or (not torch.is_grad_enabled() and self.branches.is_silent()):
            merged = stored  # also before the first step: gates of zero change no bit
        else:
            merged = self._averaging(self.branches(stored))
        kernels: tuple[Tensor, Tensor] = self.sharing(merged, in_place=merged is not stored)
        return kernels

    def _averaging(self, merged: Tensor) -> Tensor:
        """A merged kernel whose gradient is averaged over processes, where that is wanted."""
        if self.averages_gradient and merged.requires_grad:
            channels_last = merged.ndim == 4 and not merged.is_contiguous()
            merged.register_hook(partial(averaged, channels_last=channels_last))
        return merged

    def student(self, stored: Tensor) -> Tensor:
        """The student's kernel, as sliced when the teacher's kernel was last computed.

        Args:
            stored: the trainable tensor, from which the kernel is sliced if it was not yet.
        """
        if self._student is None and self.needs_merging:
            self(stored)
        return self.sharing.student(stored) if self._student is None else self._student

    @property
    def needs_merging(self) -> bool:
        """Whether the student's kernel takes more than slicing the stored tensor."""
        return self.branches is not None or torch.is_grad_enabled()

    def forget(self) -> None:
        """Drop the kernels of a step, so that no graph outlives it."""
        self._student = self._held = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy has the weights, and no intermediate results of a step.
        return {**self.__dict__, "_student": None, "_held": None}
