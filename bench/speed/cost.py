"""The cost of a joint step by count: operations, bytes, and numbers sent between processes.

The parts of the step are those of the benchmark: plain steps of both networks (forward and
backward), merging (forward and backward), the optimizer, and the averaging of gradients over
processes. They are counted by running the networks themselves, see `bench.speed.operations`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.speed.case import Case
from bench.speed.measure import merge_all, precision
from bench.speed.operations import Operation, as_fake, count
from gpd_cli.branches import branch_names
from gpd_cli.models import create_model
from gpd_cli.teacher.build import build_pair, widen_module
from gpd_cli.teacher.kernel import SharedKernel
from gpd_cli.teacher.pair import Pair
from gpd_cli.training.reduction import average_merged_kernels
from gpd_cli.widening.plan import WidthPlan
from gpd_cli.widening.running.copying import copy_network
from gpd_cli.widening.search.find import find_plan

NUMBER = 4
"""Bytes of a weight, a gradient or a number of the optimizer's state, which are all in float32."""


@dataclass(frozen=True)
class Numbers:
    """Numbers of parameters, and of gradients that are sent between processes.

    Args:
        student: number of parameters of the student alone.
        wide: number of parameters of the wide network alone.
        pair: number of parameters of a pair, with branches; as many gradients are sent if the
            gradient of each parameter is averaged.
        merged_first: number of gradients that are sent if the gradients of merged kernels are
            averaged in place of those of main kernels and branches.
    """

    student: int
    wide: int
    pair: int
    merged_first: int


@dataclass(frozen=True)
class Cost:
    """The counts of a case.

    Args:
        student: operations of a plain step of the student, without optimizer.
        wide: operations of a plain step of the wide network, without optimizer.
        merging: operations of merging all branches, forward and backward.
        numbers: numbers of parameters, and of gradients that are sent between processes.
    """

    student: tuple[Operation, ...]
    wide: tuple[Operation, ...]
    merging: tuple[Operation, ...]
    numbers: Numbers


def optimizer_bytes(numbers: int) -> int:
    """The number of bytes that a fused step of SGD with momentum moves.

    Weight, gradient and momentum are read; weight and momentum are written.

    Args:
        numbers: number of trained parameters.
    """
    return 5 * NUMBER * numbers


def sent_bytes(numbers: int, processes: int) -> int:
    """The number of bytes that each process sends to average a gradient by a ring all-reduce.

    In the first half of the ring's steps, each process passes on partial sums, and in the second
    half the finished sums. In total it sends ``2 (W - 1) / W`` of the gradient (Patarasuk and Yuan,
    2009).

    Args:
        numbers: number of elements of the gradient, in float32.
        processes: number of processes, W.
    """
    return 2 * (processes - 1) * NUMBER * numbers // processes


def count_case(case: Case) -> Cost:
    """Count the operations in the parts of a case's joint step.

    Args:
        case: the case; even if it is compiled, operations are counted as separate ones.
    """
    torch.manual_seed(0)
    student = create_model(case.student)
    sample = torch.zeros(2, 3, case.size, case.size)
    with torch.no_grad():
        classes = copy_network(student).eval()(sample).shape[1]
    plan = find_plan(student, sample, case.ratio)
    student = student.to("meta").train()
    wide = copy_network(student)
    widen_module(wide, plan)
    # Tensors of indices that do not belong to a network may stay real ones.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    pair = _pair(student, plan, case)
    numbers = Numbers(
        *(sum(p.numel() for p in network.parameters()) for network in (student, wide, pair)),
        merged_first=merged_first(pair),
    )
    for network in (student, wide, pair):
        if case.channels_last:
            network.to(memory_format=torch.channels_last)
        as_fake(network, mode)

    def merging() -> None:
        with precision(case.precision, "cpu"):
            both = merge_all(pair)
        torch.autograd.backward(both, both)

    return Cost(
        *(_plain_step(network, case, classes, mode) for network in (student, wide)),
        tuple(count(mode, merging)),
        numbers,
    )


def merged_first(pair: Pair) -> int:
    """The number of gradients sent between processes if those of merged kernels are averaged.

    Args:
        pair: student and dynamic teacher, on any device including meta. The pair is changed: as in
            a joint run of several processes, its kernels average their gradients from now on.
    """
    averaged = set(average_merged_kernels(pair))
    others = [p.numel() for name, p in pair.named_parameters() if name not in averaged]
    kernels = [
        found.original.numel()
        for module in pair.teacher.modules()
        for found in getattr(module, "parametrizations", {}).values()
        if isinstance(found[-1], SharedKernel) and found[-1].averages_gradient
    ]
    return sum(others) + sum(kernels)


def _pair(student: nn.Module, plan: WidthPlan, case: Case) -> Pair:
    return build_pair(
        student, plan, branches=branch_names(case.branches), branch_width=case.branch_width
    ).train()


def _plain_step(
    network: nn.Module, case: Case, classes: int, mode: FakeTensorMode
) -> tuple[Operation, ...]:
    with mode:
        images = torch.empty(case.batch, 3, case.size, case.size)
        labels = torch.empty(case.batch, dtype=torch.long)
        if case.channels_last:
            images = images.to(memory_format=torch.channels_last)

    def step() -> None:
        with precision(case.precision, "cpu"):
            loss: Tensor = F.cross_entropy(network(images), labels)
        loss.backward()

    return tuple(count(mode, step))
