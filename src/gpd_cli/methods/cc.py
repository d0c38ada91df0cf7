"""Correlation congruence (Peng et al., ICCV 2019)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpd_cli.errors import MethodError
from gpd_cli.features import Outputs, Places
from gpd_cli.methods.base import Batch, Method, check_weight
from gpd_cli.methods.embeddings import check_embeddings, connect, cosines, embeddings


def correlations(embedding: Tensor, gamma: float = 0.4, order: int = 2) -> Tensor:
    """A Gaussian kernel of unit vectors, by its Taylor series.

    ``exp(-gamma |x - y|^2)`` is ``exp(-2 gamma) * exp(2 gamma x.y)`` where x and y are of length 1,
    and the second factor is ``sum_p (2 gamma)^p / p! (x.y)^p``, here up to the order.

    Args:
        embedding: ``[B, F]``; their lengths do not matter.
        gamma: of the kernel.
        order: the largest power.

    Returns:
        ``[B, B]``.
    """
    similarity = cosines(embedding)
    terms = [(2 * gamma) ** p / math.factorial(p) * similarity**p for p in range(order + 1)]
    return math.exp(-2 * gamma) * torch.stack(terms).sum(dim=0)


def cc_loss(student: Tensor, teacher: Tensor, gamma: float = 0.4, order: int = 2) -> Tensor:
    """Correlation congruence (Peng et al., ICCV 2019, arXiv 1904.01802).

    The mean over all pairs in the batch of the squared difference of their `correlations`.

    Args:
        student: embeddings, ``[B, F]``.
        teacher: embeddings, ``[B, F']``.
        gamma: of the kernel.
        order: of the Taylor series.

    Returns:
        A scalar.
    """
    return F.mse_loss(correlations(student, gamma, order), correlations(teacher, gamma, order))


class CC(Method):
    """Correlation congruence on embeddings, each behind a linear layer of its own.

    Both layers are trained. As the kernel compares images of one network at a time, it needs no
    common width: ``feat_dim: null`` compares the embeddings themselves, whose correlations no layer
    can make alike. Labels are not used, so mixed images and label smoothing change nothing.

    Args:
        feat_dim: width of the linear layers; null for none.
        gamma: of the Gaussian kernel, more than 0.
        order: of its Taylor series, 1 or more.
        weight: of the loss; the default is ours, as the loss is a mean of squares of small numbers.
    """

    needs = frozenset({"embedding"})

    def __init__(
        self,
        feat_dim: int | None = 128,
        gamma: float = 0.4,
        order: int = 2,
        weight: float = 100.0,
    ) -> None:
        super().__init__()
        if feat_dim is not None and feat_dim < 1:
            raise MethodError(f"The width of the linear layers must be 1 or more, not {feat_dim}.")
        if not gamma > 0:
            raise MethodError(f"The kernel's gamma must be more than 0, not {gamma}.")
        if order < 1:
            raise MethodError(f"The order of the Taylor series must be 1 or more, not {order}.")
        check_weight(weight)
        self.feat_dim, self.gamma, self.order, self.weight = feat_dim, gamma, order, weight

    def build(self, network: Places, teacher: Places) -> None:
        """Make the linear layers.

        Raises:
            MethodError: when a network has no embedding.
        """
        check_embeddings(self, network, teacher)
        if self.feat_dim is not None:
            self.student_layer = nn.Linear(network.embedding, self.feat_dim)
            self.teacher_layer = nn.Linear(teacher.embedding, self.feat_dim)

    def forward(self, network: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `cc_loss`."""
        ours, theirs = embeddings(network, teacher)
        if self.feat_dim is not None:
            ours, theirs = connect(self.student_layer, ours), connect(self.teacher_layer, theirs)
        return self.weight * cc_loss(ours, theirs, self.gamma, self.order)
