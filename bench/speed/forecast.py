"""The time of a joint step from its counts, on a machine or on many GPUs."""

from __future__ import annotations

from dataclasses import dataclass

from bench.speed.case import Case
from bench.speed.cost import Cost, count_case, optimizer_bytes, sent_bytes
from bench.speed.machine import Machine

PROCESSES = (8, 64)
"""Numbers of GPUs that the table has."""


@dataclass(frozen=True)
class Cluster:
    """GPUs, and how they are connected.

    Args:
        machine: rates of one GPU.
        inside: bytes per second that a GPU sends to others in its node.
        between: bytes per second that it sends to another node.
        node: GPUs in a node.
    """

    machine: Machine
    inside: float
    between: float
    node: int = 8

    def all_reduce(self, numbers: int, processes: int) -> float:
        """Seconds to average a gradient over all GPUs.

        Sums are scattered inside each node, each GPU's share is averaged between nodes, and the
        averages are gathered inside the nodes; the three follow one another.

        Args:
            numbers: of the gradient.
            processes: GPUs that train together.
        """
        local = min(self.node, processes)
        share, nodes = numbers // local, processes // local
        return sent_bytes(numbers, local) / self.inside + sent_bytes(share, nodes) / self.between


PRODUCTS, MOVES = 0.4, 0.7
"""Shares of the peak that are assumed for products, and for memory and connections."""

H100 = Cluster(
    Machine(flops=PRODUCTS * 67e12, low_flops=PRODUCTS * 989e12, bandwidth=MOVES * 3.35e12),
    inside=MOVES * 450e9,
    between=MOVES * 50e9,
)
"""NVIDIA's H100 SXM, eight to a node.

Peaks by its data sheet: 989 TFLOP/s in bfloat16 (without sparsity), 67 in float32, 3.35 TB/s of
memory, NVLink of 900 GB/s, half in each direction. Between nodes one adapter of 400 Gb/s for each
GPU, as in NVIDIA's DGX H100.
"""


def computed_cases() -> list[Case]:
    """The rows of the computed table."""
    return [
        Case(student, 224, 256, branches, precision="bf16", channels_last=True)
        for student in ("resnet18", "resnet50")
        for branches in (1, 6)
    ]


def predict(cost: Cost, machine: Machine) -> dict[str, float]:
    """Times of a case's steps in one process.

    Args:
        cost: the case's counts.
        machine: what it runs on.

    Returns:
        Milliseconds of ``student``, ``wide``, ``merging`` and ``joint``, as the benchmark measures
        them: steps with their optimizers; ``ratio`` of the joint step to the floor.
    """
    numbers = cost.numbers
    networks = [machine.seconds(operations) for operations in (cost.student, cost.wide)]
    updates = [
        optimizer_bytes(n) / machine.bandwidth
        for n in (numbers.student, numbers.wide, numbers.pair)
    ]
    student, wide = networks[0] + updates[0], networks[1] + updates[1]
    merging = machine.seconds(cost.merging)
    joint = sum(networks) + merging + updates[2]
    milliseconds = {"student": student, "wide": wide, "merging": merging, "joint": joint}
    return {
        **{name: 1000 * seconds for name, seconds in milliseconds.items()},
        "ratio": joint / (student + wide),
    }


def predict_case(case: Case, machine: Machine) -> dict[str, float]:
    """Times of a case's steps in one process, by its counts.

    Args:
        case: what is predicted.
        machine: what it runs on.

    Returns:
        What `predict` returns.
    """
    return predict(count_case(case), machine)


def forecast(case: Case, cluster: Cluster) -> dict[str, float]:
    """Times of a case on one GPU and on many.

    Args:
        case: student, pair and batch of each GPU.
        cluster: the GPUs.

    Returns:
        What `predict` returns, and for each W of `PROCESSES`: milliseconds in which gradients are
        averaged, ``merged_W`` with those of merged kernels and ``each_W`` with those of each
        branch; ratios of the joint step to the floor, ``merged_ratio_W`` and ``each_ratio_W``,
        where nothing of this is hidden behind the backward pass, neither in the joint step nor in
        the plain ones.
    """
    cost = count_case(case)
    figures = predict(cost, cluster.machine)
    numbers = cost.numbers
    for processes in PROCESSES:
        floor = figures["student"] + figures["wide"]
        for plain in (numbers.student, numbers.wide):
            floor += 1000 * cluster.all_reduce(plain, processes)
        for name, sent in (("merged", numbers.merged_first), ("each", numbers.pair)):
            taken = 1000 * cluster.all_reduce(sent, processes)
            figures[f"{name}_{processes}"] = taken
            figures[f"{name}_ratio_{processes}"] = (figures["joint"] + taken) / floor
    return figures
