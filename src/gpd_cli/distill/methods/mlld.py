"""Multi-level logit distillation (Jin et al., CVPR 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpd_cli.distill.features import Outputs
from gpd_cli.distill.methods.base import Batch, Method, check_temperature, check_weight
from gpd_cli.distill.methods.kd import kd_loss
from gpd_cli.distill.methods.standardize import standardize_logits
from gpd_cli.distill.precision import full_precision, in_float32
from gpd_cli.errors import MethodError

TEMPERATURES = (2.0, 3.0, 4.0, 5.0, 6.0)
"""The temperatures in the authors' code."""


def gram_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the squared distance of two Gram matrices, divided by their number of rows.

    Args:
        student: a matrix s of the student, ``[N, D]``.
        teacher: a matrix t of the teacher, ``[N, D']``.

    Returns:
        A scalar, ``sum((s s^T - t t^T)^2) / N``.
    """
    with full_precision(student):
        difference = student @ student.T - teacher @ teacher.T
    return difference.square().sum() / len(student)


def mlld_loss(
    student: Tensor,
    teacher: Tensor,
    temperatures: Sequence[float] = TEMPERATURES,
    *,
    instance_weight: float = 1.0,
    batch_weight: float = 1.0,
    class_weight: float = 1.0,
    standardize: bool = False,
) -> Tensor:
    """Multi-level logit distillation (Jin et al., CVPR 2023).

    The sum, over the temperatures, of three weighted losses: `kd_loss` (instance level), and
    `gram_loss` of the probabilities both between images (batch level, ``[B, B]``) and between
    classes (class level, ``[C, C]``).

    Args:
        student: logits, ``[B, C]``.
        teacher: logits, ``[B, C]``.
        temperatures: the temperatures, each more than 0.
        instance_weight: weight of the instance level.
        batch_weight: weight of the batch level.
        class_weight: weight of the class level.
        standardize: whether the instance level compares standardized logits.

    Returns:
        A scalar.
    """
    student, teacher = in_float32(student), in_float32(teacher)
    plain = standardize_logits if standardize else lambda logits: logits
    ours, theirs = plain(student), plain(teacher)
    losses = []
    for temperature in temperatures:
        p, q = (student / temperature).softmax(dim=1), (teacher / temperature).softmax(dim=1)
        losses += [
            instance_weight * kd_loss(ours, theirs, temperature),
            batch_weight * gram_loss(p, q),
            class_weight * gram_loss(p.T, q.T),
        ]
    return torch.stack(losses).sum()


class MLLD(Method):
    """Multi-level logit distillation.

    This is the paper's loss on one view of each image. Two parts of the authors' code are left out:
    a second, strongly augmented view of each image, and a selection of confident images and
    classes. Labels are not used, so mixed images and label smoothing change nothing.

    Args:
        temperatures: temperatures at which the predictions are compared.
        instance_weight: weight of the instance level.
        batch_weight: weight of the batch level.
        class_weight: weight of the class level.
        standardize: whether standardized logits are compared at the instance level (see
            `standardize_logits`; its authors do not standardize at the other two levels).
    """

    def __init__(
        self,
        temperatures: Sequence[float] = TEMPERATURES,
        instance_weight: float = 1.0,
        batch_weight: float = 1.0,
        class_weight: float = 1.0,
        standardize: bool = False,
    ) -> None:
        super().__init__()
        self.temperatures = tuple(temperatures)
        if not self.temperatures:
            raise MethodError(
                "MLLD needs one temperature or more; leave out temperatures for 2, 3, 4, 5 and 6."
            )
        for temperature in self.temperatures:
            check_temperature(temperature)
        for weight in (instance_weight, batch_weight, class_weight):
            check_weight(weight)
        self.instance_weight, self.batch_weight = instance_weight, batch_weight
        self.class_weight, self.standardize = class_weight, standardize

    def forward(self, network: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `mlld_loss`."""
        return mlld_loss(
            network.logits,
            teacher.logits,
            self.temperatures,
            instance_weight=self.instance_weight,
            batch_weight=self.batch_weight,
            class_weight=self.class_weight,
            standardize=self.standardize,
        )
