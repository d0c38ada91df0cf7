"""Stop a run whose loss or weights are no longer finite, before it overwrites checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gpd_cli.distill.static_teacher import StaticTeacher, check_logits
from gpd_cli.distributed.world import everywhere
from gpd_cli.errors import TrainingError

_EVERY = 50  # steps between checks, since each check waits for the GPU


class FiniteWatch:
    """Records at every step whether the loss is finite, and checks the record now and then.

    Args:
        teachers: static teachers, whose logits may be the cause.
    """

    def __init__(self, teachers: Sequence[StaticTeacher] = ()) -> None:
        self._finite: Tensor | None = None
        self._teachers = teachers

    def note(self, loss: Tensor, step: int) -> None:
        """Record a step's loss, a scalar.

        Raises:
            ModelError: when a loss since the last check was NaN or infinite because a static
                teacher's logits were.
            TrainingError: when a loss was NaN or infinite for another reason.
        """
        finite = torch.isfinite(loss)
        self._finite = finite if self._finite is None else self._finite & finite
        if step % _EVERY == 0:
            self.check(step)

    def check(self, step: int) -> None:
        """Check all losses since the last check.

        Raises:
            ModelError: see `note`.
            TrainingError: see `note`.
        """
        if self._finite is not None and not everywhere(self._finite):
            check_logits(self._teachers, self._finite.device)
            raise TrainingError(_remedy("The loss", step))


def check_weights(network: nn.Module, step: int) -> None:
    """Check the weights themselves, before they are scored or saved.

    Raises:
        TrainingError: when a weight is NaN or infinite.
    """
    finite = [torch.isfinite(parameter).all() for parameter in network.parameters()]
    if not everywhere(torch.stack(finite).all()):
        raise TrainingError(_remedy("The weights", step))


def _remedy(what: str, step: int) -> str:
    return (
        f"{what} became NaN or infinite by step {step}; lower --model.optimizer.lr, clip gradients "
        "with --trainer.gradient_clip_val 5, or train in 32-bit precision (checkpoints of earlier "
        "epochs are kept)."
    )
