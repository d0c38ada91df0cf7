"""Save memory: the backward pass computes the student's activations again.

A joint step otherwise keeps the activations of both networks until the backward pass. Here the
student runs first without keeping its activations, and runs again in the backward pass once those
of the teacher are gone. So the two networks' activations are never in memory together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpd_cli.generators import GeneratorStates, states_kept
from gpd_cli.teacher.buffers import copied_buffers
from gpd_cli.teacher.with_weights import with_weights


def recomputed(network: nn.Module, weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Run a network without keeping its activations, and again in the backward pass.

    The second run makes the same random draws as the first (dropout, dropped paths), whether from
    torch, Python or NumPy. It begins from the values that the buffers had before the first run, and
    leaves buffers and generators unchanged.

    Args:
        network: the student.
        weights: the student's weights by name.
        images: a batch, ``[B, C, H, W]``.

    Returns:
        The logits, ``[B, classes]``.
    """

    def run(images: Tensor) -> Tensor:
        return with_weights(network, weights, images)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        before = [(module, copied_buffers(module)) for module in network.modules()]
        return nullcontext(), _as_before(before, GeneratorStates.now())

    return checkpoint(run, images, use_reentrant=False, context_fn=contexts)


@contextmanager
def _as_before(
    before: list[tuple[nn.Module, dict[str, Tensor | None]]], states: GeneratorStates
) -> Iterator[None]:
    """Within this context, give modules their earlier buffers, and generators their earlier states.

    The states of torch's generators are restored by `torch.utils.checkpoint`.

    Args:
        before: modules, each with copies of its buffers before the first run.
        states: states of Python's and NumPy's generators before the first run.
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
