"""Relational knowledge distillation (Park et al., CVPR 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gpd_cli.distill.features import FeatureInfo, Outputs
from gpd_cli.distill.methods.base import Batch, Method, check_weight
from gpd_cli.distill.methods.embeddings import check_embeddings, embeddings, unit_vectors
from gpd_cli.distill.precision import full_precision, in_float32


def rkd_loss(
    student: Tensor, teacher: Tensor, distance_weight: float = 25.0, angle_weight: float = 50.0
) -> Tensor:
    """Relational knowledge distillation (Park et al., CVPR 2019, arXiv 1904.05068).

    The sum of two Huber losses (with delta 1) between the networks: one compares the relative
    distances of all pairs of images in the batch, the other the angles of all triples. Each is a
    mean over the pairs or triples, as in the authors' code.

    Args:
        student: embeddings, ``[B, F]``.
        teacher: embeddings, ``[B, F']``.
        distance_weight: weight of the loss on distances.
        angle_weight: weight of the loss on angles, whose cost grows with the cube of B.

    Returns:
        A scalar.
    """
    ours, theirs = _differences(student), _differences(teacher)
    loss = ours.new_zeros(())
    if distance_weight:
        loss = loss + distance_weight * F.smooth_l1_loss(_relative(ours), _relative(theirs))
    if angle_weight:
        loss = loss + angle_weight * F.smooth_l1_loss(_cosines(ours), _cosines(theirs))
    return loss


class RKD(Method):
    """Relational knowledge distillation, by distances and angles of embeddings.

    Labels are not used, so mixed images and label smoothing change nothing. Memory grows with
    ``B^2 F`` and ``B^3``, for B images in a process and embeddings of F numbers (about 0.5 GB for
    each network at B = 256 and F = 512).

    Args:
        distance_weight: weight of the loss on distances; 0 leaves it out.
        angle_weight: weight of the loss on angles; 0 leaves it out.
    """

    needs = frozenset({"embedding"})

    def __init__(self, distance_weight: float = 25.0, angle_weight: float = 50.0) -> None:
        super().__init__()
        for weight in (distance_weight, angle_weight):
            check_weight(weight)
        self.distance_weight, self.angle_weight = distance_weight, angle_weight

    def build(self, network: FeatureInfo, teacher: FeatureInfo) -> None:
        """Check that both networks have an embedding; nothing is trained.

        Raises:
            MethodError: when a network has no embedding.
        """
        check_embeddings(self, network, teacher)

    def forward(self, network: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `rkd_loss`."""
        ours, theirs = embeddings(network, teacher)
        return rkd_loss(ours, theirs, self.distance_weight, self.angle_weight)


def _differences(embedding: Tensor) -> Tensor:
    """The differences from embedding i to embedding j, ``[B, B, F]``."""
    embedding = in_float32(embedding)
    return embedding[None, :] - embedding[:, None]


def _relative(differences: Tensor) -> Tensor:
    """Distances between all pairs, divided by the mean of those that are not 0: ``[B, B]``."""
    distances: Tensor = torch.linalg.vector_norm(differences, dim=2)
    apart = (distances > 0).sum().clamp(min=1)
    mean = distances.sum() / apart
    return distances / mean.where(mean > 0, torch.ones_like(mean))


def _cosines(differences: Tensor) -> Tensor:
    """Cosines ``[i, j, k]`` of the angles at i between j and k, ``[B, B, B]``.

    A cosine is 0 where a distance is 0.
    """
    directions = unit_vectors(differences)
    with full_precision(directions):
        return directions @ directions.mT
