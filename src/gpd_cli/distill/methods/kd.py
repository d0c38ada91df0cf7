"""Knowledge distillation (Hinton et al., 2015), on plain or standardized logits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from gpd_cli.distill.features import Outputs
from gpd_cli.distill.methods.base import Batch, Method, check_temperature
from gpd_cli.distill.methods.standardize import standardize_logits
from gpd_cli.distill.precision import in_float32


def kd_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Knowledge distillation (Hinton et al., 2015, arXiv 1503.02531).

    ``T^2 * KL(softmax(teacher / T) || softmax(student / T))``

    Args:
        student: logits, ``[B, C]``.
        teacher: logits, ``[B, C]``.
        temperature: T, more than 0.

    Returns:
        A scalar.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[1.0, 0.0, 2.0]])
        >>> loss = kd_loss(logits + 5, logits)  # softmax ignores what all logits have in common
        >>> bool(loss.abs() < 1e-6)
        True
    """
    divergence = F.kl_div(
        F.log_softmax(in_float32(student) / temperature, dim=1),
        F.log_softmax(in_float32(teacher) / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return divergence * temperature**2


class KD(Method):
    """Knowledge distillation.

    Args:
        temperature: temperature that softens both distributions.
        standardize: whether standardized logits are compared (see `standardize_logits`).
    """

    def __init__(self, temperature: float = 4.0, standardize: bool = False) -> None:
        super().__init__()
        check_temperature(temperature)
        self.temperature, self.standardize = temperature, standardize

    def forward(self, network: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `kd_loss`; labels are not used."""
        ours, theirs = network.logits, teacher.logits
        if self.standardize:
            ours, theirs = standardize_logits(ours), standardize_logits(theirs)
        return kd_loss(ours, theirs, self.temperature)
