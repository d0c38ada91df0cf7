"""Decoupled knowledge distillation (Zhao et al., CVPR 2022)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gpd_cli.distill.features import Outputs
from gpd_cli.distill.methods.base import Batch, Method, check_temperature, check_weight
from gpd_cli.distill.methods.pairs import ByPair, one_value
from gpd_cli.distill.methods.standardize import standardize_logits
from gpd_cli.distill.precision import in_float32


def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
) -> Tensor:
    """Decoupled knowledge distillation (Zhao et al., CVPR 2022, arXiv 2203.08679, equation 7).

    ``T^2 * (alpha * TCKD + beta * NCKD)``, with two divergences of the teacher's from the student's
    probabilities: TCKD compares the target class with all others taken together, and NCKD compares
    the distributions among the other classes.

    Args:
        student: logits, ``[B, C]``.
        teacher: logits, ``[B, C]``.
        labels: class numbers, ``[B]``; or soft labels, ``[B, C]``, whose largest entry is the
            target class (as in the GPD authors' code under mixup).
        alpha: weight of the target-class term.
        beta: weight of the non-target term.
        temperature: T, more than 0.

    Returns:
        A scalar.

    Example:
        >>> student, teacher = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[3.0, 0.0, 1.0]])
        >>> others = dkd_loss(student, teacher, torch.tensor([0]), 0.0, 1.0, temperature=1.0)
        >>> bool(others.abs() < 1e-6)  # they agree about the classes besides the label
        True
    """
    target = labels if labels.ndim == 1 else labels.argmax(dim=1)
    is_target = F.one_hot(target, student.shape[1]).bool()
    log_student = F.log_softmax(in_float32(student) / temperature, dim=1)
    log_teacher = F.log_softmax(in_float32(teacher) / temperature, dim=1)
    binary = F.kl_div(
        _target_and_rest(log_student, is_target),
        _target_and_rest(log_teacher, is_target),
        reduction="batchmean",
        log_target=True,
    )
    others = F.kl_div(
        _among_rest(log_student, is_target),
        _among_rest(log_teacher, is_target),
        reduction="batchmean",
        log_target=True,
    )
    return (alpha * binary + beta * others) * temperature**2


class DKD(Method):
    """Decoupled knowledge distillation, by default with the settings of the GPD authors' ResNet-18.

    Under mixup the target class is the one with the largest weight, as in the GPD authors' runs.

    Args:
        alpha: weight of the target-class term.
        beta: weight of the non-target term (0.5 for ResNet-18, 2 for MobileNet V1); a configuration
            may have a table with a value for each pair of teacher and student instead.
        temperature: temperature that softens both distributions.
        standardize: whether standardized logits are compared (see `standardize_logits`).
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float | ByPair = 0.5,
        temperature: float = 1.0,
        standardize: bool = False,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        self.alpha, self.beta = alpha, one_value("beta", beta)
        for weight in (self.alpha, self.beta):
            check_weight(weight)
        self.temperature, self.standardize = temperature, standardize

    def forward(self, network: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `dkd_loss`."""
        ours, theirs = network.logits, teacher.logits
        if self.standardize:
            ours, theirs = standardize_logits(ours), standardize_logits(theirs)
        return dkd_loss(ours, theirs, batch.target, self.alpha, self.beta, self.temperature)


def _target_and_rest(log_probabilities: Tensor, is_target: Tensor) -> Tensor:
    """Log-probabilities of the target class and of all others together, ``[B, 2]``."""
    target = log_probabilities[is_target]
    rest = log_probabilities.masked_fill(is_target, -torch.inf).logsumexp(dim=1)
    return torch.stack([target, rest], dim=1)


def _among_rest(log_probabilities: Tensor, is_target: Tensor) -> Tensor:
    """Log-probabilities of the other classes if the target is left out, ``[B, C - 1]``."""
    rows, classes = log_probabilities.shape
    rest = log_probabilities[~is_target].reshape(rows, classes - 1)
    return F.log_softmax(rest, dim=1)
