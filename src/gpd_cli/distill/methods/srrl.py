"""Softmax regression representation learning (Yang et al., ICLR 2021)."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from gpd_cli.distill.features import FeatureInfo, Outputs
from gpd_cli.distill.methods.base import Batch, Method, check_weight
from gpd_cli.distill.methods.embeddings import check_embeddings, connect, embeddings
from gpd_cli.distill.precision import full_precision, in_float32


def srrl_loss(
    connected: Tensor,
    embedding: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits: Tensor,
    feature_weight: float = 1.0,
    softmax_weight: float = 1.0,
) -> Tensor:
    """Softmax regression representation learning (Yang et al., ICLR 2021).

    The weighted sum of two mean squared differences: between the embeddings (feature matching), and
    between the logits that the teacher's classifier computes from the embeddings (softmax
    regression, in the form of the authors' code). The paper is at OpenReview, ZzwDy_wiWv.

    Args:
        connected: the student's embedding after the connector, ``[B, F]``.
        embedding: the teacher's embedding, ``[B, F]``.
        weight: weight of the teacher's classifier, ``[C, F]``.
        bias: bias of the teacher's classifier, ``[C]``, or None.
        logits: the teacher's logits, ``[B, C]``.
        feature_weight: weight of feature matching.
        softmax_weight: weight of softmax regression.

    Returns:
        A scalar.
    """
    connected = in_float32(connected)
    with full_precision(connected):
        bias = None if bias is None else bias.to(connected.dtype)
        seen = F.linear(connected, weight.to(connected.dtype), bias)
    matching = F.mse_loss(connected, in_float32(embedding))
    return feature_weight * matching + softmax_weight * F.mse_loss(seen, in_float32(logits))


class SRRL(Method):
    """Softmax regression: the teacher's classifier has to work on the network's embedding, too.

    A trained connector maps the network's embedding to the teacher's. It has the layers of the
    authors' connector (linear without bias, batch norm, ReLU), but runs on the classifier's input;
    the authors' runs on the map before pooling. A batch has to have two images or more. Labels are
    not used, so mixed images and label smoothing change nothing.

    Args:
        relu: whether the connector ends in ReLU, as in the authors' code; choose false for teachers
            whose embedding has negative entries (most transformers).
        feature_weight: weight of feature matching.
        softmax_weight: weight of softmax regression.
    """

    needs = frozenset({"embedding"})

    def __init__(
        self, relu: bool = True, feature_weight: float = 1.0, softmax_weight: float = 1.0
    ) -> None:
        super().__init__()
        for weight in (feature_weight, softmax_weight):
            check_weight(weight)
        self.relu = relu
        self.feature_weight, self.softmax_weight = feature_weight, softmax_weight

    def build(self, network: FeatureInfo, teacher: FeatureInfo) -> None:
        """Make the connector.

        Raises:
            MethodError: when a network has no embedding.
        """
        check_embeddings(self, network, teacher)
        linear = nn.Linear(network.embedding, teacher.embedding, bias=False)
        nn.init.normal_(linear.weight, std=math.sqrt(2 / teacher.embedding))
        last = nn.ReLU() if self.relu else nn.Identity()
        self.connector = nn.Sequential(linear, nn.BatchNorm1d(teacher.embedding), last)

    def forward(self, network: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `srrl_loss`."""
        ours, theirs = embeddings(network, teacher)
        assert teacher.weight is not None
        return srrl_loss(
            connect(self.connector, ours),
            theirs,
            teacher.weight.detach(),
            None if teacher.bias is None else teacher.bias.detach(),
            teacher.logits.detach(),
            self.feature_weight,
            self.softmax_weight,
        )
