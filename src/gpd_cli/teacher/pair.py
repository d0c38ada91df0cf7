"""Student and dynamic teacher as one module, in which each shared weight exists only once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gpd_cli.teacher.certificate import Certificate
from gpd_cli.teacher.grad_checkpointing import FirstRunBuffers
from gpd_cli.teacher.kernel import SharedKernel
from gpd_cli.teacher.student_recomputation import recomputed
from gpd_cli.teacher.with_weights import with_weights
from gpd_cli.widening.plan import WidthPlan
from gpd_cli.widening.running.copying import copy_network
from gpd_cli.widening.running.refresh import refresh


class Pair(nn.Module):
    """A dynamic teacher that owns every trainable weight, and the student sliced out of it.

    The teacher is an ordinary module. The student is a module of the user's own class whose
    parameters are taken away: it runs on slices of the teacher's merged kernels (channel-branch
    reparameterization, Guo et al. 2025, section 3.3), but keeps its own buffers (running
    statistics). Calling the pair returns the logits of both networks and merges the branches of
    each layer only once.

    Args:
        teacher: the wide network, whose kernels are parametrized by `SharedKernel`.
        student: the narrow network, which this pair takes over; its parameters are removed.
        plan: the student's width plan.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, plan: WidthPlan) -> None:
        super().__init__()
        self.certificate: Certificate | None = None  # set by `expand`
        # Whether the backward pass computes the student's activations again, to save memory.
        self.recompute_student = False
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
        """Compute the logits of both networks.

        Args:
            images: a batch, ``[B, C, H, W]``.

        Returns:
            The student's and the dynamic teacher's logits, each ``[B, classes]``.
        """
        if self.plan.runs_again and torch.is_grad_enabled():
            return self._forward_with_grad_checkpointing(images)
        with self._merged_once():
            weights = self._weights_of_step()
            if self.recompute_student and torch.is_grad_enabled():
                # The student runs first, so that the backward pass goes through the teacher first.
                student = recomputed(self.narrow, weights, images)
                return student, self.teacher(images)
            teacher = self.teacher(images)
            student = with_weights(self.narrow, weights, images)
        return student, teacher

    def _forward_with_grad_checkpointing(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the result of `forward`, and hold all weights until the backward pass ends.

        This is for networks with gradient checkpointing, which run parts of themselves again in
        the backward pass and then need the same weights.
        """
        for name, weight in self._weights().items():
            owner, leaf = self._owner(name)
            owner.__dict__[leaf] = weight
        self._merge_kernels()
        buffers = FirstRunBuffers(self)
        with buffers.recorded():
            # The teacher runs first, as in other runs, so that random draws have the same order.
            teacher = self.teacher(images)
            logits = self.narrow(images), teacher
        buffers.prepare_backward(logits, self.forget)
        return logits

    def _weights_of_step(self) -> dict[str, Tensor]:
        """The student's weights by name; after it, all kernels of the teacher are merged as well.

        Compiled networks need this, since merging has to happen outside of them.
        """
        return self._weights()  # which merges the kernels for both networks

    def _merge_kernels(self) -> None:
        """Merge all kernels of the teacher, which are then cached, or held by `SharedKernel`."""
        for module in self.teacher.modules():
            for leaf in getattr(module, "parametrizations", {}):
                getattr(module, leaf)

    def student(self, images: Tensor) -> Tensor:
        """The student's logits alone, ``[B, classes]``."""
        return self.student_with(self.student_weights(), images)

    def student_weights(self) -> dict[str, Tensor]:
        """The student's weights by name: slices of the teacher's merged weights."""
        weights = self._weights()
        self.forget()
        return weights

    def student_with(self, weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """Run the student on weights that were merged and sliced before.

        Args:
            weights: the student's weights by name, from `student_weights`.
            images: a batch, ``[B, C, H, W]``.

        Returns:
            The student's logits, ``[B, classes]``.
        """
        return with_weights(self.narrow, weights, images)

    def extract(self) -> nn.Module:
        """Extract the student: a new plain module of the user's own class, with copied weights.

        Its output equals the output of the method `student` bit for bit.
        """
        with torch.inference_mode(False), torch.no_grad():
            weights = self._weights()
            self.forget()
            return self._plain(weights)

    def outline(self) -> nn.Module:
        """A copy of the student with the right modules and shapes, but not the trained function.

        Its weights are slices of the main kernels without their branches, since merging takes
        time. Use `extract` for the trained student.
        """
        with torch.inference_mode(False), torch.no_grad():
            names = {name for name, first in self._tied.items() if name == first}
            return self._plain({name: self._weight(name, merged=False) for name in names})

    def _plain(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """A copy of the student's module with given weights.

        Args:
            weights: the student's weights, each by the first of its names (see `tied_names`).
        """
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
        # A run of the teacher alone leaves slices behind, of weights that may have changed since.
        self.forget()
        # Inference tensors are avoided, since torch may choose other arithmetic for them.
        # Compiled code cannot ask for the inference mode, and never runs in it.
        inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
        grad = torch.is_grad_enabled() and not inference
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            weights = {n: self._weight(n) for n, first in self._tied.items() if n == first}
            if not grad:
                # Torch's choice of arithmetic depends on requires_grad, too, so it is kept.
                for name, weight in weights.items():
                    weights[name] = weight.detach().requires_grad_(self._requires_grad[name])
        return {name: weights[first] for name, first in self._tied.items()}

    def _weight(self, name: str, merged: bool = True) -> Tensor:
        """One weight of the student, with its branches merged or left out.

        Args:
            name: the weight's qualified name in the student.
            merged: whether the branches are merged.
        """
        owner, _, leaf = name.rpartition(".")
        module = self.teacher.get_submodule(owner)
        if parametrize.is_parametrized(module, leaf):
            kernel = module.parametrizations[leaf][-1]  # type: ignore[index]
            assert isinstance(kernel, SharedKernel)
            stored = cast(Tensor, module.parametrizations[leaf].original)  # type: ignore[index, union-attr]
            if not merged:
                return kernel.sharing.student(stored)
            if kernel.needs_merging:
                getattr(module, leaf)  # merges the kernel for both networks, unless it is cached
            return kernel.student(stored)
        weight = cast(Tensor, getattr(module, leaf))
        if name in self.plan.tensors:
            # Contiguous, as the extracted student's weights are, so that torch computes with both
            # in the same way.
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
        """Drop the merged kernels and the slices of a step, so that no graph outlives the step.

        `forward` and the methods that slice the student's weights call this first.
        """
        for module in self.teacher.modules():
            if isinstance(module, SharedKernel):
                module.forget()
        if self.plan.runs_again:
            for name in self._tied:
                owner, leaf = self._owner(name)
                owner.__dict__.pop(leaf, None)

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        """The student's module that has a weight, and the weight's name in that module."""
        owner, _, leaf = name.rpartition(".")
        return self.narrow.get_submodule(owner), leaf


def tied_names(network: nn.Module) -> dict[str, str]:
    """Map every name of each parameter to the first name of the same parameter.

    The two differ only for tied weights, which have several names. A module that is registered
    under several names counts once.

    Args:
        network: the network.
    """
    first: dict[int, str] = {}
    return {
        f"{module_name}.{name}" if module_name else name: first.setdefault(
            id(parameter), f"{module_name}.{name}" if module_name else name
        )
        for module_name, module in network.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    }
