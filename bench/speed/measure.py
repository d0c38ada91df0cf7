"""Measurement of time and memory of a joint step, against plain training steps of its networks.

The floor of a joint step is the cost of its two networks apart: a plain step of the student plus a
plain step of the merged teacher. The three steps take turns in one process, so that other work of
the machine affects all of them alike. Median times and the median of the ratios are reported.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.speed.case import Case
from bench.speed.machine import clock_of
from bench.speed.memory import forget_peak, peak
from gpd_cli import expand
from gpd_cli.distill.objective import Objective
from gpd_cli.models import create_model
from gpd_cli.teacher.build import merged_teacher
from gpd_cli.teacher.grad_checkpointing import switch_on_grad_checkpointing
from gpd_cli.teacher.kernel import SharedKernel
from gpd_cli.teacher.pair import Pair
from gpd_cli.training.optimizers import OptimizerSettings, make_optimizer
from gpd_cli.training.subnormals import flushed_subnormals

WARM_UP = 2  # number of turns that are not counted

Step = Callable[[], None]


@flushed_subnormals()  # as the command gpd does
def measure(case: Case, device: str, rounds: int) -> dict[str, float]:
    """Time the steps of a case.

    Args:
        case: the case.
        device: ``cpu`` or ``cuda``.
        rounds: number of turns that count.

    Returns:
        Medians: milliseconds of the steps ``student``, ``wide`` and ``joint``; ``ratio``, the joint
        step over the floor; ``images``, the images per second of the joint step; and ``merging``,
        the fraction of the joint step that merging takes, forward and backward. A compiled case has
        no ``merging``, since merging is no separate part of a compiled step.
    """
    names = ("student", "wide", "joint", *(() if case.compile else ("merging",)))
    steps = make_steps(case, device, names)
    times = take_turns(steps, device, rounds)
    median = {name: 1000 * statistics.median(values) for name, values in times.items()}
    apart = zip(times["joint"], times["student"], times["wide"], strict=True)
    figures = {
        **{name: median[name] for name in ("student", "wide", "joint")},
        "ratio": statistics.median(joint / (student + wide) for joint, student, wide in apart),
        "images": 1000 * case.batch / median["joint"],
    }
    if "merging" in times:
        shares = zip(times["merging"], times["joint"], strict=True)
        figures["merging"] = statistics.median(merging / joint for merging, joint in shares)
    return figures


def take_turns(steps: Mapping[str, Step], device: str, rounds: int) -> dict[str, list[float]]:
    """Time several steps that take turns.

    Args:
        steps: the steps, by name.
        device: ``cpu`` or ``cuda``.
        rounds: number of turns that count.

    Returns:
        By name of the step, its time in each turn, in seconds of `bench.speed.machine.clock_of`.
    """
    clock = clock_of(device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + WARM_UP):
        for name, step in steps.items():
            start = clock()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= WARM_UP:
                times[name].append(clock() - start)
    return times


@flushed_subnormals()
def peak_of_step(case: Case, device: str, name: str) -> float:
    """Peak memory of a few steps in MiB, above the memory of the process before.

    Memory that is needed only to build the networks does not count.

    Args:
        case: the case.
        device: ``cpu`` or ``cuda``.
        name: name of the step, ``wide`` or ``joint``.
    """
    where = torch.device(device)
    forget_peak(where)
    before = 0 if device == "cuda" else peak(where)
    step = make_steps(case, device, (name,))[name]
    step()
    gc.collect()
    forget_peak(where)
    for _ in range(WARM_UP):
        step()
    return (peak(where) - before) / 2**20


def make_steps(
    case: Case, device: str, names: tuple[str, ...] = ("student", "wide", "joint", "merging")
) -> dict[str, Step]:
    """Make the steps that are timed.

    Args:
        case: the case.
        device: ``cpu`` or ``cuda``.
        names: names of the steps to make; networks that no step needs are freed.

    Returns:
        The steps by name: functions without arguments that run one step each.
    """
    torch.manual_seed(0)
    student = create_model(case.student)
    if case.saving == "grad_checkpointing":
        switch_on_grad_checkpointing(student, case.student)
    sample = torch.zeros(2, 3, case.size, case.size)
    pair = expand(
        student,
        ratio=case.ratio,
        branches=case.branches,
        branch_width=case.branch_width,
        sample=sample,
    )
    images = torch.randn(case.batch, 3, case.size, case.size, device=device)
    if case.channels_last:
        images = images.to(memory_format=torch.channels_last)
    with torch.no_grad():
        classes = pair.student(sample).shape[1]
    labels = torch.randint(0, classes, (case.batch,), device=device)
    objective = Objective()
    losses = torch.compile(objective.losses) if case.compile else objective.losses

    def joint(network: nn.Module) -> Tensor:
        narrow, teacher = network(images)
        terms = objective.weighted(losses(narrow, teacher, labels))
        return torch.stack(list(terms.values())).sum()

    def plain(network: nn.Module) -> Tensor:
        return F.cross_entropy(network(images), labels)

    made: dict[str, Step] = {}
    wide = merged_teacher(pair) if "wide" in names else None
    if "student" in names:
        made["student"] = _training_step(student, plain, case, device)
    if wide is not None:
        made["wide"] = _training_step(wide, plain, case, device)
    pair.recompute_student = case.saving == "recompute_student"
    if "joint" in names:
        made["joint"] = _training_step(pair, joint, case, device)
    if "merging" in names:
        made["merging"] = _merging_step(pair.to(device), case, device)
    return made


def _training_step(
    network: nn.Module, loss: Callable[[nn.Module], Tensor], case: Case, device: str
) -> Step:
    network = network.to(device).train()
    if case.channels_last:
        network = network.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(network, OptimizerSettings(lr=0.01), set(), fused=True)
    run = torch.compile(network) if case.compile else network

    def step() -> None:
        optimizer.zero_grad()
        with precision(case.precision, device):
            value = loss(run)
        value.backward()
        optimizer.step()

    return step


def _merging_step(pair: Pair, case: Case, device: str) -> Step:
    def step() -> None:
        pair.zero_grad()  # adding to existing gradients would not be part of merging
        with precision(case.precision, device):
            both = merge_all(pair)
        torch.autograd.backward(both, both)

    return step


def merge_all(pair: Pair) -> list[Tensor]:
    """Merge the branches of all layers, as a joint step does.

    Args:
        pair: student and dynamic teacher.

    Returns:
        The kernels of both networks, through which gradients flow to main kernels and branches.
    """
    return [
        kernel
        for module in pair.teacher.modules()
        for found in getattr(module, "parametrizations", {}).values()
        if isinstance(found[-1], SharedKernel)
        for kernel in found[-1].both_kernels(found.original)
    ]


def precision(name: str, device: str) -> contextlib.AbstractContextManager[object]:
    """The context that sets the precision in which a network runs.

    Args:
        name: ``32``, or ``bf16`` for autocast to bfloat16.
        device: ``cpu`` or ``cuda``.
    """
    if name == "32":
        return contextlib.nullcontext()
    return torch.autocast(device, torch.bfloat16)
