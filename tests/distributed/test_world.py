"""What processes send to each other."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from gpd_cli.distributed import world


@pytest.mark.parametrize("processes", [1, 2])
def test_tensors_of_an_accelerator_are_sent_from_the_cpu(
    monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    def send(values: list[Any], value: Any) -> None:
        values[:] = [value] * processes

    monkeypatch.setattr(world, "world_size", lambda: processes)
    monkeypatch.setattr(dist, "all_gather_object", send)
    with FakeTensorMode():  # which has tensors of every device on a machine without any
        shown = {"student": torch.empty((), device="cuda")}
        found = world.gathered({"shown": shown, "list": [torch.empty(2, device="cuda")], "n": {1}})
    assert len(found) == processes
    for one in found:
        tensors = [one["shown"]["student"], *one["list"]]
        assert [tensor.device.type for tensor in tensors] == ["cpu", "cpu"]
        assert one["n"] == {1}
    assert shown["student"].device.type == "cuda"


def test_tensors_of_the_cpu_are_sent_by_the_device_that_trains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As those of an average of the weights, of all types: nccl takes none of the CPU."""
    sent = []
    monkeypatch.setattr(world, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src: sent.append(tensor))
    with FakeTensorMode():
        tensors = [torch.empty(3), torch.empty((), dtype=torch.int64), torch.empty(2, 3).T]
        world.broadcast_from_first(tensors, torch.device("cuda", 0))
    assert [tensor.device.type for tensor in sent] == ["cuda"] * 3
    assert all(tensor.is_contiguous() for tensor in sent)
    assert [tensor.device.type for tensor in tensors] == ["cpu"] * 3


def test_tensors_take_the_first_process_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src: tensor.fill_(7))
    tensors = [torch.zeros(2, 3).T, torch.zeros((), dtype=torch.int64)]
    world.broadcast_from_first(tensors, torch.device("cpu"))
    assert all((tensor == 7).all() for tensor in tensors)
