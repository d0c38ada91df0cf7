"""Build the dynamic teacher from a student and a plan."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

from gpd_cli.branches import BranchBank, accepts_branches
from gpd_cli.expansion.kernel import SharedKernel
from gpd_cli.expansion.pair import Pair
from gpd_cli.expansion.plan import TensorPlan, WidthPlan
from gpd_cli.expansion.tensors import Storage, expand_tensor


def widen_module(
    network: nn.Module,
    plan: WidthPlan,
    *,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> None:
    """Widen a network in place: attributes, parameters and buffers, at the teacher's scale.

    Modules are kept, with their hooks, ``eps``, momentum and class: only sizes change.

    Args:
        network: a copy of the student.
        plan: what to widen.
        noise: size of the zero-sum noise (see `expand_tensor`).
        generator: source of the noise.
    """
    for name, attributes in plan.attributes.items():
        module = network.get_submodule(name)
        for key, value in attributes.items():
            setattr(module, key, value)
    for name, tensor_plan in plan:
        owner, _, leaf = name.rpartition(".")
        module = network.get_submodule(owner)
        tensor = getattr(module, leaf)
        wide = expand_tensor(tensor, tensor_plan, noise=noise, generator=generator)
        if leaf in module._buffers:
            module._buffers[leaf] = wide
        else:
            module._parameters[leaf] = nn.Parameter(wide, tensor.requires_grad)


def build_pair(
    student: nn.Module,
    plan: WidthPlan,
    *,
    branches: Sequence[str] = (),
    noise: float = 0.0,
    storage: Storage = "mixed",
    generator: torch.Generator | None = None,
) -> Pair:
    """Grow the dynamic teacher out of a student and pair the two.

    Args:
        student: the network to expand; it is copied, not touched.
        plan: its width plan.
        branches: names of the extra branches that kernels of 3 x 3 and larger get.
        noise: size of the zero-sum noise (see `expand_tensor`).
        storage: at what scale shared kernels are stored.
        generator: source of noise and of the branches' initial weights.

    Returns:
        The pair, in train mode where the student is.
    """
    teacher = copy.deepcopy(student)
    widen_module(teacher, plan, noise=noise, generator=generator)
    narrow = dict(student.named_parameters(remove_duplicate=False))
    for name, module in list(teacher.named_modules()):
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            full = f"{name}.{leaf}" if name else leaf
            tensor_plan = plan.tensors.get(full)
            extra = branches if leaf == "weight" and accepts_branches(module) else ()
            if not extra and (tensor_plan is None or tensor_plan.divided is None):
                continue
            tensor_plan = tensor_plan or TensorPlan((None,) * parameter.ndim)
            with torch.no_grad():
                copies = tensor_plan.wide_copies(parameter)
                if storage == "student" and copies is not None:
                    parameter *= copies
                # The student's own numbers, not n * (s / n): they come back bit for bit.
                parameter[tensor_plan.block] = narrow[full]
            bank = None
            if extra:
                bank = BranchBank(
                    parameter.shape,
                    int(module.groups),
                    extra,
                    device=parameter.device,
                    dtype=parameter.dtype,
                    generator=generator,
                )
            kernel = SharedKernel(tensor_plan, storage, bank, parameter)
            parametrize.register_parametrization(module, leaf, kernel)
            kernel.forget()  # registering computes the kernel once
    return Pair(teacher, copy.deepcopy(student), plan).train(student.training)


def merged_teacher(pair: Pair) -> nn.Module:
    """A plain copy of the dynamic teacher, its branches merged: the student's class, but wide.

    Args:
        pair: student and dynamic teacher.
    """
    # Not a copy of the teacher with its parametrizations removed: copies share the class that
    # parametrization made for them, and removing it from one breaks the other.
    network = pair.extract()
    widen_module(network, pair.plan)
    tensors = [*network.named_parameters(), *network.named_buffers()]
    with torch.no_grad(), parametrize.cached():
        for name, tensor in tensors:
            owner, _, leaf = name.rpartition(".")
            tensor.copy_(getattr(pair.teacher.get_submodule(owner), leaf))
    pair.forget()
    return network
