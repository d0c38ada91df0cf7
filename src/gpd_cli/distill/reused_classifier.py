"""The static teacher's classifier in a student that reuses it, as SimKD needs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gpd_cli.distill.features import find_features
from gpd_cli.distill.static_teacher import StaticTeacher
from gpd_cli.errors import MethodError, ModelError
from gpd_cli.models import ReusedClassifier
from gpd_cli.teacher import Pair, Unshared
from gpd_cli.teacher.networks import Alone


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
    if not isinstance(_owner_of_weights(network), ReusedClassifier):
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
    owners = [_owner_of_weights(network)]
    if isinstance(network, Unshared):
        owners.append(network.narrow)  # the student's own classifier
    for owner in owners:
        if teachers and isinstance(owner, ReusedClassifier):
            owner.classifier.requires_grad_(False)


def _owner_of_weights(network: Pair | Alone) -> nn.Module:
    """The module that owns the trained parameters."""
    return network.teacher if isinstance(network, Pair) else network.network
