"""The joint objective of student and dynamic teacher, as a pure function of logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from gpd_cli.distill.gap import gap_loss
from gpd_cli.distill.precision import cross_entropy
from gpd_cli.errors import TrainingError


@dataclass(frozen=True)
class Objective:
    """The terms of the joint loss that need no static teacher, and their weights.

    ``L = v * (CE(p_s, y) + CE(p_d, y)) + lambda * SCE(p_s, p_d)`` (Guo et al., 2025, equation 2),
    with the logits p_s of the student, p_d of the dynamic teacher, and the labels y. CE is the
    cross-entropy, and SCE is `gap_loss`. With a static teacher, the terms of `Distillation` are
    added (section 3.4).

    Args:
        gap_weight: lambda, the weight of the gap loss.
        gap_smoothing: weight of the uniform distribution in the target of the gap loss.
        gap_temperature: temperature of the gap loss.
        gap_warmup_epochs: number of epochs over which lambda rises to its value, by an equal step
            in each.
        ce_weight: v, the weight of the cross-entropy with the labels.
        label_smoothing: weight of the uniform distribution in the labels.

    Raises:
        TrainingError: when a weight or a number of epochs is negative, a smoothing is not in
            [0, 1), or the temperature is not above 0.
    """

    gap_weight: float = 3.0
    gap_smoothing: float = 0.1
    gap_temperature: float = 1.0
    gap_warmup_epochs: int = 0
    ce_weight: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("gap_weight", "ce_weight", "gap_warmup_epochs"):
            if not getattr(self, name) >= 0:
                raise TrainingError(f"--model.{name} must be 0 or more, not {getattr(self, name)}.")
        for name in ("gap_smoothing", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise TrainingError(f"--model.{name} must be in [0, 1), not {getattr(self, name)}.")

        if not 0 < self.gap_temperature < math.inf:
            raise TrainingError(
                f"--model.gap_temperature must be above 0, not {self.gap_temperature}."
            )

    def terms(
        self,
        student: Tensor,
        dynamic_teacher: Tensor | None,
        labels: Tensor,
        epoch: int | None = None,
    ) -> dict[str, Tensor]:
        """Compute the weighted terms of the loss, which is their sum.

        Args:
            student: the student's logits, ``[B, C]``.
            dynamic_teacher: the teacher's logits, ``[B, C]``; None for a student trained alone.
            labels: class numbers, ``[B]``, or soft labels, ``[B, C]``.
            epoch: number of finished epochs; None for full lambda, as after the warm-up.

        Returns:
            Scalars by name: ``student_ce``, and with a dynamic teacher ``teacher_ce`` and ``gap``.
            Terms of weight zero are left out.
        """
        return self.weighted(self.losses(student, dynamic_teacher, labels), epoch)

    def losses(
        self, student: Tensor, dynamic_teacher: Tensor | None, labels: Tensor
    ) -> dict[str, Tensor]:
        """Compute the terms without their weights.

        Since no term depends on the epoch, this method may be compiled.

        Args:
            student: the student's logits, ``[B, C]``.
            dynamic_teacher: the teacher's logits, ``[B, C]``; None for a student trained alone.
            labels: class numbers, ``[B]``, or soft labels, ``[B, C]``.

        Returns:
            Scalars in float32 or better, by the names of `terms`.
        """
        networks = {"student": student}
        if dynamic_teacher is not None:
            networks["teacher"] = dynamic_teacher
        losses: dict[str, Tensor] = {}
        if self.ce_weight:
            for name, logits in networks.items():
                losses[f"{name}_ce"] = cross_entropy(logits, labels, self.label_smoothing)
        if dynamic_teacher is not None and self.gap_weight:
            losses["gap"] = gap_loss(
                student, dynamic_teacher, self.gap_smoothing, self.gap_temperature
            )
        return losses

    def weighted(self, losses: dict[str, Tensor], epoch: int | None = None) -> dict[str, Tensor]:
        """Multiply each term by its weight.

        Args:
            losses: the terms without their weights, by name, from the method `losses`.
            epoch: number of finished epochs; None for full lambda, as after the warm-up.
        """
        gap = self.gap_weight * warmed_up(epoch, self.gap_warmup_epochs)
        return {n: (gap if n == "gap" else self.ce_weight) * loss for n, loss in losses.items()}


def warmed_up(epoch: int | None, epochs: int) -> float:
    """Compute the warm-up factor of a weight, which rises to 1 by an equal step in each epoch.

    Args:
        epoch: number of finished epochs; None for a factor of 1, as after the warm-up.
        epochs: number of warm-up epochs; in the last one the factor is already 1.

    Example:
        >>> [warmed_up(epoch, 4) for epoch in range(6)]
        [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """
    return 1.0 if epoch is None else min(1.0, (epoch + 1) / max(1, epochs))
