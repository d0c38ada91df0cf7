"""Counts against small layers counted by hand, and bytes against what processes really send."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from bench.speed.case import Case
from bench.speed.cost import (
    Cost,
    Numbers,
    count_case,
    merged_first,
    optimizer_bytes,
    sent_bytes,
)
from bench.speed.forecast import Cluster, predict
from bench.speed.machine import Machine
from bench.speed.measure import merge_all
from bench.speed.operations import Operation, as_fake, count, total_bytes, total_flops
from gpd_cli import expand
from gpd_cli.teacher.pair import Pair
from gpd_cli.training.reduction import average_merged_kernels


def test_a_convolution_and_its_gradients() -> None:
    mode = FakeTensorMode()
    layer = as_fake(nn.Conv2d(3, 8, 3, padding=1, bias=False), mode)
    with mode:
        images = torch.empty(2, 3, 4, 4)
    forward = count(mode, lambda: layer(images))
    once = 2 * (2 * 4 * 4) * 8 * (3 * 9)  # multiply-adds count twice
    kernel, given, made = 8 * 3 * 9, 2 * 3 * 16, 2 * 8 * 16
    assert total_flops(forward) == once
    assert total_bytes(forward) == 4 * (kernel + given + made)
    both = count(mode, lambda: layer(images).backward(torch.empty(2, 8, 4, 4)))
    assert total_flops(both) == 2 * once  # images have no gradient


@pytest.mark.parametrize(
    ("step", "numbers"),
    [
        (lambda a, b: a + b, 30),
        (lambda a, b: a.add_(b), 30),
        (lambda a, b: a.copy_(b), 20),
        (lambda a, b: a.zero_(), 10),
        (lambda a, b: a.view(2, 5)[0].unsqueeze(1), 0),
        (lambda a, b: a.view(2, 5).t().contiguous(), 20),
        (lambda a, b: a.view(2, 5) + b[:1].expand(2, 5), 21),
        (lambda a, b: torch.empty(100), 0),
    ],
)
def test_bytes_are_those_of_operands_and_results(step: object, numbers: int) -> None:
    mode = FakeTensorMode()
    with mode:
        first, second = torch.empty(10), torch.empty(10)
    assert total_bytes(count(mode, lambda: step(first, second))) == 4 * numbers  # type: ignore[operator]


def test_attention_counts_where_it_is_fused() -> None:
    mode = FakeTensorMode()
    with mode:
        query = torch.empty(1, 2, 5, 8, requires_grad=True)
    product = 2 * 2 * 5 * 5 * 8
    attention = lambda: F.scaled_dot_product_attention(query, query, query)  # noqa: E731
    assert total_flops(count(mode, attention)) == 2 * product
    with_gradients = count(mode, lambda: attention().backward(torch.empty(1, 2, 5, 8)))
    assert total_flops(with_gradients) == 7 * product  # scores are computed once more


def small_pair(branches: object = 6, width: int = 4) -> Pair:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()
    last = nn.Conv2d(width, 2 * width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    network = nn.Sequential(*layers, *last, nn.Linear(2 * width, 4))
    return expand(network, sample=torch.zeros(2, 3, 8, 8), branches=branches).train()


def test_merging_a_product_of_kernels_takes_three_products() -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    pair = small_pair(["1x1_kxk"])
    as_fake(pair, mode)

    def merging() -> None:
        both = merge_all(pair)
        torch.autograd.backward(both, both)

    # [O * 9, I] by [I, I] for the wide layers 3 to 8 and 8 to 16; two more for the gradients.
    product = 2 * 9 * (8 * 3 * 3 + 16 * 8 * 8)
    assert total_flops(count(mode, merging)) == 3 * product


@pytest.mark.slow
def test_numbers_of_a_case() -> None:
    one, six = (count_case(Case("cifar_resnet8", 16, 2, m)) for m in (1, 6))
    assert (one.student, one.wide) == (six.student, six.wide)
    assert 3.5 * total_flops(one.student) < total_flops(one.wide) < 4 * total_flops(one.student)
    assert total_flops(one.merging) == 0 < total_flops(six.merging)
    assert one.numbers.pair == one.numbers.merged_first == one.numbers.wide
    assert six.numbers.merged_first == six.numbers.wide < six.numbers.pair / 2


def test_lower_precision_is_counted_as_such() -> None:
    cost = count_case(Case("cifar_resnet8", 16, 2, precision="bf16", channels_last=True))
    products = [operation for operation in cost.student if "convolution" in operation.name]
    assert products and all(operation.dtype == torch.bfloat16 for operation in products)


def test_times_are_those_of_the_slower_of_arithmetic_and_memory() -> None:
    machine = Machine(flops=100.0, low_flops=200.0, bandwidth=10.0)
    whole, half = torch.float32, torch.bfloat16
    kinds = [Operation("a", 400, 10, whole), Operation("b", 400, 10, half)]
    assert machine.seconds([*kinds, Operation("c", 0, 30, whole)]) == 4 + 2 + 3
    cost = Cost((kinds[0],), (kinds[1],), (), Numbers(1, 2, 3, 3))
    assert optimizer_bytes(1) == 20
    figures = predict(cost, machine)
    assert figures["student"] == 1000 * (4 + 2) and figures["joint"] == 1000 * (4 + 2 + 6)
    assert figures["ratio"] == 1


def test_time_of_an_average_over_nodes() -> None:
    cluster = Cluster(Machine(1.0, 1.0, 1.0), inside=100.0, between=10.0, node=2)
    assert sent_bytes(1000, 2) == 4000 and sent_bytes(1000, 4) == 6000
    assert cluster.all_reduce(1000, 2) == 40
    assert cluster.all_reduce(1000, 4) == 40 + sent_bytes(500, 2) / 10


# What processes send


def written() -> int:
    """Bytes that this process has written to files and sockets, by the kernel's own count."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.partition(": ")[2] for line in lines if line.startswith("wchar")))


def sent_in_a_backward_pass(merged: bool) -> tuple[int, int]:
    """Numbers that should travel for a pair's gradients, and bytes that this process sends."""
    pair = small_pair(width=32)
    total = sum(parameter.numel() for parameter in pair.parameters())
    expected = merged_first(pair) if merged else total
    if merged:
        names = average_merged_kernels(pair)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(pair, names)
    else:
        for module in pair.modules():
            module.averages_gradient = False
    spread = DistributedDataParallel(pair, broadcast_buffers=False)
    for _ in range(3):  # the second forward pass sends a new order of buckets
        student, teacher = spread(torch.randn(4, 3, 8, 8))
        loss: Tensor = student.square().sum() + teacher.square().sum()
        dist.barrier()
        before = written()
        loss.backward()
        sent = written() - before
    return expected, sent


def process(rank: int, processes: int, folder: Path) -> None:
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    found = {merged: sent_in_a_backward_pass(merged) for merged in (False, True)}
    torch.save(found, folder / f"{rank}.pth")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="bytes are counted by Linux")
@pytest.mark.parametrize("processes", [2, 4])
def test_bytes_are_those_that_processes_send(tmp_path: Path, processes: int) -> None:
    torch.multiprocessing.spawn(process, (processes, tmp_path), nprocs=processes)
    for rank in range(processes):
        found = torch.load(tmp_path / f"{rank}.pth", weights_only=True)
        for numbers, sent in found.values():
            expected = sent_bytes(numbers, processes)
            assert expected <= sent < 1.1 * expected, (numbers, sent)
        assert found[True][1] < found[False][1] / 2
