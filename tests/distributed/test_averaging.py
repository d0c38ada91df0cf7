from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpd_cli import expand
from gpd_cli.training.reduction import average_merged_kernels

SETTINGS = {"paper": (6, "zero"), "authors": ("gpd", "gpd")}


def gradients(branches: Any, init: str, *, merged: bool) -> tuple[dict[str, Tensor], int]:
    """Gradients averaged over processes, and how many numbers were sent for those of kernels.

    Args:
        branches: of the dynamic teacher.
        init: initial values of the branches.
        merged: whether gradients of merged kernels are averaged, or those of each parameter.
    """
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    sample = torch.zeros(2, 3, 8, 8)
    pair = expand(network.double(), sample=sample, branches=branches, branch_init=init).train()
    for name, parameter in pair.named_parameters():
        if ".gates." in name:
            nn.init.constant_(parameter, 0.3)
    with_branches = average_merged_kernels(pair)
    if not merged:
        for module in pair.modules():
            module.averages_gradient = False
    sent = []
    reduce = dist.all_reduce

    def counted(tensor: Tensor) -> None:
        sent.append(tensor.numel())
        reduce(tensor)

    torch.manual_seed(dist.get_rank())
    student, teacher = pair(torch.randn(4, 3, 8, 8).double())
    dist.all_reduce = counted
    try:
        (student.square().sum() + teacher.square().sum()).backward()
        found = {name: parameter.grad for name, parameter in pair.named_parameters()}
        for name in with_branches if not merged else ():  # in the same order everywhere
            counted(found[name])
            found[name] /= dist.get_world_size()
    finally:
        dist.all_reduce = reduce
    return {name: found[name] for name in with_branches}, sum(sent)


def test_gradients_that_travel_once_travel_for_all_batches_of_an_update() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4))
    pair = expand(network, sample=torch.zeros(2, 3, 3, 3), branches=6)
    merged, each = average_merged_kernels(pair), average_merged_kernels(pair, batches=100)
    assert any(name.endswith("original") for name in merged)
    assert not each


def process(rank: int, count: int, folder: Path) -> None:
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
    found = {
        name: [gradients(*setting, merged=merged) for merged in (False, True)]
        for name, setting in SETTINGS.items()
    }
    torch.save(found, folder / f"{rank}.pth")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("count", [2])
def test_the_average_of_a_merged_kernels_gradient_is_that_of_all_its_branches(
    tmp_path: Path, count: int
) -> None:
    torch.multiprocessing.spawn(process, (count, tmp_path), nprocs=count)
    ranks = [torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(count)]
    for name in SETTINGS:
        (each, of_parameters), (kernel, of_kernels) = ranks[0][name]
        assert each.keys() == kernel.keys() and len(each) > 10
        for key, gradient in each.items():
            torch.testing.assert_close(kernel[key], gradient, rtol=1e-9, atol=1e-12, msg=key)
            assert torch.equal(kernel[key], ranks[-1][name][1][0][key]), key
        assert of_kernels < 0.6 * of_parameters
