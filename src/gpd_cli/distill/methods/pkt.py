"""Probabilistic knowledge transfer (Passalis and Tefas, ECCV 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from gpd_cli.distill.features import FeatureInfo, Outputs
from gpd_cli.distill.methods.base import Batch, Method, check_weight
from gpd_cli.distill.methods.embeddings import check_embeddings, cosines, embeddings

_EPSILON = 1e-7


def affinities(embedding: Tensor) -> Tensor:
    """Compute the probability that image i picks image j as its neighbour, by the cosine kernel.

    Args:
        embedding: embeddings x of a batch, ``[B, F]``.

    Returns:
        The probabilities, ``[B, B]``: ``(1 + cos(x_i, x_j)) / 2``, with each row divided by its
        sum.

    Example:
        >>> affinities(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([[0.6667, 0.3333],
                [0.3333, 0.6667]])
    """
    kernel = (1 + cosines(embedding)) / 2
    # As in the authors' code, an image may pick itself, so that no row consists of zeros.
    return kernel / kernel.sum(dim=1, keepdim=True)


def pkt_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Probabilistic knowledge transfer (Passalis and Tefas, ECCV 2018, arXiv 1803.10837).

    ``mean_ij(t_ij log(t_ij / s_ij))``, with the `affinities` t of the teacher and s of the student.
    This is the divergence of the conditional distributions with a cosine kernel; as in the authors'
    code, it is a mean over all pairs.

    Args:
        student: embeddings, ``[B, F]``.
        teacher: embeddings, ``[B, F']``.

    Returns:
        A scalar.
    """
    ours, theirs = affinities(student) + _EPSILON, affinities(teacher)
    return (theirs * torch.log((theirs + _EPSILON) / ours)).mean()


class PKT(Method):
    """Probabilistic knowledge transfer on embeddings.

    Labels are not used, so mixed images and label smoothing change nothing.

    Args:
        weight: weight of the loss. It is large, since the loss is a mean of small numbers over all
            pairs; the default is the value of the CIFAR-100 literature (Tian et al., ICLR 2020) for
            batches of 64 images.
    """

    needs = frozenset({"embedding"})

    def __init__(self, weight: float = 30000.0) -> None:
        super().__init__()
        check_weight(weight)
        self.weight = weight

    def build(self, network: FeatureInfo, teacher: FeatureInfo) -> None:
        """Check that both networks have an embedding; nothing is trained.

        Raises:
            MethodError: when a network has no embedding.
        """
        check_embeddings(self, network, teacher)

    def forward(self, network: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `pkt_loss`."""
        return self.weight * pkt_loss(*embeddings(network, teacher))
