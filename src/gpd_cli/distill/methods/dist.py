"""Knowledge distillation from a stronger teacher: DIST (Huang et al., NeurIPS 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from gpd_cli.distill.features import Outputs
from gpd_cli.distill.methods.base import Batch, Method, check_temperature, check_weight
from gpd_cli.distill.methods.precision import in_float32

_LEAST = 1e-4
"""Smallest norm to divide by: the probabilities of a fresh head may all be equal."""


def pearson(one: Tensor, other: Tensor) -> Tensor:
    """Pearson's correlation of two matrices, row by row.

    Rows that are constant, or nearly so (norms below 1e-4), count as uncorrelated, or nearly so.
    The authors' code adds 1e-8 to the product of the norms instead, whose gradient explodes where
    one of two rows is constant.

    Args:
        one: ``[N, D]``.
        other: ``[N, D]``.

    Returns:
        ``[N]``, between -1 and 1.

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

    ``T^2 * (beta * inter + gamma * intra)``: one minus the mean correlation of the two networks'
    probabilities over the classes, image by image, and over the images, class by class.

    Args:
        student: logits, ``[B, C]``.
        teacher: logits, ``[B, C]``.
        beta: weight of the inter-class relation (of the classes in an image).
        gamma: weight of the intra-class relation (of the images in a class).
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
    """DIST: predictions have to correlate, not to be equal; defaults of the ImageNet runs.

    Labels are not used, so mixed images and label smoothing change nothing. Correlations over
    images use the local batch only.

    Args:
        beta: weight of the inter-class relation.
        gamma: weight of the intra-class relation.
        temperature: softens both distributions (4 on CIFAR-100).
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
