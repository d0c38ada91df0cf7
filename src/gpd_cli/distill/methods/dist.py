"""Knowledge distillation from a stronger teacher: DIST (Huang et al., NeurIPS 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from gpd_cli.distill.features import Outputs
from gpd_cli.distill.methods.base import Batch, Method, check_temperature, check_weight
from gpd_cli.distill.precision import in_float32

_LEAST = 1e-4
"""Smallest norm to divide by, since the probabilities of a new classifier may all be equal."""


def pearson(one: Tensor, other: Tensor) -> Tensor:
    """Compute Pearson's correlation of two matrices, row by row.

    A constant row has the correlation 0, and a nearly constant row (with a norm below 1e-4 after
    its mean is subtracted) a correlation close to 0. The authors' code instead adds 1e-8 to the
    product of the norms; there the gradient explodes if one of two rows is constant.

    Args:
        one: a matrix, ``[N, D]``.
        other: another matrix, ``[N, D]``.

    Returns:
        The correlations, ``[N]``, between -1 and 1.

    Example:
        >>> one, other = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[4.0, 2.0, 0.0]])
        >>> pearson(one, other).round(decimals=4)
        tensor([-1.])
    """
    one, other = (x - x.mean(dim=1, keepdim=True) for x in (one, other))
    norms: list[Tensor] = [
        torch.linalg.vector_norm(x, dim=1).clamp(min=_LEAST) for x in (one, other)
    ]
    return (one * other).sum(dim=1) / (norms[0] * norms[1])


def dist_loss(
    student: Tensor,
    teacher: Tensor,
    beta: float = 2.0,
    gamma: float = 2.0,
    temperature: float = 1.0,
) -> Tensor:
    """DIST (Huang et al., NeurIPS 2022, arXiv 2205.10536).

    ``T^2 * (beta * inter + gamma * intra)``. Both terms are one minus the mean correlation of the
    two networks' probabilities: inter correlates over the classes for each image, and intra over
    the images for each class.

    Args:
        student: logits, ``[B, C]``.
        teacher: logits, ``[B, C]``.
        beta: weight of the inter-class relation (between the classes, for each image).
        gamma: weight of the intra-class relation (between the images, for each class).
        temperature: T, more than 0.

    Returns:
        A scalar.
    """
    ours, theirs = (
        (in_float32(logits) / temperature).softmax(dim=1) for logits in (student, teacher)
    )
    inter = 1 - pearson(ours, theirs).mean()
    intra = 1 - pearson(ours.T, theirs.T).mean()
    return (beta * inter + gamma * intra) * temperature**2


class DIST(Method):
    """DIST: predictions have to correlate with the teacher's, but not to be equal to them.

    The default settings are taken from the authors' ImageNet runs. Labels are not used, so mixed
    images and label smoothing change nothing. Correlations over images use the local batch only.

    Args:
        beta: weight of the inter-class relation.
        gamma: weight of the intra-class relation.
        temperature: temperature that softens both distributions (4 in the runs on CIFAR-100).
    """

    def __init__(self, beta: float = 2.0, gamma: float = 2.0, temperature: float = 1.0) -> None:
        super().__init__()
        check_temperature(temperature)
        for weight in (beta, gamma):
            check_weight(weight)
        self.beta, self.gamma, self.temperature = beta, gamma, temperature

    def forward(self, network: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `dist_loss`."""
        return dist_loss(network.logits, teacher.logits, self.beta, self.gamma, self.temperature)
