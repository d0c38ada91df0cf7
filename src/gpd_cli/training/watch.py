"""Stop a run that is no longer finite before it overwrites what it has."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpd_cli.errors import TrainingError
from gpd_cli.processes import world_size

_EVERY = 50  # steps between looks: each one waits for the GPU


class FiniteWatch:
    """Notes at every step whether the loss is finite, and looks at the note now and then."""

    def __init__(self) -> None:
        self._finite: Tensor | None = None

    def note(self, loss: Tensor, step: int) -> None:
        """Take note of a step's loss, a scalar.

        Raises:
            TrainingError: when the loss is, or was since the last look, NaN or infinite.
        """
        finite = torch.isfinite(loss)
        self._finite = finite if self._finite is None else self._finite & finite
        if step % _EVERY == 0:
            self.check(step)

    def check(self, step: int) -> None:
        """Look now.

        Raises:
            TrainingError: as `note`.
        """
        if self._finite is not None and not _everywhere(self._finite):
            raise TrainingError(_remedy("The loss", step))


def check_weights(network: nn.Module, step: int) -> None:
    """Look at the weights themselves, before they are scored or saved.

    Raises:
        TrainingError: when one of them is NaN or infinite.
    """
    finite = [torch.isfinite(parameter).all() for parameter in network.parameters()]
    if not _everywhere(torch.stack(finite).all()):
        raise TrainingError(_remedy("The weights", step))


def _everywhere(finite: Tensor) -> bool:
    """Whether all processes found so; all have to ask, after the same step."""
    if world_size() == 1:
        return bool(finite)
    flag = finite.to(torch.int32)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def _remedy(what: str, step: int) -> str:
    return (
        f"{what} became NaN or infinite by step {step}; lower --model.optimizer.lr, clip gradients "
        "with --trainer.gradient_clip_val 5, or train in 32-bit precision (checkpoints of earlier "
        "epochs are kept)."
    )
