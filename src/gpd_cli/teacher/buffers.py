"""The values that buffers had before a forward pass, to be given back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gpd_cli.widening.names import qualified

NORM_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Buffers of norms; torch changes the first two without counting a version."""


@dataclass
class _Slot:
    """A buffer of a module by its name, and what it was when it was last kept."""

    module: nn.Module
    name: str
    uncounted: bool  # whether changes do not show in the tensor's version
    tensor: Tensor | None = None
    version: int = -1
    value: Tensor | None = None  # a copy

    def has_changed(self) -> bool:
        """Whether there may be another value than when it was kept."""
        tensor = self.module._buffers.get(self.name)
        if tensor is not self.tensor:
            return True
        return tensor is not None and (self.uncounted or _version(tensor) != self.version)


class Buffers:
    """All buffers of a network, with a copy of each.

    Torch counts the changes of a tensor, so that `keep` copies only what has changed since it was
    last called: tables and masks once, running statistics each time.

    Args:
        network: the network; buffers that are registered later are not seen.
        without: names of buffers that are left alone.
    """

    def __init__(self, network: nn.Module, without: Collection[str] = ()) -> None:
        self._slots = [
            _Slot(module, name, name in NORM_STATISTICS)
            for path, module in network.named_modules()
            for name in module._buffers
            if qualified(path, name) not in without
        ]

    def keep(self) -> None:
        """Keep the present values."""
        copies = []
        for slot in self._slots:
            if not slot.has_changed():
                continue
            tensor = slot.module._buffers.get(slot.name)
            if tensor is None:
                slot.value = None
            elif tensor is slot.tensor and slot.value is not None:
                copies.append((slot.value, tensor))
            else:
                slot.value = tensor.detach().clone()
            slot.tensor = tensor
            slot.version = -1 if tensor is None else _version(tensor)
        _copy(copies)

    def find_uncounted(self) -> None:
        """Find the buffers that have changed since they were kept, and whose version has not.

        Custom and compiled operations may change a buffer in this way. Each buffer is compared with
        its copy, which takes time: call this after a first forward pass.
        """
        for slot in self._slots:
            if slot.has_changed() or slot.tensor is None or slot.value is None:
                continue
            if slot.tensor.layout == torch.strided:
                slot.uncounted = not torch.equal(slot.tensor, slot.value)

    def put_back(self) -> None:
        """Give the buffers the values that were kept; one that was replaced is itself again."""
        copies = []
        for slot in self._slots:
            if not slot.has_changed():
                continue
            slot.module._buffers[slot.name] = slot.tensor
            if slot.tensor is not None and slot.value is not None and slot.has_changed():
                copies.append((slot.tensor, slot.value))
        _copy(copies)


def copied_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Copies of a module's own buffers, by their names; None for those that it leaves empty."""
    return {
        name: None if buffer is None else buffer.detach().clone()
        for name, buffer in module._buffers.items()
    }


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed; tensors made in inference mode cannot be, out of it."""
    return 0 if tensor.is_inference() else tensor._version


@torch.no_grad()
def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy each second tensor to the first one, those of a type and device together."""
    alike = defaultdict(list)
    for pair in pairs:
        alike[pair[0].dtype, pair[0].device].append(pair)
    for group in alike.values():
        targets, sources = zip(*group, strict=True)
        torch._foreach_copy_(targets, sources)
