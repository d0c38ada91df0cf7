"""Prediction of the time of a joint step from its counts, on one machine or on many GPUs."""

from __future__ import annotations

from dataclasses import dataclass

from bench.speed.case import Case
from bench.speed.cost import Cost, count_case, optimizer_bytes, sent_bytes
from bench.speed.machine import Machine

PROCESSES = (8, 64)
"""Numbers of GPUs for which the table has columns."""


@dataclass(frozen=True)
class Cluster:
    """A cluster of GPUs with their connections.

    Args:
        machine: rates of one GPU.
        inside: bytes per second that a GPU can send to other GPUs in its node.
        between: bytes per second that a GPU can send to another node.
        node: number of GPUs in a node.
    """

    machine: Machine
    inside: float
    between: float
    node: int = 8

    def all_reduce(self, numbers: int, processes: int) -> float:
        """The time to average a gradient over all GPUs, in seconds.

        There are three steps, one after the other: a reduce-scatter inside each node, an all-reduce
        of each GPU's share between nodes, and an all-gather inside each node.

        Args:
            numbers: number of elements of the gradient.
            processes: number of GPUs that train together.
        """
        local = min(self.node, processes)
        share, nodes = numbers // local, processes // local
        return sent_bytes(numbers, local) / self.inside + sent_bytes(share, nodes) / self.between


PRODUCTS, MOVES = 0.4, 0.7
"""Assumed fractions of the peak rates: for products, and for memory and connections."""

H100 = Cluster(
    Machine(flops=PRODUCTS * 67e12, low_flops=PRODUCTS * 989e12, bandwidth=MOVES * 3.35e12),
    inside=MOVES * 450e9,
    between=MOVES * 50e9,
)
"""Nodes with eight GPUs of type NVIDIA H100 SXM.

Peak rates by the data sheet: 989 TFLOP/s in bfloat16 (without sparsity), 67 TFLOP/s in float32,
3.35 TB/s of memory bandwidth, NVLink with 900 GB/s, half of it in each direction. Between nodes,
each GPU has an adapter of 400 Gb/s, as in NVIDIA's DGX H100.
"""


def computed_cases() -> list[Case]:
    """The rows of the computed table."""
    return [
        Case(student, 224, 256, branches, precision="bf16", channels_last=True)
        for student in ("resnet18", "resnet50")
        for branches in (1, 6)
    ]


def predict(cost: Cost, machine: Machine) -> dict[str, float]:
    """Predict the times of a case's steps in a single process.

    Args:
        cost: the counts of the case.
        machine: rates of the machine.

    Returns:
        Milliseconds of the steps ``student``, ``wide`` and ``joint``, with their optimizers as in
        the benchmark, and of ``merging``; and ``ratio``, the joint step over the floor (the sum of
        student and wide).
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
    """Count a case, and predict the times of its steps in a single process.

    Args:
        case: the case.
        machine: rates of the machine.

    Returns:
        The output of `predict`.
    """
    return predict(count_case(case), machine)


def forecast(case: Case, cluster: Cluster) -> dict[str, float]:
    """Predict the times of a case on one GPU and on many.

    Args:
        case: the case, with the batch of each GPU.
        cluster: the GPUs.

    Returns:
        The output of `predict` for one GPU, and for each number W in `PROCESSES`: the milliseconds
        of averaging gradients, ``merged_W`` if those of merged kernels are averaged, and ``each_W``
        if those of main kernels and branches are; and the ratios of the joint step to the floor,
        ``merged_ratio_W`` and ``each_ratio_W``. In these ratios, no averaging is hidden behind the
        backward pass, neither in the joint step nor in the plain steps.
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
