"""Knowledge distillation with the reused teacher classifier: SimKD (Chen et al., CVPR 2022)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from gpd_cli.errors import MethodError
from gpd_cli.features import Outputs, Places
from gpd_cli.methods.base import Batch, Method, check_weight
from gpd_cli.methods.embeddings import check_embeddings, embeddings
from gpd_cli.methods.precision import in_float32


def mean_of_copies(embedding: Tensor, width: int) -> Tensor:
    """A wide embedding, narrowed: the mean over the copies of each channel.

    The dynamic teacher's channels are copies side by side (``c0 c0 c1 c1 ...``), and its classifier
    starts with the student's weight shared equally among them: their mean is what it sees of a
    channel. Right after the expansion that is the student's embedding.

    Args:
        embedding: ``[B, r * width]``.
        width: of the result.

    Returns:
        ``[B, width]``; the embedding itself where it has this width.
    """
    return embedding.unflatten(1, (width, -1)).mean(dim=2)


def simkd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """SimKD (Chen et al., CVPR 2022, arXiv 2203.14001).

    ``mean((P(f_s) - f_t)^2)``, where the student's embedding is the projector's output already.

    Args:
        student: embeddings, ``[B, r * F]``, of copies where r is more than 1.
        teacher: embeddings, ``[B, F]``.

    Returns:
        A scalar.
    """
    student, teacher = in_float32(student), in_float32(teacher)
    return F.mse_loss(mean_of_copies(student, teacher.shape[1]), teacher)


class SimKD(Method):
    """SimKD: the student learns to give the features that the teacher's own classifier needs.

    The student ends in a projector and the teacher's classifier (``--model.student simkd/NAME``).
    In the authors' runs this is the only loss (``--model.ce_weight 0``). Labels are not used, so
    mixed images and label smoothing change nothing.

    Args:
        weight: of the loss.
    """

    needs = frozenset({"embedding"})
    reuses_classifier = True

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        check_weight(weight)
        self.weight = weight

    def build(self, network: Places, teacher: Places) -> None:
        """Nothing is trained here: the projector is part of the student.

        Raises:
            MethodError: when a network has no embedding, or the trained one's is no multiple of the
                static teacher's.
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
