"""Stop a run that is no longer finite before it overwrites what it has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gpd_cli.distill.static_teacher import StaticTeacher, check_logits
from gpd_cli.distributed.world import everywhere
from gpd_cli.errors import TrainingError

_EVERY = 50  # steps between looks: each one waits for the GPU


class FiniteWatch:
    """Notes at every step whether the loss is finite, and looks at the note now and then.

    Args:
        teachers: static teachers, whose logits may be to blame.
    """

    def __init__(self, teachers: Sequence[StaticTeacher] = ()) -> None:
        self._finite: Tensor | None = None
        self._teachers = teachers

    def note(self, loss: Tensor, step: int) -> None:
        """Take note of a step's loss, a scalar.

        Raises:
            ModelError: when the loss is, or was since the last look, NaN or infinite because the
                logits of a static teacher were.
            TrainingError: when it was for another reason.
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
        if self._finite is not None and not everywhere(self._finite):
            check_logits(self._teachers, self._finite.device)
            raise TrainingError(_remedy("The loss", step))


def check_weights(network: nn.Module, step: int) -> None:
    """Look at the weights themselves, before they are scored or saved.

    Raises:
        TrainingError: when one of them is NaN or infinite.
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
