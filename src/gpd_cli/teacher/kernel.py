"""One stored tensor, two kernels: the teacher's, and the student's block of it.

`SharedKernel` is a parametrization (`torch.nn.utils.parametrize`): what is stored goes through the
branches, once, and comes out as the kernel that the teacher's layer runs with; the student's
kernel is cut from the same merged tensor on the way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gpd_cli.branches import BranchBank
from gpd_cli.widening.plan import Index, TensorPlan
from gpd_cli.widening.tensors import Storage, stored_scales


class _Split(torch.autograd.Function):
    """Cut and scale in one node, in the fewest passes over the wide tensor.

    As separate operations, the slice's backward would fill a second wide gradient with zeros, and
    the scale would touch every element; here both touch the student's block alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        merged: Tensor,
        share: Tensor | None,
        block: tuple[Index, ...],
        mixed: bool,
        gain: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(share, gain)
        ctx.block, ctx.mixed, ctx.shape = block, mixed, merged.shape
        ctx.set_materialize_grads(False)
        student = merged[block] if gain is None else merged[block] * gain
        student = student.contiguous()
        if share is None:
            teacher = merged.view_as(merged)
        elif mixed:
            teacher = merged.clone()
            teacher[block] = student * share
        else:
            teacher = merged * share
        return teacher, student

    @staticmethod
    def backward(ctx: Any, teacher: Tensor | None, student: Tensor | None) -> Any:
        share, gain = ctx.saved_tensors
        if student is not None and gain is not None:
            student = student * gain
        if teacher is None:
            if student is None:
                return (None,) * 5
            grad = student.new_zeros(ctx.shape)
            grad[ctx.block] = student
            return grad, None, None, None, None
        if share is None:
            grad = teacher.clone()
        elif ctx.mixed:
            grad = teacher.clone()
            grad[ctx.block] = grad[ctx.block] * share
        else:
            grad = teacher * share
        if student is not None:
            grad[ctx.block] += student
        return grad, None, None, None, None


def split_kernel(
    merged: Tensor,
    share: Tensor | None,
    block: tuple[Index, ...],
    storage: Storage = "mixed",
    gain: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Teacher's and student's kernel from one merged tensor.

    Args:
        merged: the wide tensor, branches merged, at its stored scale.
        share: what turns the stored scale into the teacher's; broadcasts against the block for
            mixed storage, else against the whole; None for one.
        block: the index of the student's block.
        storage: what of the merged tensor is at the student's scale.
        gain: what turns the block's stored scale into the student's; None for one. For mixed
            storage there is none.

    Returns:
        The teacher's kernel, of the wide shape, and the student's, contiguous.
    """
    if share is None and gain is None:
        return merged, merged[block].contiguous()
    teacher, student = _Split.apply(merged, share, block, storage == "mixed", gain)
    return teacher, student


class Sharing(nn.Module):
    """How teacher and student share one stored tensor.

    Args:
        plan: how the tensor widens.
        storage: at what scale it is stored.
        like: a tensor that gives device and dtype.
        out_axis: see `gpd_cli.widening.tensors.stored_scales`.
    """

    share: Tensor | None
    gain: Tensor | None

    def __init__(
        self, plan: TensorPlan, storage: Storage, like: Tensor, out_axis: int | None = None
    ) -> None:
        super().__init__()
        self.block = plan.block
        self.storage = storage
        share, gain = stored_scales(plan, storage, like, out_axis)
        # Constants of the plan, not state: they stay out of checkpoints.
        self.register_buffer("share", share, persistent=False)
        self.register_buffer("gain", gain, persistent=False)

    @property
    def is_plain(self) -> bool:
        """Whether both networks use the stored tensor as it is."""
        return self.share is None and self.gain is None

    def forward(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's and the student's tensor, see `split_kernel`."""
        return split_kernel(stored, self.share, self.block, self.storage, self.gain)

    @torch.no_grad()
    def store_(self, wide: Tensor, narrow: Tensor) -> None:
        """Turn the teacher's tensor into what is stored of it, in place.

        Args:
            wide: the teacher's tensor, at the teacher's scale.
            narrow: the student's; where there is no gain, its own numbers are what is stored of
                it, not n * (s / n), so that they come back bit for bit.
        """
        if self.share is not None and self.storage != "mixed":
            wide /= self.share
        wide[self.block] = narrow if self.gain is None else narrow / self.gain


class SharedKernel(nn.Module):
    """The parametrization of a kernel that teacher and student share.

    Args:
        sharing: at what scale it is stored, and what of it is the student's.
        branches: a module that merges extra branches into the stored tensor, or None.
    """

    def __init__(self, sharing: Sharing, branches: BranchBank | None = None) -> None:
        super().__init__()
        self.sharing = sharing
        self.branches = branches
        self._student: Tensor | None = None

    def forward(self, stored: Tensor) -> Tensor:
        """Merge the branches and return the teacher's kernel; keep the student's for `student`.

        Args:
            stored: the trainable tensor, of the wide shape.
        """
        teacher, self._student = self.split(stored)
        return teacher

    def split(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        """Both networks' kernels: the student's is a block of what the branches merge to."""
        merged = stored if self.branches is None else self.branches(stored)
        kernels: tuple[Tensor, Tensor] = self.sharing(merged)
        return kernels

    def student(self, stored: Tensor) -> Tensor:
        """The student's kernel, cut when the teacher's was last computed.

        Args:
            stored: the trainable tensor, in case it has to be cut now.
        """
        if self._student is None:
            self(stored)
        assert self._student is not None
        return self._student

    def forget(self) -> None:
        """Drop the student's kernel, so that no graph outlives its step."""
        self._student = None

    def __getstate__(self) -> dict[str, Any]:
        # Copies are made of weights, not of a step's intermediate results.
        return {**self.__dict__, "_student": None}
