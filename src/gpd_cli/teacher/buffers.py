"""Keep the values of a network's buffers before a forward pass, and put them back after it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gpd_cli.widening.names import qualified

NORM_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Names of norms' buffers; torch changes the first two without raising the tensors' versions."""


@dataclass
class _Slot:
    """A module's buffer, with its tensor, version and value when it was last kept."""

    module: nn.Module
    name: str
    uncounted: bool  # whether the tensor may change without a new version
    tensor: Tensor | None = None
    version: int = -1
    value: Tensor | None = None  # a copy of the values

    def has_changed(self) -> bool:
        """Whether the buffer may have another value than when it was kept."""
        tensor = self.module._buffers.get(self.name)
        if tensor is not self.tensor:
            return True
        return tensor is not None and (self.uncounted or _version(tensor) != self.version)


class Buffers:
    """All buffers of a network, with a copy of each.

    Torch counts the changes of a tensor (its version), so `keep` copies only buffers that have
    changed since its last call: tables and masks once, running statistics each time.

    Args:
        network: the network; buffers that are registered later are not kept.
        without: qualified names of buffers that are left alone.
    """

    def __init__(self, network: nn.Module, without: Collection[str] = ()) -> None:
        self._slots = [
            _Slot(module, name, name in NORM_STATISTICS)
            for path, module in network.named_modules()
            for name in module._buffers
            if qualified(path, name) not in without
        ]

    def keep(self) -> None:
        """Keep the present values of the buffers."""
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
        """Find buffers that change without a new version; from now on `keep` always copies these.

        Custom and compiled operations may change a buffer in this way. Each buffer is compared with
        its copy, which takes time: call this once, after a first forward pass.
        """
        for slot in self._slots:
            if slot.has_changed() or slot.tensor is None or slot.value is None:
                continue
            if slot.tensor.layout == torch.strided:
                slot.uncounted = not torch.equal(slot.tensor, slot.value)

    def put_back(self) -> None:
        """Put the kept values back, and the kept tensors where another tensor replaced them."""
        copies = []
        for slot in self._slots:
            if not slot.has_changed():
                continue
            slot.module._buffers[slot.name] = slot.tensor
            if slot.tensor is not None and slot.value is not None and slot.has_changed():
                copies.append((slot.tensor, slot.value))
        _copy(copies)


def copied_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Copies of a module's own buffers, by their names; None for buffers that are None."""
    return {
        name: None if buffer is None else buffer.detach().clone()
        for name, buffer in module._buffers.items()
    }


def _version(tensor: Tensor) -> int:
    """The version of a tensor, which counts its changes in place.

    Inference tensors have no version. It is 0 here, since they cannot change outside inference
    mode.
    """
    return 0 if tensor.is_inference() else tensor._version


@torch.no_grad()
def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy the second tensor of each pair into the first, all of a dtype and device in one call."""
    alike = defaultdict(list)
    for pair in pairs:
        alike[pair[0].dtype, pair[0].device].append(pair)
    for group in alike.values():
        targets, sources = zip(*group, strict=True)
        torch._foreach_copy_(targets, sources)
