"""Student and dynamic teacher as one module that owns every weight once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from gpd_cli.teacher.certificate import Certificate
from gpd_cli.teacher.kernel import SharedKernel
from gpd_cli.teacher.recomputing import recomputed
from gpd_cli.teacher.running_again import FirstRun
from gpd_cli.widening.plan import WidthPlan
from gpd_cli.widening.running.copying import copy_network
from gpd_cli.widening.running.refresh import refresh


class Pair(nn.Module):
    """A dynamic teacher that owns every trainable weight, and the student sliced out of it.

    The teacher is an ordinary module. The student is a module of the user's own class whose
    parameters are taken away; it runs on slices of the teacher's merged kernels (channel-branch
    reparameterization, Guo et al. 2025, section 3.3) and keeps buffers (running statistics) of
    its own. Call the pair for both networks' logits: the branches are then merged once.

    Args:
        teacher: the wide network, kernels parametrized by `SharedKernel`.
        student: the narrow network, which this pair takes over; its parameters are removed.
        plan: the student's width plan.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, plan: WidthPlan) -> None:
        super().__init__()
        self.certificate: Certificate | None = None  # of the expansion, see `expand`
        self.recompute_student = False  # whether `forward` keeps no activations of the student
        self.training = student.training
        self.teacher = teacher
        self.narrow = student
        self.plan = plan
        for module in teacher.modules():
            if isinstance(module, SharedKernel):
                module.holds = plan.runs_again
        self._tied = tied_names(student)
        self._requires_grad = {n: student.get_parameter(n).requires_grad for n in self._tied}
        for name in self._tied:
            owner, leaf = self._owner(name)
            owner._parameters[leaf] = None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Both networks' logits.

        Args:
            images: a batch, ``[B, C, H, W]``.

        Returns:
            The student's and the dynamic teacher's logits, each ``[B, classes]``.
        """
        if self.plan.runs_again and torch.is_grad_enabled():
            return self._forward_that_runs_again(images)
        with self._merged_once():
            weights = self._weights()
            if self.recompute_student and torch.is_grad_enabled():
                # Before the teacher: the backward pass then meets the teacher first.
                student = recomputed(self.narrow, weights, images)
                return student, self.teacher(images)
            teacher = self.teacher(images)
            student = functional_call(self.narrow, weights, (images,))
        return student, teacher

    def _forward_that_runs_again(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The result of `forward`, with all weights in place until the backward pass has ended."""
        for name, weight in self._weights().items():
            owner, leaf = self._owner(name)
            owner.__dict__[leaf] = weight
        for module in self.teacher.modules():  # each kernel is merged before a part runs, and held
            for leaf in getattr(module, "parametrizations", {}):
                getattr(module, leaf)
        first_run = FirstRun(self)
        with first_run.recorded():
            teacher = self.teacher(images)  # first, as in other runs: random draws have an order
            logits = self.narrow(images), teacher
        first_run.prepare_backward(logits, self.forget)
        return logits

    def one_by_one(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The result of `forward` with less memory: each kernel is merged when a layer needs it."""
        student, teacher = self.student(images), self.teacher(images)
        self.forget()
        return student, teacher

    def student(self, images: Tensor) -> Tensor:
        """The student's logits alone, ``[B, classes]``."""
        return self.student_with(self.student_weights(), images)

    def student_weights(self) -> dict[str, Tensor]:
        """The student's weights by name: slices of the teacher's merged weights."""
        weights = self._weights()
        self.forget()
        return weights

    def student_with(self, weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """The logits of the student's code alone, which merges and slices nothing.

        Args:
            weights: the output of `student_weights`.
            images: a batch, ``[B, C, H, W]``.
        """
        return cast(Tensor, functional_call(self.narrow, dict(weights), (images,)))

    def extract(self) -> nn.Module:
        """Extract the student: a new plain module of the user's own class, weights copied.

        The module's output equals the output of `student` bit for bit.
        """
        with torch.inference_mode(False), torch.no_grad():
            weights = self._weights()
            self.forget()
            return self._plain(weights)

    def outline(self) -> nn.Module:
        """The student as `extract` gives it, but without its branches, which take time to merge.

        It answers questions on modules and shapes; its output is another one.
        """
        with torch.inference_mode(False), torch.no_grad():
            names = {name for name, first in self._tied.items() if name == first}
            return self._plain({name: self._weight(name, merged=False) for name in names})

    def _plain(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """A copy of the student's module with copies of weights, by their first names."""
        refresh(self.narrow)
        student = copy_network(self.narrow)
        copies = {
            name: nn.Parameter(weights[name].detach().clone(), self._requires_grad[name])
            for name, first in self._tied.items()
            if name == first
        }
        for name, first in self._tied.items():
            owner, _, leaf = name.rpartition(".")
            student.get_submodule(owner)._parameters[leaf] = copies[first]
        return student

    def _weights(self) -> dict[str, Tensor]:
        """The student's weights by name: slices of the teacher's merged weights."""
        self.forget()  # a run of the teacher alone leaves slices, of weights that may have changed
        # No inference tensors: torch may choose other arithmetic for them.
        # Compiled code has no inference mode, and cannot ask for it.
        inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
        grad = torch.is_grad_enabled() and not inference
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            weights = {n: self._weight(n) for n, first in self._tied.items() if n == first}
            if not grad:
                # Torch chooses the arithmetic of products by requires_grad, among others.
                for name, weight in weights.items():
                    weights[name] = weight.detach().requires_grad_(self._requires_grad[name])
        return {name: weights[first] for name, first in self._tied.items()}

    def _weight(self, name: str, merged: bool = True) -> Tensor:
        """The student's weight of a name, with its branches or without."""
        owner, _, leaf = name.rpartition(".")
        module = self.teacher.get_submodule(owner)
        if parametrize.is_parametrized(module, leaf):
            kernel = module.parametrizations[leaf][-1]  # type: ignore[index]
            assert isinstance(kernel, SharedKernel)
            stored = cast(Tensor, module.parametrizations[leaf].original)  # type: ignore[index, union-attr]
            if not merged:
                return kernel.sharing.student(stored)
            if kernel.needs_merging:
                getattr(module, leaf)  # merges for both networks, unless it is cached
            return kernel.student(stored)
        weight = cast(Tensor, getattr(module, leaf))
        if name in self.plan.tensors:
            # Contiguous, as extracted weights are, so that both run the same arithmetic.
            weight = weight[self.plan.tensors[name].first_copies].contiguous()
        return weight

    @contextmanager
    def _merged_once(self) -> Iterator[None]:
        with parametrize.cached():
            try:
                yield
            finally:
                self.forget()

    def forget(self) -> None:
        """Drop the kernels of a step, so that no graph outlives it.

        Runs of the pair begin with it.
        """
        for module in self.teacher.modules():
            if isinstance(module, SharedKernel):
                module.forget()
        if self.plan.runs_again:
            for name in self._tied:
                owner, leaf = self._owner(name)
                owner.__dict__.pop(leaf, None)

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        """The student's module that a weight belongs to, and the weight's name there."""
        owner, _, leaf = name.rpartition(".")
        return self.narrow.get_submodule(owner), leaf


def tied_names(network: nn.Module) -> dict[str, str]:
    """The first name of each parameter, by each of its names; they differ for tied weights.

    A module under several names counts once.
    """
    first: dict[int, str] = {}
    return {
        f"{module_name}.{name}" if module_name else name: first.setdefault(
            id(parameter), f"{module_name}.{name}" if module_name else name
        )
        for module_name, module in network.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    }
