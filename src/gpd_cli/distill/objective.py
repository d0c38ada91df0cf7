"""The joint objective of student and dynamic teacher, as a pure function of logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from gpd_cli.distill.gap import gap_loss
from gpd_cli.distill.methods.precision import in_float32
from gpd_cli.errors import TrainingError


@dataclass(frozen=True)
class Objective:
    """Weights of the terms that need no static teacher (Guo et al., 2025, equation 2).

    ``L = v * (CE(p_s, y) + CE(p_d, y)) + lambda * SCE(p_s, p_d)``; with a static teacher, the terms
    of `Distillation` are added (section 3.4).

    Args:
        gap_weight: lambda, the weight of the gap loss.
        gap_smoothing: weight of the uniform distribution in the target of the gap loss.
        gap_temperature: temperature of the gap loss.
        gap_warmup_epochs: epochs over which lambda rises to its value, by an equal step in each.
        ce_weight: v, the weight of the cross-entropy with the labels.
        label_smoothing: smoothing of the labels.

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
                raise TrainingError(f"--model.{name} must not be negative.")
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
        """The weighted terms by name; the loss is their sum.

        Args:
            student: logits, ``[B, C]``.
            dynamic_teacher: logits, ``[B, C]``, or None for a student trained alone.
            labels: class numbers, ``[B]``, or soft labels, ``[B, C]``.
            epoch: number of finished epochs; None for after the warm-up of lambda.

        Returns:
            Scalars: ``student_ce``, and with a dynamic teacher ``teacher_ce`` and ``gap``; terms
            of weight zero are left out.
        """
        return self.weighted(self.losses(student, dynamic_teacher, labels), epoch)

    def losses(
        self, student: Tensor, dynamic_teacher: Tensor | None, labels: Tensor
    ) -> dict[str, Tensor]:
        """The terms without their weights, which may be compiled: none of them knows the epoch.

        Args:
            student: the student's logits, ``[B, C]``.
            dynamic_teacher: the teacher's logits, ``[B, C]``; None for a student trained alone.
            labels: class numbers, ``[B]``, or soft labels, ``[B, C]``.

        Returns:
            Scalars in float32 or better, by the names of `terms`.
        """
        networks = {"student": in_float32(student)}
        if dynamic_teacher is not None:
            networks["teacher"] = in_float32(dynamic_teacher)
        if labels.is_floating_point():
            labels = in_float32(labels)
        losses: dict[str, Tensor] = {}
        if self.ce_weight:
            for name, logits in networks.items():
                losses[f"{name}_ce"] = F.cross_entropy(
                    logits, labels, label_smoothing=self.label_smoothing
                )
        if dynamic_teacher is not None and self.gap_weight:
            losses["gap"] = gap_loss(
                student, dynamic_teacher, self.gap_smoothing, self.gap_temperature
            )
        return losses

    def weighted(self, losses: dict[str, Tensor], epoch: int | None = None) -> dict[str, Tensor]:
        """The terms: each loss times its weight.

        Args:
            losses: the terms without their weights, by name, from `losses`.
            epoch: number of finished epochs; None for after the warm-up of lambda.
        """
        gap = self.gap_weight * warmed_up(epoch, self.gap_warmup_epochs)
        return {n: (gap if n == "gap" else self.ce_weight) * loss for n, loss in losses.items()}


def warmed_up(epoch: int | None, epochs: int) -> float:
    """The factor of a weight that rises to 1 by an equal step in each epoch.

    Args:
        epoch: number of finished epochs; None for after the warm-up.
        epochs: number of warm-up epochs; in the last one the factor is 1.

    Example:
        >>> [warmed_up(epoch, 4) for epoch in range(6)]
        [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """
    return 1.0 if epoch is None else min(1.0, (epoch + 1) / max(1, epochs))
