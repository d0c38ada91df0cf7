"""The static teacher's classifier in the student's place (SimKD, Chen et al., CVPR 2022)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gpd_cli.errors import ModelError
from gpd_cli.expansion import Pair, Unshared
from gpd_cli.features import find_places
from gpd_cli.models import ReusedClassifier
from gpd_cli.training.networks import Alone
from gpd_cli.training.static_teacher import StaticTeacher


def adopt_classifier(student: nn.Module, teachers: Sequence[StaticTeacher]) -> None:
    """Give a student that is built for it the first static teacher's classifier.

    Args:
        student: any network; only a `ReusedClassifier` is changed.
        teachers: the static teachers; without one the student keeps its own classifier.

    Raises:
        ModelError: when the teacher has no linear classifier, or one of another width.
    """
    if not isinstance(student, ReusedClassifier) or not teachers:
        return
    network = teachers[0].network
    name = find_places(network, teachers[0].shape, names=[]).classifier
    if name is None:
        raise ModelError(
            f"The static teacher ({type(network).__name__}) has no linear classifier to reuse; "
            "choose another one, or a student without simkd/."
        )
    classifier = network.get_submodule(name)
    assert isinstance(classifier, nn.Linear)
    student.adopt(classifier)


def check_reused(network: Pair | Alone, method: str) -> None:
    """Check that the student ends in the static teacher's classifier.

    Args:
        network: what is trained.
        method: that needs it.

    Raises:
        ModelError: when it does not.
    """
    if not isinstance(_owner(network), ReusedClassifier):
        raise ModelError(
            f"{method} trains a student that ends in a projector and the static teacher's "
            "classifier; name it --model.student simkd/NAME, with --model.student_args "
            "'{features: F}', F being the width of that classifier."
        )


def freeze_classifier(network: Pair | Alone, teachers: Sequence[StaticTeacher]) -> None:
    """Keep a reused classifier, in student and dynamic teacher, as it is.

    Args:
        network: what is trained.
        teachers: the static teachers.
    """
    owners = [_owner(network)]
    if isinstance(network, Unshared):
        owners.append(network.narrow)  # which has a classifier of its own
    for owner in owners:
        if teachers and isinstance(owner, ReusedClassifier):
            owner.classifier.requires_grad_(False)


def _owner(network: Pair | Alone) -> nn.Module:
    """The module that owns the trained parameters."""
    return network.teacher if isinstance(network, Pair) else network.network
