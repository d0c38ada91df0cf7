"""The sum of a kernel and its gated branches as one differentiable operation, to save memory.

The sum is ``kernel[o] + sum_b gate_b[o] * branch_b[o]``. Written as separate operations, it would
make autograd keep a tensor of the kernel's size for each branch and each gate. Here one autograd
node adds the branches up in one buffer, keeps the branches' factors only, and computes each
gradient in closed form from the gradient G of the sum. A gate has the gradient
``<G[o], branch_b[o]>``.

Each kind of branch is a named tuple of tensors, a `Term`. There are O output channels, g groups,
F = I/g input channels per group and K = kh * kw kernel positions. A term computes in the memory
format of its product: ``[O, K, F]`` (called rows, as in channels-last memory), or ``[O, F, K]``
(called flat).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Gradient:
    """The gradient of a kernel, in the two memory formats that the terms compute in.

    Args:
        grad: the gradient, ``[O, F, kh, kw]``, in any memory format.
    """

    def __init__(self, grad: Tensor) -> None:
        self.grad = grad
        # torch.compile cannot trace the lock of a cached_property, so results are kept by hand.
        self._rows: Tensor | None = None
        self._flat: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """The gradient as contiguous ``[O, K, F]``: a copy unless it is in channels-last memory."""
        if self._rows is None:
            self._rows = self.grad.flatten(2).transpose(1, 2).contiguous()
        return self._rows

    @property
    def flat(self) -> Tensor:
        """The gradient as contiguous ``[O, F, K]``: a copy if it is in channels-last memory."""
        if self._flat is None:
            self._flat = self.grad.flatten(2).contiguous()
        return self._flat


class Filtered(NamedTuple):
    """All branches whose kernel is a sum of 1 x 1 weights, each times a fixed filter per output."""

    taps: Tensor
    """The 1 x 1 weights of all branches, ``[O, T, F]``, with T of them per output channel."""
    patterns: Tensor
    """The filters times the gates of their branches, ``[O, T, K]``."""

    def add_to(self, total: Tensor, dtype: torch.dtype) -> None:
        """Add the sum, over the T weights, of weight times filter."""
        rows = _rows_of(total)
        rows.add_(torch.bmm(self.patterns.transpose(1, 2), self.taps).view(rows.shape))

    def gradients(self, grad: Gradient, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """Compute the gradients of weights and gated filters, with one product for each."""
        rows = grad.rows
        return torch.bmm(self.patterns, rows), torch.bmm(self.taps, rows.transpose(1, 2))


class PointwiseProduct(NamedTuple):
    """A 1 x 1 convolution followed by a k x k one (see `functional.pointwise_kxk`)."""

    gate: Tensor
    """The gate, ``[O]``."""
    first: Tensor
    """The 1 x 1 convolution, ``[g, J, F]``, with J inner channels per group."""
    weight: Tensor
    """The k x k convolution, ``[O, J, kh, kw]``."""

    def add_to(self, total: Tensor, dtype: torch.dtype) -> None:
        """Add the product times the gate; the product is scaled in place."""
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
        """The k x k weight as ``[g, O/g * K, J]``; no copy if it is in channels-last memory."""
        weight = self.weight.permute(0, 2, 3, 1)
        return weight.reshape(len(self.first), -1, weight.shape[-1])


class DepthwiseProduct(NamedTuple):
    """A depthwise k x k convolution followed by a 1 x 1 one (see `functional.depthwise_separable`).

    Separate matrix products for each input channel would be tiny and slow. So channels are taken in
    blocks of b, with the depthwise filters of a block as one block-diagonal matrix
    ``[b * m, b * K]``.
    """

    gate: Tensor
    """The gate, ``[O]``."""
    depthwise: Tensor
    """The depthwise filters, ``[g, F, m, K]``, with m outputs per input channel."""
    weight: Tensor
    """The 1 x 1 convolution, ``[O, F, m]``."""

    def add_to(self, total: Tensor, dtype: torch.dtype) -> None:
        """Add the product times the gate."""
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
        square = torch.matmul(gated.transpose(2, 3), flat)  # only its diagonal blocks are used
        groups, _, multiplier, taps = self.depthwise.shape
        square = square.view(groups, square.shape[1], -1, multiplier, square.shape[3] // taps, taps)
        depthwise_grad = square.diagonal(dim1=2, dim2=4).permute(0, 1, 4, 2, 3)
        weight_grad = weight_grad.mul_(self.gate[:, None]).view_as(self.weight)
        return gate_grad, depthwise_grad.reshape(self.depthwise.shape), weight_grad

    @property
    def _block(self) -> int:
        """Block size b; four channels were fastest when measured on the CPU."""
        fan = self.depthwise.shape[1]
        return next(size for size in (4, 2, 1) if fan % size == 0)

    def _blocks(self, weight: Tensor) -> Tensor:
        """View ``[O, F, n]`` as one matrix for each block of channels: ``[g, F/b, O/g, b * n]``."""
        groups, fan = self.depthwise.shape[:2]
        blocks = weight.reshape(groups, len(weight) // groups, fan // self._block, -1)
        return blocks.transpose(1, 2)

    def _diagonal(self) -> Tensor:
        """The depthwise filters as block-diagonal matrices, ``[g, F/b, b * m, b * K]``."""
        groups, fan, multiplier, taps = self.depthwise.shape
        size = self._block
        shape = (groups, fan // size, size, multiplier, size, taps)
        matrix = self.depthwise.new_zeros(shape)
        filters = self.depthwise.view(*shape[:4], taps).permute(0, 1, 3, 4, 2)
        matrix.diagonal(dim1=2, dim2=4).copy_(filters)
        return matrix.view(groups, fan // size, size * multiplier, size * taps)


class Dense(NamedTuple):
    """A branch whose whole kernel was computed before."""

    gate: Tensor
    """The gate, ``[O]``."""
    kernel: Tensor
    """The branch's kernel, ``[O, F, kh, kw]``, or ``[O, I]`` for a linear layer."""

    def add_to(self, total: Tensor, dtype: torch.dtype) -> None:
        """Add the branch's kernel times the gate."""
        total.addcmul_(self.kernel.to(total.dtype), _per_output(self.gate, total))

    def gradients(self, grad: Gradient, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """Gradients of the gate and of the kernel."""
        kernel_grad = (grad.grad * _per_output(self.gate, grad.grad)).to(self.kernel.dtype)
        return _dot_per_output(grad.grad, self.kernel), kernel_grad


class Identity(NamedTuple):
    """The identity branch, which affects a single element of each output's kernel."""

    gate: Tensor
    """The gate, ``[O]``."""
    channels: Tensor
    """The input channel within the group that each output copies, ``[O]``."""

    def add_to(self, total: Tensor, dtype: torch.dtype) -> None:
        """Add the gate at the kernel's centre for the copied channel."""
        total[self._place(total)] += self.gate

    def gradients(self, grad: Gradient, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """Compute the gradient of the gate; the channels, which are indices, have none."""
        return grad.grad[self._place(grad.grad)], None

    def _place(self, kernel: Tensor) -> tuple[Tensor, Tensor, int, int]:
        y, x = ((side - 1) // 2 for side in kernel.shape[2:])
        row = torch.arange(len(self.channels), device=self.channels.device)
        return row, self.channels, y, x


Term = Filtered | PointwiseProduct | DepthwiseProduct | Dense | Identity
"""Any kind of branch.

``add_to(total, dtype)`` adds the gated branch to the kernel ``total``, ``[O, F, kh, kw]`` in any
memory format, in place. ``gradients(grad, dtype)`` computes the gradients of the term's tensors, in
the order of its fields, from the gradient of the sum. ``dtype`` is the dtype of large products.
"""


class _GatedSum(torch.autograd.Function):
    """The autograd node of `gated_sum`: only the terms' tensors are kept for the backward pass."""

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
        # The one buffer in which the sum is taken, in the main kernel's memory format.
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
        # torch.compile would trace the backward pass under the autocast of the forward pass.
        with torch.autocast(grad.device.type, enabled=False):
            for term in _terms(ctx.kinds, tensors):
                found += term.gradients(gradient, ctx.dtype)
            if main_gate is None:
                return None, None, grad, None, *found
            kernel_grad = grad * _per_output(main_gate, grad)
            return None, None, kernel_grad, _dot_per_output(grad, kernel), *found


def gated_sum(kernel: Tensor, main_gate: Tensor | None, terms: Sequence[Term]) -> Tensor:
    """Add gated branches to a kernel: ``kernel[o] + sum_b gate_b[o] * branch_b[o]``.

    Under autocast the product of `PointwiseProduct`, which has by far the most operations, runs in
    autocast's dtype; the sum is taken in the main kernel's dtype.

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
    """Rebuild terms from a flat sequence of tensors: the fields of each term in turn."""
    terms: list[Term] = []
    start = 0
    for kind in kinds:
        end = start + len(kind._fields)
        terms.append(kind._make(tensors[start:end]))
        start = end
    return terms


def _rows_of(kernel: Tensor) -> Tensor:
    """A view of a kernel ``[O, F, kh, kw]`` as ``[O, kh, kw, F]``."""
    return kernel.permute(0, 2, 3, 1)


def _per_output(gate: Tensor, kernel: Tensor) -> Tensor:
    """A gate ``[O]`` as ``[O, 1, ...]``, so that it scales each output of a kernel."""
    return gate.view(-1, *[1] * (kernel.ndim - 1))


def _dot_per_output(first: Tensor, second: Tensor) -> Tensor:
    """``<first[o], second[o]>`` for each output o, ``[O]``."""
    return torch.einsum("o...,o...->o", first, second.to(first.dtype))
