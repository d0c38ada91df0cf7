"""The joint objective of student and dynamic teacher, as a pure function of logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from gpd_cli.losses import StaticTeacherLoss, gap_loss


@dataclass(frozen=True)
class Objective:
    """Weights of the objective's terms (Guo et al., 2025, equation 2 and section 3.4).

    ``L = CE(p_s, y) + CE(p_d, y) + w * (KD(p_s, T) + KD(p_d, T)) + lambda * SCE(p_s, p_d)``

    Args:
        gap_weight: lambda, the weight of what the student learns from the dynamic teacher.
        gap_smoothing: the share of the uniform distribution in that target.
        static_weight: w, the weight of the static teacher's terms.
        method: the static teacher's loss.
        label_smoothing: smoothing of the labels in the cross-entropy terms.
    """

    gap_weight: float = 3.0
    gap_smoothing: float = 0.1
    static_weight: float = 1.0
    method: StaticTeacherLoss | None = None
    label_smoothing: float = 0.0

    def terms(
        self,
        student: Tensor,
        dynamic_teacher: Tensor | None,
        static_teacher: Tensor | None,
        labels: Tensor,
    ) -> dict[str, Tensor]:
        """The weighted terms by name; the loss is their sum.

        Args:
            student: logits, ``[B, C]``.
            dynamic_teacher: logits, ``[B, C]``, or None for a student trained alone.
            static_teacher: logits, ``[B, C]``, or None without one.
            labels: class numbers, ``[B]``, or soft labels, ``[B, C]``.

        Returns:
            Scalars: ``student_ce``, and where they apply ``teacher_ce``, ``student_static``,
            ``teacher_static`` and ``gap``.
        """
        networks = {"student": student}
        if dynamic_teacher is not None:
            networks["teacher"] = dynamic_teacher
        terms: dict[str, Tensor] = {}
        for name, logits in networks.items():
            terms[f"{name}_ce"] = F.cross_entropy(
                logits, labels, label_smoothing=self.label_smoothing
            )
            if static_teacher is not None and self.method is not None:
                loss = self.method(logits, static_teacher, labels)
                terms[f"{name}_static"] = self.static_weight * loss
        if dynamic_teacher is not None and self.gap_weight:
            loss = gap_loss(student, dynamic_teacher, self.gap_smoothing)
            terms["gap"] = self.gap_weight * loss
        return terms
