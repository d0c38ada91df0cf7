"""Student and dynamic teacher as one module that owns every weight once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from gpd_cli.expansion.kernel import SharedKernel
from gpd_cli.expansion.plan import TensorPlan, WidthPlan


class Pair(nn.Module):
    """A dynamic teacher that owns every trainable weight, and the student that is cut out of it.

    The teacher is an ordinary module. The student is a module of the user's own class whose
    parameters are taken away; it runs on slices of the teacher's merged kernels (channel-branch
    reparameterization, Guo et al. 2025, section 3.3) and keeps buffers (running statistics) of
    its own. Call the pair for both networks' logits: the branches are then merged once.

    Args:
        teacher: the wide network, kernels parametrized by `SharedKernel`.
        student: the narrow network, which this pair takes over; its parameters are removed.
        plan: how the one becomes the other.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, plan: WidthPlan) -> None:
        super().__init__()
        self.teacher = teacher
        self.narrow = student
        self.plan = plan
        self._requires_grad = {name: p.requires_grad for name, p in student.named_parameters()}
        # Tied parameters are one tensor under several names: all of them have to go.
        self._names = tuple(n for n, _ in student.named_parameters(remove_duplicate=False))
        for name in self._names:
            owner, _, leaf = name.rpartition(".")
            student.get_submodule(owner)._parameters[leaf] = None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Both networks' logits.

        Args:
            images: a batch, ``[B, C, H, W]``.

        Returns:
            The student's and the dynamic teacher's logits, each ``[B, classes]``.
        """
        with self._merged_once():
            teacher = self.teacher(images)
            student = functional_call(self.narrow, self._weights(), (images,))
        return student, teacher

    def student(self, images: Tensor) -> Tensor:
        """The student's logits alone, ``[B, classes]``."""
        with self._merged_once():
            return cast(Tensor, functional_call(self.narrow, self._weights(), (images,)))

    def extract(self) -> nn.Module:
        """Cut the student out: a new plain module of the user's own class, weights copied.

        Its output equals that of `student` bit for bit.
        """
        student = copy.deepcopy(self.narrow)
        with torch.no_grad(), self._merged_once():
            for name, weight in self._weights().items():
                owner, _, leaf = name.rpartition(".")
                parameter = nn.Parameter(
                    weight.detach().clone(), self._requires_grad.get(name, True)
                )
                student.get_submodule(owner)._parameters[leaf] = parameter
        return student.train(self.training)

    def _weights(self) -> dict[str, Tensor]:
        """The student's weights by name: slices of what the teacher runs with."""
        return {name: self._weight(name) for name in self._names}

    def _weight(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        module = self.teacher.get_submodule(owner)
        weight = cast(Tensor, getattr(module, leaf))  # merges, or finds it merged
        if parametrize.is_parametrized(module, leaf):
            kernel = module.parametrizations[leaf][-1]  # type: ignore[index]
            if isinstance(kernel, SharedKernel):
                return kernel.student()
        plan = self.plan.tensors.get(name)
        return weight if plan is None else _block(weight, plan)

    @contextmanager
    def _merged_once(self) -> Iterator[None]:
        with parametrize.cached():
            try:
                yield
            finally:
                self.forget()

    def forget(self) -> None:
        """Drop kernels that were cut for the student, so that no graph outlives its step."""
        for module in self.teacher.modules():
            if isinstance(module, SharedKernel):
                module.forget()


def _block(weight: Tensor, plan: TensorPlan) -> Tensor:
    # Contiguous, as extracted weights are: then both run the same arithmetic.
    return weight[plan.block].contiguous()
