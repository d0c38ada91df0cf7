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
from gpd_cli.expansion.plan import Index, TensorPlan
from gpd_cli.expansion.tensors import Storage


class _Split(torch.autograd.Function):
    """Cut and scale in one node, in the fewest passes over the wide tensor.

    As separate operations, the slice's backward would fill a second wide gradient with zeros, and
    the scale would touch every element; here both touch the student's block alone.
    """

    @staticmethod
    def forward(
        ctx: Any, merged: Tensor, share: Tensor, block: tuple[Index, ...], mixed: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(share)
        ctx.block, ctx.mixed, ctx.shape = block, mixed, merged.shape
        ctx.set_materialize_grads(False)
        student = merged[block].contiguous()
        if mixed:
            teacher = merged.clone()
            teacher[block] = student * share
        else:
            teacher = merged * share
        return teacher, student

    @staticmethod
    def backward(ctx: Any, teacher: Tensor | None, student: Tensor | None) -> Any:
        (share,) = ctx.saved_tensors
        if teacher is None:
            if student is None:
                return None, None, None, None
            grad = student.new_zeros(ctx.shape)
            grad[ctx.block] = student
            return grad, None, None, None
        if ctx.mixed:
            grad = teacher.clone()
            grad[ctx.block] = grad[ctx.block] * share
        else:
            grad = teacher * share
        if student is not None:
            grad[ctx.block] += student
        return grad, None, None, None


def split_kernel(
    merged: Tensor, share: Tensor | None, block: tuple[Index, ...], storage: Storage = "mixed"
) -> tuple[Tensor, Tensor]:
    """Teacher's and student's kernel from one merged tensor.

    Args:
        merged: the wide tensor, branches merged, at its stored scale.
        share: 1/n(i), what turns the student's scale into the teacher's; broadcasts against the
            block for mixed storage, else against the whole; None where inputs are not copied.
        block: the index of the student's block.
        storage: what of the merged tensor is at the student's scale.

    Returns:
        The teacher's kernel, of the wide shape, and the student's, contiguous.
    """
    if share is None:
        return merged, merged[block].contiguous()
    teacher, student = _Split.apply(merged, share, block, storage == "mixed")
    return teacher, student


class SharedKernel(nn.Module):
    """The parametrization of a kernel that teacher and student share.

    Args:
        plan: how the tensor widens.
        storage: at what scale it is stored.
        branches: a module that merges extra branches into the stored tensor, or None.
        like: a tensor that gives device and dtype.
    """

    share: Tensor | None

    def __init__(
        self, plan: TensorPlan, storage: Storage, branches: BranchBank | None, like: Tensor
    ) -> None:
        super().__init__()
        self.block = plan.block
        self.storage = storage
        self.branches = branches
        copies = plan.copies(like) if storage == "mixed" else plan.wide_copies(like)
        # A constant of the plan, not state: it stays out of checkpoints.
        self.register_buffer("share", None if copies is None else 1 / copies, persistent=False)
        self._student: Tensor | None = None

    def forward(self, stored: Tensor) -> Tensor:
        """Merge the branches and return the teacher's kernel; keep the student's for `student`.

        Args:
            stored: the trainable tensor, of the wide shape.
        """
        merged = stored if self.branches is None else self.branches(stored)
        teacher, self._student = split_kernel(merged, self.share, self.block, self.storage)
        return teacher

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
