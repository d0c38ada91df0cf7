"""A student whose activations are not kept: the backward pass computes them again.

A joint step keeps the activations of both networks until the backward pass. With a student that
runs first, and again once the teacher's activations are gone, the two are never kept together: a
joint step keeps the activations of the wide network alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import cast

from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from gpd_cli.teacher.buffers import copied_buffers
from gpd_cli.teacher.random_states import RandomStates, states_kept


def recomputed(network: nn.Module, weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Run a network on given weights, to be run again in the backward pass.

    The second run has the same random draws as the first (dropout, dropped paths), whether from
    torch, Python or NumPy, begins from the values that the buffers had before the first, and leaves
    buffers and generators alone.

    Args:
        network: the student.
        weights: its weights by name.
        images: ``[B, C, H, W]``.

    Returns:
        The logits, ``[B, C]``.
    """

    def run(images: Tensor) -> Tensor:
        return cast(Tensor, functional_call(network, dict(weights), (images,)))

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        before = [(module, copied_buffers(module)) for module in network.modules()]
        return nullcontext(), _as_before(before, RandomStates.now())

    return checkpoint(run, images, use_reentrant=False, context_fn=contexts)


@contextmanager
def _as_before(
    before: list[tuple[nn.Module, dict[str, Tensor | None]]], states: RandomStates
) -> Iterator[None]:
    """Let modules run on the buffers and draw the random numbers of before.

    Torch's generators are the checkpoint's concern.
    """
    own = [(module, dict(module._buffers)) for module, _ in before]
    for module, buffers in before:
        module._buffers.update(buffers)
    try:
        with states_kept(states):
            yield
    finally:
        for module, buffers in own:
            module._buffers.update(buffers)


def has_hooks(module: nn.Module) -> bool:
    """Whether something reads a module's inputs or outputs while it runs.

    Args:
        module: a module.
    """
    return bool(module._forward_hooks or module._forward_pre_hooks)
