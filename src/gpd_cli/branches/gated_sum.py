"""A kernel and its gated branches as one differentiable operation.

``kernel[o] + sum_b gate_b[o] * branch_b[o]``, as the operations of an automatic graph, would keep a
tensor of the kernel's size for each branch and each gate. Here one autograd node adds the branches
up in one buffer, keeps the branches' factors only, and computes each gradient in closed form from
the gradient G of the sum. The gradient of a gate is ``<G[o], branch_b[o]>``.

Each kind of branch is a named tuple of tensors, a `Term`. With O output channels, g groups, F = I/g
input channels per group and K = kh * kw kernel positions, a term computes in the memory layout that
its product comes in: ``[O, K, F]`` (rows, channels-last memory), or ``[O, F, K]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Gradient:
    """The gradient of a kernel, in the two layouts that the terms compute in.

    Args:
        grad: ``[O, F, kh, kw]``, in any memory format.
    """

    def __init__(self, grad: Tensor) -> None:
        self.grad = grad
        # No cached_property: its lock is nothing that torch.compile can trace.
        self._rows: Tensor | None = None
        self._flat: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """``[O, K, F]``, contiguous: a copy unless the gradient is in channels-last memory."""
        if self._rows is None:
            self._rows = self.grad.flatten(2).transpose(1, 2).contiguous()
        return self._rows

    @property
    def flat(self) -> Tensor:
        """``[O, F, K]``, contiguous: a copy if the gradient is in channels-last memory."""
        if self._flat is None:
            self._flat = self.grad.flatten(2).contiguous()
        return self._flat


class Filtered(NamedTuple):
    """Branches whose kernel is a sum of pointwise weights, each times a fixed filter per output."""

    taps: Tensor
    """The pointwise weights, ``[O, T, F]``."""
    patterns: Tensor
    """The filters, gates included, ``[O, T, K]``."""

    def add_to(self, total: Tensor, dtype: torch.dtype) -> None:
        """Add the sum over T of weight times filter."""
        rows = _rows_of(total)
        rows.add_(torch.bmm(self.patterns.transpose(1, 2), self.taps).view(rows.shape))

    def gradients(self, grad: Gradient, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """Gradients of weights and filters, one product each."""
        rows = grad.rows
        return torch.bmm(self.patterns, rows), torch.bmm(self.taps, rows.transpose(1, 2))


class PointwiseProduct(NamedTuple):
    """A 1 x 1 convolution followed by a k x k one (see `functional.pointwise_kxk`)."""

    gate: Tensor
    """``[O]``."""
    first: Tensor
    """``[g, J, F]``, with J inner channels per group."""
    weight: Tensor
    """``[O, J, kh, kw]``."""

    def add_to(self, total: Tensor, dtype: torch.dtype) -> None:
        """Add the gated product; the gate scales the product in place."""
        rows = _rows_of(total)
        product = torch.bmm(self._weight_rows().to(dtype), self.first.to(dtype))
        product = product.view(len(self.gate), -1).to(total.dtype)
        rows.add_(product.mul_(self.gate[:, None]).view(rows.shape))

    def gradients(self, grad: Gradient, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """Gradients of the gate and of both factors, one product for each factor."""
        weight, first = self._weight_rows(), self.first.to(dtype)
        groups, _, fan = first.shape
        rows = grad.rows.view(groups, -1, fan)
        weight_grad = torch.bmm(rows.to(dtype), first.transpose(1, 2)).to(rows.dtype)
        weight_grad = weight_grad.view(len(self.gate), -1)
        gate_grad = torch.linalg.vecdot(weight.reshape(weight_grad.shape), weight_grad)
        weight_grad.mul_(self.gate[:, None])
        gated = (rows.view(weight_grad.shape[0], -1) * self.gate[:, None]).view(rows.shape)
        first_grad = torch.bmm(weight.transpose(1, 2).to(dtype), gated.to(dtype))
        kh, kw = self.weight.shape[2:]
        weight_grad = weight_grad.view(len(self.gate), kh, kw, -1).permute(0, 3, 1, 2)
        return gate_grad, first_grad.to(self.first.dtype), weight_grad

    def _weight_rows(self) -> Tensor:
        """``[g, O/g * K, J]``: no copy of a weight in channels-last memory."""
        weight = self.weight.permute(0, 2, 3, 1)
        return weight.reshape(len(self.first), -1, weight.shape[-1])


class DepthwiseProduct(NamedTuple):
    """A depthwise k x k convolution followed by a 1 x 1 one (see `functional.depthwise_separable`).

    A product for each input channel would be tiny: the channels are taken in blocks of b, with the
    depthwise filters of a block as one block-diagonal matrix ``[b * m, b * K]``.
    """

    gate: Tensor
    """``[O]``."""
    depthwise: Tensor
    """``[g, F, m, K]``, with m outputs per input channel."""
    weight: Tensor
    """The 1 x 1 convolution, ``[O, F, m]``."""

    def add_to(self, total: Tensor, dtype: torch.dtype) -> None:
        """Add the gated product."""
        product = torch.matmul(self._blocks(self.weight), self._diagonal())
        product *= self.gate.view(len(product), 1, -1, 1)
        groups, blocks, outputs, _ = product.shape
        size = total.shape[2:]
        target = total.view(groups, outputs, blocks, -1, *size)
        target.add_(product.view(groups, blocks, outputs, -1, *size).transpose(1, 2))

    def gradients(self, grad: Gradient, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """Gradients of the gate and of both factors, one product for each factor."""
        flat, diagonal = self._blocks(grad.flat), self._diagonal()
        weight_grad = torch.matmul(flat, diagonal.transpose(2, 3)).transpose(1, 2)
        weight_grad = weight_grad.reshape(self.weight.shape).flatten(1)
        weight = self.weight.flatten(1)
        gate_grad = torch.linalg.vecdot(weight, weight_grad)
        gated = self._blocks((weight * self.gate[:, None]).view_as(self.weight))
        square = torch.matmul(gated.transpose(2, 3), flat)  # of which the diagonal blocks count
        groups, _, multiplier, taps = self.depthwise.shape
        square = square.view(groups, square.shape[1], -1, multiplier, square.shape[3] // taps, taps)
        depthwise_grad = square.diagonal(dim1=2, dim2=4).permute(0, 1, 4, 2, 3)
        weight_grad = weight_grad.mul_(self.gate[:, None]).view_as(self.weight)
        return gate_grad, depthwise_grad.reshape(self.depthwise.shape), weight_grad

    @property
    def _block(self) -> int:
        """b: blocks of four cost least, on the CPU as measured."""
        fan = self.depthwise.shape[1]
        return next(size for size in (4, 2, 1) if fan % size == 0)

    def _blocks(self, weight: Tensor) -> Tensor:
        """A tensor ``[O, F, n]`` as a matrix for each block: ``[g, F/b, O/g, b * n]``."""
        groups, fan = self.depthwise.shape[:2]
        blocks = weight.reshape(groups, len(weight) // groups, fan // self._block, -1)
        return blocks.transpose(1, 2)

    def _diagonal(self) -> Tensor:
        """The depthwise filters, block-diagonal: ``[g, F/b, b * m, b * K]``."""
        groups, fan, multiplier, taps = self.depthwise.shape
        size = self._block
        shape = (groups, fan // size, size, multiplier, size, taps)
        matrix = self.depthwise.new_zeros(shape)
        filters = self.depthwise.view(*shape[:4], taps).permute(0, 1, 3, 4, 2)
        matrix.diagonal(dim1=2, dim2=4).copy_(filters)
        return matrix.view(groups, fan // size, size * multiplier, size * taps)


class Dense(NamedTuple):
    """A branch whose kernel is at hand."""

    gate: Tensor
    """``[O]``."""
    kernel: Tensor
    """``[O, F, kh, kw]``, or ``[O, I]``."""

    def add_to(self, total: Tensor, dtype: torch.dtype) -> None:
        """Add the gated kernel."""
        total.addcmul_(self.kernel.to(total.dtype), _per_output(self.gate, total))

    def gradients(self, grad: Gradient, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """Gradients of the gate and of the kernel."""
        kernel_grad = (grad.grad * _per_output(self.gate, grad.grad)).to(self.kernel.dtype)
        return _dot_per_output(grad.grad, self.kernel), kernel_grad


class Identity(NamedTuple):
    """The identity: one element of each output's kernel."""

    gate: Tensor
    """``[O]``."""
    channels: Tensor
    """``[O]``: the input channel within the group that each output copies."""

    def add_to(self, total: Tensor, dtype: torch.dtype) -> None:
        """Add the gate to the copied channel's centre."""
        total[self._place(total)] += self.gate

    def gradients(self, grad: Gradient, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """The gate's gradient."""
        return grad.grad[self._place(grad.grad)], None

    def _place(self, kernel: Tensor) -> tuple[Tensor, Tensor, int, int]:
        y, x = ((side - 1) // 2 for side in kernel.shape[2:])
        row = torch.arange(len(self.channels), device=self.channels.device)
        return row, self.channels, y, x


Term = Filtered | PointwiseProduct | DepthwiseProduct | Dense | Identity
"""A kind of branch: adds itself to a kernel in place, and knows the gradients of its tensors.

``add_to`` takes the kernel, ``[O, F, kh, kw]`` in any memory format; ``gradients`` the gradient of
the sum; both take the dtype of large products.
"""


class _GatedSum(torch.autograd.Function):
    """The sum, and all gradients from the sum's gradient; the factors are all that is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        kinds: tuple[type[Term], ...],
        dtype: torch.dtype,
        kernel: Tensor,
        main_gate: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.kinds, ctx.dtype = kinds, dtype
        gated = (None, None) if main_gate is None else (kernel, main_gate)
        ctx.save_for_backward(*gated, *tensors)
        # One buffer, in the main kernel's memory format.
        total = kernel.clone() if main_gate is None else kernel * _per_output(main_gate, kernel)
        for term in _terms(kinds, tensors):
            term.add_to(total, dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        kernel, main_gate, *tensors = ctx.saved_tensors
        gradient = Gradient(grad)
        found: list[Tensor | None] = []
        # Compiled, the backward pass would be traced under the forward pass's autocast.
        with torch.autocast(grad.device.type, enabled=False):
            for term in _terms(ctx.kinds, tensors):
                found += term.gradients(gradient, ctx.dtype)
            if main_gate is None:
                return None, None, grad, None, *found
            kernel_grad = grad * _per_output(main_gate, grad)
            return None, None, kernel_grad, _dot_per_output(grad, kernel), *found


def gated_sum(kernel: Tensor, main_gate: Tensor | None, terms: Sequence[Term]) -> Tensor:
    """Add gated branches to a kernel: ``kernel[o] + sum_b gate_b[o] * branch_b[o]``.

    Under autocast the product of ``PointwiseProduct``, which has by far the most operations, runs
    in autocast's dtype; the sum is taken in the main kernel's.

    Args:
        kernel: the main kernel, ``[O, F, kh, kw]``, or ``[O, I]``.
        main_gate: gate on the main kernel, ``[O]``, or None.
        terms: the branches, in the order in which they are added.

    Returns:
        A new tensor of the main kernel's shape, dtype and memory format.
    """
    device = kernel.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else kernel.dtype
    kinds = tuple(type(term) for term in terms)
    tensors = [tensor for term in terms for tensor in cast(tuple[Tensor, ...], term)]
    with torch.autocast(device, enabled=False):
        return cast(Tensor, _GatedSum.apply(kinds, dtype, kernel, main_gate, *tensors))


def _terms(kinds: Sequence[type[Term]], tensors: Sequence[Tensor]) -> list[Term]:
    """The terms of given kinds that a flat sequence of tensors makes up."""
    terms: list[Term] = []
    start = 0
    for kind in kinds:
        end = start + len(kind._fields)
        terms.append(kind._make(tensors[start:end]))
        start = end
    return terms


def _rows_of(kernel: Tensor) -> Tensor:
    """A view of a kernel, ``[O, kh, kw, F]``."""
    return kernel.permute(0, 2, 3, 1)


def _per_output(gate: Tensor, kernel: Tensor) -> Tensor:
    """A gate in a shape that scales each output of a kernel."""
    return gate.view(-1, *[1] * (kernel.ndim - 1))


def _dot_per_output(first: Tensor, second: Tensor) -> Tensor:
    """``<first[o], second[o]>`` for each output o, ``[O]``."""
    return torch.einsum("o...,o...->o", first, second.to(first.dtype))
