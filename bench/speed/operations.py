"""Counting of the operations of a step, which needs neither memory nor arithmetic.

A step is run on fake tensors, which have shapes but no values, and the operations that reach
torch's dispatcher are recorded. Floating-point operations are counted by torch's own formulas. The
bytes of each operand and each result count once, which is the least that an operation moves if it
is not fused with others.
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

# Operations that allocate memory or make views, and so move no bytes.
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
# Operations that overwrite their first operand without reading it.
_OVERWRITE = {aten.copy_, aten.fill_, aten.zero_}
# Operations that read only a part of their first operand, as large as the result; and operations
# that write only a part of it, as large as the values that are written.
_PICK = {aten.index, aten.index_select, aten.gather}
_PUT = {aten.index_put, aten.index_put_}


@dataclass(frozen=True)
class Operation:
    """One operation of a step.

    Args:
        name: name of the operation in torch's dispatcher.
        flops: number of floating-point operations in products, where a multiply-add counts as two;
            0 for operations without products.
        bytes: number of bytes read and written.
        dtype: dtype of the first operand.
    """

    name: str
    flops: int
    bytes: int
    dtype: torch.dtype


def count(mode: FakeTensorMode, step: Callable[[], object]) -> list[Operation]:
    """Record the operations of a step.

    Args:
        mode: the mode in which the fake tensors were made, see `as_fake`.
        step: function that runs forward and backward pass on fake tensors.
    """
    recorder = _Recorder()
    with mode, recorder:
        step()
    return recorder.operations


def as_fake(network: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Replace all tensors of a network by fake tensors of the CPU, in place.

    Args:
        network: the network, on any device including meta.
        mode: the mode in which the fake tensors are made.
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
    """The total number of floating-point operations."""
    return sum(operation.flops for operation in operations)


def total_bytes(operations: Iterable[Operation]) -> int:
    """The total number of bytes that operations move."""
    return sum(operation.bytes for operation in operations)


class _Recorder(TorchDispatchMode):
    """A mode that records each operation with its floating-point operations and bytes."""

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
    """The number of bytes of a tensor in memory, in which an expanded axis has length 1."""
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


# Formulas for the CPU's fused attention, which torch lacks.
_CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
