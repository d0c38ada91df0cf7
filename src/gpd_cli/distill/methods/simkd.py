"""Knowledge distillation with the reused teacher classifier: SimKD (Chen et al., CVPR 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from gpd_cli.distill.features import FeatureInfo, Outputs, find_features
from gpd_cli.distill.methods.base import Batch, Method, check_weight
from gpd_cli.distill.methods.embeddings import check_embeddings, embeddings
from gpd_cli.distill.precision import in_float32
from gpd_cli.distill.static_teacher import StaticTeacher
from gpd_cli.errors import MethodError, ModelError
from gpd_cli.models import ReusedClassifier
from gpd_cli.teacher import Pair, Unshared
from gpd_cli.teacher.networks import Alone


def mean_of_copies(embedding: Tensor, width: int) -> Tensor:
    """Average a wide embedding over the copies of each channel.

    In the dynamic teacher's embedding the copies of a channel lie side by side
    (``c0 c0 c1 c1 ...``). The frozen classifier has equal weights for all copies of a channel (see
    `adopt_classifier`), so its output depends on their mean only. Right after the expansion the
    mean is the student's embedding.

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


def adopt_classifier(student: nn.Module, teachers: Sequence[StaticTeacher]) -> tuple[str, ...]:
    """Copy the first static teacher's classifier into a student that reuses it.

    Args:
        student: any network; only a `ReusedClassifier` is changed.
        teachers: the static teachers; without one the student keeps its own classifier.

    Returns:
        Names of the layers that are to stay frozen and to be expanded without noise: the
        classifier, if it was copied.

    Raises:
        ModelError: when the teacher has no linear classifier, or one of another width.
    """
    if not isinstance(student, ReusedClassifier) or not teachers:
        return ()
    network = teachers[0].network
    name = find_features(network, teachers[0].shape, names=[]).classifier
    if name is None:
        raise ModelError(
            f"The static teacher ({type(network).__name__}) has no linear classifier to reuse; "
            "choose another static teacher, or a student without simkd/."
        )
    classifier = network.get_submodule(name)
    assert isinstance(classifier, nn.Linear)
    student.adopt(classifier)
    return ("classifier",)


def check_reused(network: Pair | Alone, teachers: Sequence[StaticTeacher], method: str) -> None:
    """Check that the student has a reused classifier, and that there is only one static teacher.

    Args:
        network: the network that is trained.
        teachers: the static teachers.
        method: name of the method, for error messages.

    Raises:
        MethodError: when there are assistants.
        ModelError: when the student is no `ReusedClassifier`.
    """
    if len(teachers) > 1:
        raise MethodError(
            f"{method} uses the static teacher's classifier, and cannot learn from assistants with "
            "classifiers of their own; leave out --model.assistants, or choose another method."
        )
    if not isinstance(_trained(network), ReusedClassifier):
        raise ModelError(
            f"{method} needs a student that ends in a projector and the static teacher's "
            "classifier; set --model.student simkd/NAME and --model.student_args '{features: F}', "
            "where F is the width of that classifier."
        )


def freeze_classifier(network: Pair | Alone, teachers: Sequence[StaticTeacher]) -> None:
    """Freeze a classifier that was reused from a static teacher, in student and dynamic teacher.

    Args:
        network: the network that is trained.
        teachers: the static teachers; without one nothing is frozen.
    """
    owners = [_trained(network)]
    if isinstance(network, Unshared):
        owners.append(network.narrow)  # the student's own classifier
    for owner in owners:
        if teachers and isinstance(owner, ReusedClassifier):
            owner.classifier.requires_grad_(False)


def _trained(network: Pair | Alone) -> nn.Module:
    """The module that owns the trained parameters."""
    return network.teacher if isinstance(network, Pair) else network.network
