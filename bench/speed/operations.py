"""The operations of a step, counted without memory and arithmetic.

A step is run on fake tensors, which have shapes and no numbers, and what reaches the dispatcher is
written down: floating-point operations by torch's own formulas, and the bytes of each operand and
each result once, as an operation without fusion moves them at the least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

aten = torch.ops.aten

# They make or name memory, and touch none of it.
_FREE = {
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten._unsafe_view,
    aten.detach,
    torch.ops.prim.device,
}
# What they write to, they do not read.
_OVERWRITE = {aten.copy_, aten.fill_, aten.zero_}
# Of their first operand they read as much as they return, or as much as they are given to write.
_PICK = {aten.index, aten.index_select, aten.gather}
_PUT = {aten.index_put, aten.index_put_}


@dataclass(frozen=True)
class Operation:
    """One operation of a step.

    Args:
        name: as the dispatcher has it.
        flops: floating-point operations of products, a multiply-add as two; 0 for all others.
        bytes: bytes read and written.
        dtype: dtype of what is multiplied.
    """

    name: str
    flops: int
    bytes: int
    dtype: torch.dtype


def count(mode: FakeTensorMode, step: Callable[[], object]) -> list[Operation]:
    """The operations of a step.

    Args:
        mode: the fake tensors' own, see `as_fake`.
        step: forward and backward pass on fake tensors.
    """
    recorder = _Recorder()
    with mode, recorder:
        step()
    return recorder.operations


def as_fake(network: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A network on fake tensors of the CPU, in place.

    Args:
        network: a network of any device, the meta device among them.
        mode: makes the tensors.
    """
    known: dict[Tensor, Tensor] = {}  # tied weights stay tied
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    if tensor not in known:
                        known[tensor] = _fake(tensor, mode)
                    tensors[name] = known[tensor]
    return network


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, tensor.requires_grad)
        return fake


def total_flops(operations: Iterable[Operation]) -> int:
    """Floating-point operations of some operations."""
    return sum(operation.flops for operation in operations)


def total_bytes(operations: Iterable[Operation]) -> int:
    """Bytes that some operations move."""
    return sum(operation.bytes for operation in operations)


class _Recorder(TorchDispatchMode):
    """Writes down each operation with what it computes and moves."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._formulas = {**FlopCounterMode(display=False).flop_registry, **_CPU_ATTENTION}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in _FREE or func.is_view:
            return result
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        flops = 0
        if packet in self._formulas:
            flops = self._formulas[packet](*args, **kwargs, out_val=result)
        dtype = (given or made)[0].dtype if given or made else torch.float32
        moved = _moved(packet, given, made)
        self.operations.append(Operation(str(packet), flops, moved, dtype))
        return result


def _moved(packet: Any, given: list[Tensor], made: list[Tensor]) -> int:
    if packet in _OVERWRITE:
        given = given[1:]
    elif packet in _PICK:
        given = [*made, *given[1:]]
    elif packet in _PUT:
        given, made = given[1:], given[-1:]
    return sum(map(_size, given)) + sum(map(_size, made))


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor's own numbers; those of an expanded axis are one."""
    elements = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= length if stride else min(length, 1)
    return elements


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


# Torch has no formulas for the fused attention of the CPU.
_CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
