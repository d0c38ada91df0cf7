"""One stored tensor, two kernels: the teacher's, and the student's block of it.

`SharedKernel` is a parametrization (`torch.nn.utils.parametrize`): what is stored goes through the
branches, once, and comes out as the kernel that the teacher's layer runs with; the student's
kernel is cut from the same merged tensor on the way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gpd_cli.expansion.plan import Index, TensorPlan
from gpd_cli.expansion.tensors import Storage, storage_scale


class _Split(torch.autograd.Function):
    """``merged -> (merged * scale, merged[block])`` in the fewest passes over the wide tensor.

    As separate operations, the slice's backward would fill and add a second wide gradient; here
    the student's gradient is added to its block alone.
    """

    @staticmethod
    def forward(
        ctx: Any, merged: Tensor, scale: Tensor, block: tuple[Index, ...]
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(scale)
        ctx.block = block
        ctx.set_materialize_grads(False)
        return merged * scale, merged[block].contiguous()

    @staticmethod
    def backward(ctx: Any, teacher: Tensor | None, student: Tensor | None) -> Any:
        (scale,) = ctx.saved_tensors
        if teacher is None and student is None:
            return None, None, None
        if teacher is None:
            assert student is not None
            sizes = _wide_sizes(scale, student)
            grad = student.new_zeros(sizes)
        else:
            grad = teacher * scale
        if student is not None:
            grad[ctx.block] += student
        return grad, None, None


def _wide_sizes(scale: Tensor, student: Tensor) -> list[int]:
    return [w if w > 1 else s for w, s in zip(scale.shape, student.shape, strict=True)]


def split_kernel(
    merged: Tensor, scale: Tensor | None, block: tuple[Index, ...]
) -> tuple[Tensor, Tensor]:
    """Teacher's kernel and student's block of one merged tensor.

    Args:
        merged: the wide tensor, branches merged, at its stored scale.
        scale: what turns it into the teacher's kernel (broadcasts against it); None for 1.
        block: the index of the student's block.

    Returns:
        ``merged * scale`` and a contiguous ``merged[block]``.
    """
    if scale is None:
        return merged, merged[block].contiguous()
    teacher, student = _Split.apply(merged, scale, block)
    return teacher, student


class SharedKernel(nn.Module):
    """The parametrization of a kernel that teacher and student share.

    Args:
        plan: how the tensor widens.
        storage: at what scale it is stored.
        branches: a module that merges extra branches into the stored tensor, or None.
        like: a tensor that gives device and dtype.
    """

    scale: Tensor | None
    gain: Tensor | None

    def __init__(
        self, plan: TensorPlan, storage: Storage, branches: nn.Module | None, like: Tensor
    ) -> None:
        super().__init__()
        self.block = plan.block
        self.branches = branches
        scale = storage_scale(plan, storage)
        gain = plan.gain(dtype=like.dtype) if storage == "teacher" else None
        # Constants of the plan, not state: they stay out of checkpoints.
        self.register_buffer("scale", None if scale is None else scale.to(like), persistent=False)
        self.register_buffer("gain", None if gain is None else gain.to(like), persistent=False)
        self._student: Tensor | None = None

    def forward(self, stored: Tensor) -> Tensor:
        """Merge the branches and return the teacher's kernel; keep the student's for `take`.

        Args:
            stored: the trainable tensor, of the wide shape.
        """
        merged = stored if self.branches is None else self.branches(stored)
        teacher, student = split_kernel(merged, self.scale, self.block)
        self._student = student if self.gain is None else student * self.gain
        return teacher

    def student(self) -> Tensor:
        """The student's kernel, cut when the teacher's was last computed."""
        if self._student is None:
            raise RuntimeError("the teacher's kernel has to be computed first")
        return self._student

    def forget(self) -> None:
        """Drop the student's kernel, so that no graph outlives its step."""
        self._student = None
