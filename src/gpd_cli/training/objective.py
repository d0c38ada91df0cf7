"""The joint objective of student and dynamic teacher, as a pure function of logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from gpd_cli.errors import TrainingError
from gpd_cli.losses import gap_loss


@dataclass(frozen=True)
class Objective:
    """Weights of the terms that need no static teacher (Guo et al., 2025, equation 2).

    ``L = v * (CE(p_s, y) + CE(p_d, y)) + lambda * SCE(p_s, p_d)``; to these come the terms of
    `Distillation` where there is a static teacher (section 3.4).

    Args:
        gap_weight: lambda, the weight of what the student learns from the dynamic teacher.
        gap_smoothing: the share of the uniform distribution in that target.
        ce_weight: v, the weight of the labels.
        label_smoothing: smoothing of the labels.

    Raises:
        TrainingError: when a weight is negative, or a smoothing is not in [0, 1).
    """

    gap_weight: float = 3.0
    gap_smoothing: float = 0.1
    ce_weight: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("gap_weight", "ce_weight"):
            if not getattr(self, name) >= 0:
                raise TrainingError(f"--model.{name} must not be negative.")
        for name in ("gap_smoothing", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise TrainingError(f"--model.{name} must be in [0, 1), not {getattr(self, name)}.")

    def terms(
        self, student: Tensor, dynamic_teacher: Tensor | None, labels: Tensor
    ) -> dict[str, Tensor]:
        """The weighted terms by name; the loss is their sum.

        Args:
            student: logits, ``[B, C]``.
            dynamic_teacher: logits, ``[B, C]``, or None for a student trained alone.
            labels: class numbers, ``[B]``, or soft labels, ``[B, C]``.

        Returns:
            Scalars: ``student_ce``, and where they apply ``teacher_ce`` and ``gap``.
        """
        networks = {"student": student}
        if dynamic_teacher is not None:
            networks["teacher"] = dynamic_teacher
        terms: dict[str, Tensor] = {}
        if self.ce_weight:
            for name, logits in networks.items():
                loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
                terms[f"{name}_ce"] = self.ce_weight * loss
        if dynamic_teacher is not None and self.gap_weight:
            loss = gap_loss(student, dynamic_teacher, self.gap_smoothing)
            terms["gap"] = self.gap_weight * loss
        return terms
