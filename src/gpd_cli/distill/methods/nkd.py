"""Normalized knowledge distillation (Yang et al., ICCV 2023)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from gpd_cli.distill.features import Outputs
from gpd_cli.distill.methods.base import Batch, Method, check_temperature, check_weight
from gpd_cli.distill.precision import in_float32


def nkd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    gamma: float = 1.5,
    temperature: float = 1.0,
) -> Tensor:
    """Normalized knowledge distillation (Yang et al., ICCV 2023, arXiv 2303.13005).

    ``-T_t log S_t - gamma * l^2 * sum_i N(T_i) log N(S_i)``, with the probabilities T of the
    teacher and S of the student, the target class t and the other classes i. N(...) is the
    distribution among the other classes at temperature l. The paper's first term, the cross-entropy
    with the label, is left out here, since it is part of `Objective`.

    Args:
        student: logits, ``[B, C]``.
        teacher: logits, ``[B, C]``.
        target: class numbers, ``[B]``.
        gamma: weight of the non-target term.
        temperature: temperature l of the non-target term, more than 0.

    Returns:
        A scalar.
    """
    student, teacher = in_float32(student), in_float32(teacher)
    is_target = F.one_hot(target, student.shape[1]).bool()
    certainty = teacher.softmax(dim=1)[is_target]
    target_term = -(certainty * student.log_softmax(dim=1)[is_target]).mean()
    ours, theirs = (
        logits[~is_target].reshape(len(logits), -1) / temperature for logits in (student, teacher)
    )
    other_term = -(theirs.softmax(dim=1) * ours.log_softmax(dim=1)).sum(dim=1).mean()
    return target_term + gamma * temperature**2 * other_term


class NKD(Method):
    """Normalized knowledge distillation, by default with the settings of the authors' runs.

    These are the runs on CIFAR-100 and ImageNet. Under mixup the target class is the one with the
    largest weight, as in the authors' code. Label smoothing does not change this loss.

    Args:
        gamma: weight of the non-target term.
        temperature: temperature that softens the distributions among the other classes.
    """

    def __init__(self, gamma: float = 1.5, temperature: float = 1.0) -> None:
        super().__init__()
        check_temperature(temperature)
        check_weight(gamma)
        self.gamma, self.temperature = gamma, temperature

    def forward(self, network: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `nkd_loss`."""
        return nkd_loss(network.logits, teacher.logits, batch.target, self.gamma, self.temperature)
