"""What methods on embeddings share: both embeddings, connectors, unit vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpd_cli.distill.features import Outputs, Places
from gpd_cli.distill.methods.base import Method
from gpd_cli.distill.methods.precision import full_precision, in_float32
from gpd_cli.errors import MethodError


def check_embeddings(method: Method, network: Places, teacher: Places) -> None:
    """Check that both networks have an embedding.

    Args:
        method: which needs it.
        network: places of the trained network.
        teacher: places of the static teacher.

    Raises:
        MethodError: when one has no linear classifier.
    """
    for places, which in ((network, "trained network"), (teacher, "static teacher")):
        if not places.embedding:
            raise MethodError(
                f"{type(method).__name__} compares what the classifiers see, but the {which} does "
                "not end in a linear classifier; choose a method on logits, such as dist."
            )


def embeddings(network: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
    """The embeddings of both networks, the teacher's without graph.

    Args:
        network: what the trained network computed.
        teacher: what the static teacher computed.

    Returns:
        ``[B, F]`` and ``[B, F']``.
    """
    assert network.embedding is not None and teacher.embedding is not None
    return network.embedding, teacher.embedding.detach()


def connect(layer: nn.Module, embedding: Tensor) -> Tensor:
    """Run a connector, in whatever precision it runs, and return float32 or better.

    Args:
        layer: which has parameters.
        embedding: ``[B, F]``.

    Returns:
        ``[B, F']``.
    """
    weight = next(layer.parameters())
    return in_float32(layer(embedding.to(weight.dtype)))


def unit_vectors(vectors: Tensor) -> Tensor:
    """Vectors divided by their norms; zeros stay zeros, and their gradient stays moderate.

    Args:
        vectors: ``[..., F]``.

    Returns:
        ``[..., F]``.
    """
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / norms.where(norms > 0, torch.ones_like(norms))


def cosines(vectors: Tensor) -> Tensor:
    """Cosines of the angles between all pairs of vectors.

    Args:
        vectors: ``[B, F]``.

    Returns:
        ``[B, B]``, in float32 or better.
    """
    units = unit_vectors(in_float32(vectors))
    with full_precision(units):
        return units @ units.T
