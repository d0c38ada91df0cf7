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
