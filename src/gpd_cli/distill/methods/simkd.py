"""Knowledge distillation with the reused teacher classifier: SimKD (Chen et al., CVPR 2022)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from gpd_cli.distill.features import FeatureInfo, Outputs
from gpd_cli.distill.methods.base import Batch, Method, check_weight
from gpd_cli.distill.methods.embeddings import check_embeddings, embeddings
from gpd_cli.distill.precision import in_float32
from gpd_cli.errors import MethodError


def mean_of_copies(embedding: Tensor, width: int) -> Tensor:
    """Average a wide embedding over the copies of each channel.

    In the dynamic teacher's embedding the copies of a channel lie side by side
    (``c0 c0 c1 c1 ...``). The frozen classifier has equal weights for all copies of a channel (see
    `gpd_cli.distill.reused_classifier`), so its output depends on their mean only. Right after the
    expansion the mean is the student's embedding.

    Args:
        embedding: the embedding, ``[B, r * width]``, with r copies of each channel.
        width: number of channels of the result.

    Returns:
        The means, ``[B, width]``; the embedding itself where r is 1.
    """
    groups: Tensor = embedding.unflatten(1, (width, -1))
    return groups.mean(dim=2)


def simkd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """SimKD (Chen et al., CVPR 2022, arXiv 2203.14001).

    ``mean((P(f_s) - f_t)^2)``, with the teacher's features f_t, and the student's features f_s
    after the projector P. The projector's output is the student's embedding.

    Args:
        student: the student's embedding, ``[B, r * F]``, with r copies of each channel.
        teacher: the static teacher's embedding, ``[B, F]``.

    Returns:
        A scalar.
    """
    student, teacher = in_float32(student), in_float32(teacher)
    return F.mse_loss(mean_of_copies(student, teacher.shape[1]), teacher)


class SimKD(Method):
    """SimKD: the student learns the features that the static teacher's classifier gets.

    The student ends in a projector and a copy of this classifier (``--model.student simkd/NAME``).
    In the authors' runs this is the only loss (``--model.ce_weight 0``). Labels are not used, so
    mixed images and label smoothing change nothing.

    Args:
        weight: weight of the loss.
    """

    needs = frozenset({"embedding"})
    reuses_classifier = True

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        check_weight(weight)
        self.weight = weight

    def build(self, network: FeatureInfo, teacher: FeatureInfo) -> None:
        """Check the widths of the embeddings; nothing is trained here.

        The projector is a part of the student.

        Raises:
            MethodError: when a network has no embedding, or the width of the trained network's
                embedding is no multiple of the width of the static teacher's.
        """
        check_embeddings(self, network, teacher)
        if network.embedding % teacher.embedding:
            raise MethodError(
                f"SimKD compares embeddings of one width, but the trained network has "
                f"{network.embedding} channels and the static teacher {teacher.embedding}; train "
                "a student with a projector (--model.student simkd/NAME), at a whole expansion "
                "ratio (--model.ratio 2)."
            )

    def forward(self, network: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See `simkd_loss`."""
        return self.weight * simkd_loss(*embeddings(network, teacher))
