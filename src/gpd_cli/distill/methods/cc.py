"""Correlation congruence (Peng et al., ICCV 2019)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpd_cli.distill.features import FeatureInfo, Outputs
from gpd_cli.distill.methods.base import Batch, Method, check_weight
from gpd_cli.distill.methods.embeddings import check_embeddings, connect, cosines, embeddings
from gpd_cli.distill.precision import in_float32
from gpd_cli.errors import MethodError

_WEIGHT, _KERNEL_WEIGHT = 0.02, 100.0


def cc_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Correlation congruence as in the tables of the CIFAR-100 literature.

    ``mean_i(sum_f |d_i| |d_(i+1)|)``, where d_i is the difference of the two networks' embeddings
    of image i, and i + 1 is the next image in the batch. This is not the loss of the paper, but the
    loss in the published code of Tian et al. (ICLR 2020), which they had from the paper's authors.

    Args:
        student: embeddings, ``[B, F]``.
        teacher: embeddings, ``[B, F]``.

    Returns:
        A scalar; 0 for a single image.
    """
    distances = (in_float32(student) - in_float32(teacher)).abs()
    products = (distances[:-1] * distances[1:]).sum(dim=1)
    return products.sum() / max(1, len(products))


def correlations(embedding: Tensor, gamma: float = 0.4, order: int = 2) -> Tensor:
    """Compute a Gaussian kernel between all pairs of embeddings, by its Taylor series.

    If x and y have length 1, then ``exp(-gamma |x - y|^2)`` is
    ``exp(-2 gamma) * exp(2 gamma x.y)``. The second factor is the series
    ``sum_p (2 gamma)^p / p! (x.y)^p``, which is taken up to the given order.

    Args:
        embedding: embeddings, ``[B, F]``, which are divided by their lengths first.
        gamma: gamma of the kernel.
        order: the largest power p.

    Returns:
        The values of the kernel, ``[B, B]``.
    """
    similarity = cosines(embedding)
    terms = [(2 * gamma) ** p / math.factorial(p) * similarity**p for p in range(order + 1)]
    return math.exp(-2 * gamma) * torch.stack(terms).sum(dim=0)


def kernel_loss(student: Tensor, teacher: Tensor, gamma: float = 0.4, order: int = 2) -> Tensor:
    """Correlation congruence as in the paper (Peng et al., ICCV 2019, arXiv 1904.01802).

    The mean, over all pairs of images in the batch, of the squared difference between the student's
    and the teacher's `correlations`.

    Args:
        student: embeddings, ``[B, F]``.
        teacher: embeddings, ``[B, F']``.
        gamma: gamma of the kernel.
        order: order of the Taylor series.

    Returns:
        A scalar.
    """
    return F.mse_loss(correlations(student, gamma, order), correlations(teacher, gamma, order))


class CC(Method):
    """Correlation congruence on embeddings, after a trained linear layer for each network.

    The static teacher's embedding has such a layer, too. By default the loss is `cc_loss`, as in
    the CIFAR-100 literature; ``kernel: true`` chooses the paper's `kernel_loss`. The kernel
    compares images within one network, so the embeddings need no common width: with
    ``feat_dim: null`` the kernel compares the embeddings themselves, and no trained layer can make
    these alike. Labels are not used, so mixed images and label smoothing change nothing.

    Args:
        feat_dim: width of the linear layers' outputs; null for no linear layers.
        kernel: whether correlations by the Gaussian kernel are compared.
        gamma: gamma of the Gaussian kernel, more than 0.
        order: order of the kernel's Taylor series, 1 or more.
        weight: weight of the loss. By default it is 0.02, as in the CIFAR-100 literature. With the
            kernel it is 100, our own value, since that loss is a mean of squares of small numbers.
    """

    needs = frozenset({"embedding"})

    def __init__(
        self,
        feat_dim: int | None = 128,
        kernel: bool = False,
        gamma: float = 0.4,
        order: int = 2,
        weight: float | None = None,
    ) -> None:
        super().__init__()
        if feat_dim is not None and feat_dim < 1:
            raise MethodError(
                f"The width feat_dim of the linear layers must be 1 or more, not {feat_dim}."
            )
        if not gamma > 0:
            raise MethodError(f"The kernel's gamma must be above 0, not {gamma}.")
        if order < 1:
            raise MethodError(f"The order of the Taylor series must be 1 or more, not {order}.")
        if weight is None:
            weight = _KERNEL_WEIGHT if kernel else _WEIGHT
        check_weight(weight)
        self.feat_dim, self.kernel, self.weight = feat_dim, kernel, weight
        self.gamma, self.order = gamma, order

    def build(self, network: FeatureInfo, teacher: FeatureInfo) -> None:
        """Make the linear layers.

        Raises:
            MethodError: when a network has no embedding, or embeddings of different widths are to
                be compared without linear layers.
        """
        check_embeddings(self, network, teacher)
        if self.feat_dim is None and not self.kernel and network.embedding != teacher.embedding:
            raise MethodError(
                "CC compares embeddings of one width, but the trained network has "
                f"{network.embedding} channels and the static teacher {teacher.embedding}; set "
                "--model.method.feat_dim, or --model.method.kernel true."
            )
        if self.feat_dim is not None:
            self.student_layer = nn.Linear(network.embedding, self.feat_dim)
            self.teacher_layer = nn.Linear(teacher.embedding, self.feat_dim)

    def forward(self, network: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `cc_loss` and `kernel_loss`."""
        ours, theirs = embeddings(network, teacher)
        if self.feat_dim is not None:
            ours, theirs = connect(self.student_layer, ours), connect(self.teacher_layer, theirs)
        if self.kernel:
            return self.weight * kernel_loss(ours, theirs, self.gamma, self.order)
        return self.weight * cc_loss(ours, theirs)
