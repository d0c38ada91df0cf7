"""How the kernels of both networks are computed from one stored tensor.

`SharedKernel` is a parametrization (`torch.nn.utils.parametrize`) of a layer of the teacher. It
merges the branches into the stored tensor once, returns the kernel that the teacher's layer runs
with, and keeps the student's kernel, which is sliced from the same merged tensor.
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


def _student_kernel(
    merged: Tensor, block: tuple[Index, ...], scale: Tensor | None, copied: bool = False
) -> Tensor:
    """The student's block of a merged tensor, at the student's scale, contiguous.

    Args:
        merged: the merged tensor.
        block: the index of the block.
        scale: factor to the student's scale; None stands for 1.
        copied: whether the result has memory of its own even where the block is contiguous.
    """
    if scale is None and copied:
        return merged[block].clone(memory_format=torch.contiguous_format)
    return (merged[block] if scale is None else merged[block] * scale).contiguous()


class _BothKernels(torch.autograd.Function):
    """Slice and scale in one autograd node, in as few passes over the wide tensor as possible.

    As separate operations, the backward pass of the slice would fill a second wide gradient with
    zeros, and the scaling would touch every element. Here slice and (with mixed storage) scaling
    touch the student's block only.
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
        # In place, the teacher's kernel takes the memory of the merged tensor.
        student = _student_kernel(merged, block, student_scale, copied=in_place)
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
        # With mixed storage the scale applies to the student's block, else to the whole tensor.
        scale = teacher_scale if ctx.mixed else None
        grad = teacher.clone() if teacher_scale is None or ctx.mixed else teacher * teacher_scale
        block = grad[ctx.block]
        if student is None:
            if scale is not None:
                grad[ctx.block] = block * scale
        else:
            # The block, which is strided, is read once and written once.
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
    """Compute the teacher's and the student's kernel from one merged tensor.

    Args:
        merged: the wide tensor with its branches merged, at the scale of storage.
        teacher_scale: factor from the scale of storage to the teacher's. With mixed storage it
            applies to the student's block only, else to the whole tensor. None stands for 1.
        block: the index of the student's block in the wide tensor.
        storage: the scale at which the merged tensor is stored.
        student_scale: factor from the scale of storage to the student's, for the student's block.
            None stands for 1; with mixed storage it is always None.
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
        like: a tensor with the device and dtype of the scales.
        out_axis: the output axis, by whose numbers of copies storage ``teacher`` divides; None for
            a tensor that stays at the student's scale.
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
        # The scales follow from the plan and are no state, so they stay out of checkpoints.
        self.register_buffer("teacher_scale", teacher_scale, persistent=False)
        self.register_buffer("student_scale", student_scale, persistent=False)

    @property
    def is_plain(self) -> bool:
        """Whether both networks use the stored tensor as it is."""
        return self.teacher_scale is None and self.student_scale is None

    def forward(self, stored: Tensor, in_place: bool = False) -> tuple[Tensor, Tensor]:
        """Compute the teacher's and the student's tensor, see `both_kernels`."""
        return both_kernels(
            stored,
            self.teacher_scale,
            self.block,
            self.storage,
            self.student_scale,
            in_place=in_place,
        )

    def student(self, stored: Tensor) -> Tensor:
        """The student's tensor as `forward` returns it, bit for bit, but without a graph."""
        return _student_kernel(stored.detach(), self.block, self.student_scale)

    @torch.no_grad()
    def store_(self, wide: Tensor, narrow: Tensor) -> None:
        """Turn the teacher's tensor into the stored tensor, in place.

        Args:
            wide: the teacher's tensor, at the teacher's scale, which is overwritten.
            narrow: the student's tensor s. Where the student's block is stored at the student's
                scale, s is stored itself and not n * (s / n), which would be rounded; so extraction
                gives it back bit for bit.
        """
        if self.teacher_scale is not None and self.storage != "mixed":
            wide /= self.teacher_scale
        wide[self.block] = narrow if self.student_scale is None else narrow / self.student_scale


class ExactSharing(nn.Module):
    """A `Sharing` in float64 in which the teacher's tensor is an exact expansion of the student's.

    A stored tensor is rounded to its own dtype, so the copies of an input channel add up to the
    student's weight only up to rounding. Here the last copy of each input channel is replaced by
    the student's weight minus the other copies, and tensors without a fan-in are copied from the
    student's. If the plan is right, the teacher's function is then exactly the student's. It is
    checked that no weight moves by more than rounding.

    Args:
        sharing: how teacher and student share the stored tensor.
        name: name of the tensor, for error messages.
    """

    def __init__(self, sharing: Sharing, name: str) -> None:
        super().__init__()
        self.plan, self.storage, self.name = sharing.plan, sharing.storage, name
        like = torch.empty(0, dtype=torch.float64)
        self.teacher_scale, self.student_scale = stored_scales(
            sharing.plan, sharing.storage, like, sharing.out_axis
        )

    def forward(self, stored: Tensor, in_place: bool = False) -> tuple[Tensor, None]:
        """Compute the teacher's tensor in float64.

        The second value is None instead of the student's tensor, to save memory.

        Args:
            stored: the stored tensor, branches left out.
            in_place: not used, since the result has another dtype.

        Raises:
            ExpansionError: when the stored tensor is no expansion of the student's tensor.
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
                f"The teacher's {self.name} is not an expansion of the student's; this is an error "
                "of gpd itself, please report it."
            )
        return teacher, None

    def student(self, stored: Tensor) -> Tensor:
        """The student's tensor in float64."""
        student = stored.detach()[self.plan.first_copies].double()
        return student.contiguous() if self.student_scale is None else student * self.student_scale


class SharedKernel(nn.Module):
    """The parametrization of a kernel that teacher and student share.

    Args:
        sharing: how teacher and student share the stored tensor.
        branches: the module that merges extra branches into the stored tensor, or None.
    """

    def __init__(self, sharing: Sharing, branches: BranchBank | None = None) -> None:
        super().__init__()
        self.sharing = sharing
        self.branches = branches
        # Whether the gradient of the merged kernel is averaged over processes.
        self.averages_gradient = False
        # Whether the teacher's kernel is held until `forget`, for layers that run again.
        self.holds = False
        self._student: Tensor | None = None
        # The teacher's kernel, and the version of the stored tensor that it was computed from.
        self._held: tuple[Tensor, int] | None = None

    def forward(self, stored: Tensor) -> Tensor:
        """Merge the branches and return the teacher's kernel.

        The student's kernel is computed on the way; `student` returns it.

        Args:
            stored: the trainable tensor, of the teacher's shape.
        """
        holds = self.holds and torch.is_grad_enabled()
        if holds and self._held is not None and self._held[1] == stored._version:
            return self._held[0]
        teacher, self._student = self.both_kernels(stored)
        if holds:
            self._held = teacher, stored._version
        return teacher

    def both_kernels(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's kernel, and the student's, which is a block of the merged kernel."""
        if self.branches is None or (not torch.is_grad_enabled() and self.branches.is_silent()):
            merged = stored  # before the first step, too: gates of zero change no bit
        else:
            merged = self._averaging(self.branches(stored))
        kernels: tuple[Tensor, Tensor] = self.sharing(merged, in_place=merged is not stored)
        return kernels

    def _averaging(self, merged: Tensor) -> Tensor:
        """Let the gradient of a merged kernel be averaged over processes, where that is wanted."""
        if self.averages_gradient and merged.requires_grad:
            channels_last = merged.ndim == 4 and not merged.is_contiguous()
            merged.register_hook(partial(averaged, channels_last=channels_last))
        return merged

    def student(self, stored: Tensor) -> Tensor:
        """The student's kernel, sliced when the teacher's kernel was last computed.

        Args:
            stored: the trainable tensor. If the teacher's kernel was not computed yet, the
                student's is sliced from this tensor now.
        """
        if self._student is None and self.needs_merging:
            self(stored)
        return self.sharing.student(stored) if self._student is None else self._student

    @property
    def needs_merging(self) -> bool:
        """Whether the student's kernel is more than a slice of the stored tensor.

        This is so if there are branches, or if gradients have to reach the stored tensor.
        """
        return self.branches is not None or torch.is_grad_enabled()

    def forget(self) -> None:
        """Drop the kernels of a step, so that no graph outlives the step."""
        self._student = self._held = None

    def __getstate__(self) -> dict[str, Any]:
        # Copies have the weights, but no intermediate results of a step.
        return {**self.__dict__, "_student": None, "_held": None}
