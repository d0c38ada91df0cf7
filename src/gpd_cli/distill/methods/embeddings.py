"""Helpers of methods that compare embeddings, the inputs of the classifiers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpd_cli.distill.features import FeatureInfo, Outputs
from gpd_cli.distill.methods.base import Method
from gpd_cli.distill.precision import full_precision, in_float32
from gpd_cli.errors import MethodError


def check_embeddings(method: Method, network: FeatureInfo, teacher: FeatureInfo) -> None:
    """Check that both networks have an embedding.

    Args:
        method: the method, for the error message.
        network: stages and classifier of the trained network.
        teacher: stages and classifier of the static teacher.

    Raises:
        MethodError: when a network has no linear classifier.
    """
    for info, which in ((network, "trained network"), (teacher, "static teacher")):
        if not info.embedding:
            raise MethodError(
                f"{type(method).__name__} compares the inputs of the classifiers, but the {which} "
                "does not end in a linear classifier; choose a method on logits, such as DIST."
            )


def embeddings(network: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
    """The embeddings of both networks, the teacher's without graph.

    Args:
        network: outputs of the trained network.
        teacher: outputs of the static teacher.

    Returns:
        The trained network's embedding, ``[B, F]``, and the static teacher's, ``[B, F']``.
    """
    assert network.embedding is not None and teacher.embedding is not None
    return network.embedding, teacher.embedding.detach()


def connect(layer: nn.Module, embedding: Tensor) -> Tensor:
    """Run a connector on an embedding, in the precision of the connector's parameters.

    Args:
        layer: the connector, from F to F' features.
        embedding: the embedding, ``[B, F]``.

    Returns:
        The connector's output, ``[B, F']``, in float32 or better.
    """
    weight = next(layer.parameters())
    return in_float32(layer(embedding.to(weight.dtype)))


def unit_vectors(vectors: Tensor) -> Tensor:
    """Divide vectors by their norms; zero vectors stay zero, and their gradients stay bounded.

    Args:
        vectors: vectors along the last axis, ``[..., F]``.

    Returns:
        Vectors of length 1 (or 0), ``[..., F]``.

    Example:
        >>> unit_vectors(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / norms.where(norms > 0, torch.ones_like(norms))


def cosines(vectors: Tensor) -> Tensor:
    """Compute the cosines of the angles between all pairs of vectors.

    Args:
        vectors: the vectors, ``[B, F]``.

    Returns:
        The cosines, ``[B, B]``, in float32 or better.
    """
    units = unit_vectors(in_float32(vectors))
    with full_precision(units):
        return units @ units.T
