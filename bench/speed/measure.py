"""Times and memory of a joint step, against plain training steps of both its networks.

The floor of a joint step is what its two networks cost apart: a plain step of the student and one
of the merged teacher. All three steps take turns in one process, so that whatever else the machine
does meets all of them; medians and the median of the ratios are reported.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.speed.case import Case
from gpd_cli import expand
from gpd_cli.distill.objective import Objective
from gpd_cli.models import create_model
from gpd_cli.teacher.build import merged_teacher
from gpd_cli.teacher.kernel import SharedKernel
from gpd_cli.teacher.pair import Pair
from gpd_cli.training.optimizers import OptimizerSettings, make_optimizer
from gpd_cli.training.subnormals import flushed_subnormals
from gpd_cli.training.telemetry import peak_memory as most_so_far

WARM_UP = 2  # steps that are not counted

Step = Callable[[], None]


@flushed_subnormals()  # as the command does
def measure(case: Case, device: str, rounds: int) -> dict[str, float]:
    """Time a case.

    Args:
        case: what to time.
        device: ``cpu`` or ``cuda``.
        rounds: steps that count.

    Returns:
        Medians: milliseconds of ``student``, ``wide`` and ``joint``; ``ratio`` of the joint step to
        the floor; ``merging``, the share of the joint step that merging takes, forward and
        backward; ``images`` per second of the joint step.
    """
    steps = make_steps(case, device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + WARM_UP):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= WARM_UP:
                times[name].append(time.perf_counter() - start)
    median = {name: 1000 * statistics.median(values) for name, values in times.items()}
    apart = zip(times["joint"], times["student"], times["wide"], strict=True)
    shares = zip(times["merging"], times["joint"], strict=True)
    return {
        **{name: median[name] for name in ("student", "wide", "joint")},
        "ratio": statistics.median(joint / (student + wide) for joint, student, wide in apart),
        "merging": statistics.median(merging / joint for merging, joint in shares),
        "images": 1000 * case.batch / median["joint"],
    }


@flushed_subnormals()
def peak_memory(case: Case, device: str, name: str) -> float:
    """Peak memory of a few steps, in MiB, above that of the process before.

    On the CPU it is the peak of the whole process, which only a fresh process tells.

    Args:
        case: what to measure.
        device: ``cpu`` or ``cuda``.
        name: ``wide`` or ``joint``.
    """
    where = torch.device(device)
    before = 0 if device == "cuda" else most_so_far(where)
    step = make_steps(case, device, (name,))[name]
    step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP):
        step()
    return (most_so_far(where) - before) / 2**20


def make_steps(
    case: Case, device: str, names: tuple[str, ...] = ("student", "wide", "joint", "merging")
) -> dict[str, Step]:
    """The steps that are timed, by name.

    Args:
        case: what to time.
        device: ``cpu`` or ``cuda``.
        names: which steps to make; the networks of all others are let go.
    """
    torch.manual_seed(0)
    student = create_model(case.student)
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

    def joint(network: nn.Module) -> Tensor:
        narrow, teacher = network(images)
        return torch.stack(list(objective.terms(narrow, teacher, labels).values())).sum()

    def plain(network: nn.Module) -> Tensor:
        return F.cross_entropy(network(images), labels)

    made: dict[str, Step] = {}
    wide = merged_teacher(pair) if "wide" in names else None
    if "student" in names:
        made["student"] = _training_step(student, plain, case, device)
    if wide is not None:
        made["wide"] = _training_step(wide, plain, case, device)
    if "joint" in names:
        made["joint"] = _training_step(pair, joint, case, device)
    if "merging" in names:
        made["merging"] = _merging_step(pair.to(device))
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
        with _precision(case, device):
            value = loss(run)
        value.backward()
        optimizer.step()

    return step


def _merging_step(pair: Pair) -> Step:
    """Merge all kernels and take the gradients of all branches, as a joint step does."""
    kernels = [
        (parametrizations[-1], parametrizations.original)
        for module in pair.teacher.modules()
        for parametrizations in getattr(module, "parametrizations", {}).values()
        if isinstance(parametrizations[-1], SharedKernel)
    ]

    def step() -> None:
        both = [kernel for shared, stored in kernels for kernel in shared.both_kernels(stored)]
        torch.autograd.backward(both, both)
        pair.zero_grad()

    return step


def _precision(case: Case, device: str) -> contextlib.AbstractContextManager[object]:
    if case.precision == "32":
        return contextlib.nullcontext()
    return torch.autocast(device, torch.bfloat16)
