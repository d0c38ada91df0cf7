"""Buffers get the values that they had before a forward pass."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gpd_cli.teacher.buffers import Buffers


class Changing(nn.Module):
    """Changes its buffers in the ways that networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("table", torch.arange(1000.0))
        self.register_buffer("in_place", torch.zeros(3))
        self.register_buffer("replaced", torch.zeros(3))
        self.register_buffer("uncounted", torch.zeros(3), persistent=False)
        self.register_buffer("made_later", None)
        self.register_buffer("memory", torch.zeros(3))

    def forward(self, rows: Tensor) -> Tensor:
        with torch.no_grad():
            mean = rows.mean(0)
            self.in_place.lerp_(mean, 0.5)
            self.replaced = 0.5 * self.replaced + mean
            self.uncounted.data.add_(mean)  # stands for a custom operation
            self.made_later = mean.clone()
            self.memory.add_(1)
        return self.norm(rows) + self.table[:3]


def values(network: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in network.named_buffers()}


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_buffers_are_as_if_the_forward_pass_had_not_been(steps: int) -> None:
    network = Changing()
    buffers = Buffers(network, without=["memory"])
    for step in range(steps):
        buffers.keep()
        network(torch.randn(4, 3))
        if not step:
            buffers.find_uncounted()
    buffers.keep()
    before = values(network)
    if not steps:
        before.pop("uncounted")  # found after a first pass
    network(torch.full((4, 3), math.nan))
    buffers.put_back()
    after = values(network)
    assert after.pop("memory").tolist() == [steps + 1] * 3
    assert before.pop("memory").tolist() == [steps] * 3
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert ("made_later" in after) == (steps > 0)
    # They are the network's own buffers, which go on.
    network(torch.ones(4, 3))
    assert torch.equal(network.in_place, before["in_place"].lerp(torch.ones(3), 0.5))


class Copied(TorchDispatchMode):
    """The largest number of elements that an operation copies."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in str(func) for word in ("clone", "copy")):
            tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.largest = max(self.largest, *(tensor.numel() for tensor in tensors))
        return func(*args, **(kwargs or {}))


def test_a_table_is_copied_once() -> None:
    network = Changing()
    buffers = Buffers(network)
    found = []
    for _ in range(3):
        with Copied() as copied:
            buffers.keep()
        network(torch.randn(4, 3))
        found.append(copied.largest)
    assert found == [1000, 3, 3]
    network.table.add_(1)
    with Copied() as copied:
        buffers.keep()
    assert copied.largest == 1000
